"""In which precision text is generated."""

from __future__ import annotations

import pytest
import torch

from whit.pipeline.prepare import decoding_dtype


@pytest.mark.parametrize(
    ("saved", "device", "expected"),
    [
        (torch.float32, "cuda", torch.bfloat16),
        (torch.float16, "cuda", torch.float16),
        (torch.bfloat16, "cuda", torch.bfloat16),
        (torch.bfloat16, "cpu", torch.float32),
        (torch.float32, "mps", torch.float32),
    ],
)
def test_a_gpu_decodes_in_16_bit_whatever_was_saved(saved: torch.dtype, device: str, expected: torch.dtype) -> None:
    assert decoding_dtype(saved, torch.device(device)) is expected
