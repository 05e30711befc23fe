"""Values of GGUF blocks against those of the gguf package, bit by bit, for any bytes that a file may hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from whit.models.gguf_values import values_of

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")


@pytest.mark.parametrize(("kind", "numbers"), [("Q4_0", 1), ("Q4_1", 2), ("Q8_0", 1), ("Q5_1", 2), ("F16", 0)])
def test_the_same_bits_as_the_gguf_package(kind: str, numbers: int) -> None:
    """Scales of every size, subnormal and negative ones included, every code; types of other layouts go to gguf."""
    generator = np.random.default_rng(0)
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    rows, columns = 37, 96
    content = generator.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    if numbers:
        scales = generator.normal(size=(len(content), numbers)) * 10.0 ** generator.integers(-7, 4, (len(content), 1))
        content[:, : 2 * numbers] = scales.astype(np.float16).view(np.uint8)
    else:
        content = generator.normal(size=rows * columns).astype(np.float16).view(np.uint8)
    expected = gguf.dequantize(content.reshape(rows, -1), number)
    found = values_of(kind, torch.from_numpy(content.reshape(-1)), rows)
    assert found.dtype == torch.float32 and found.shape == (rows, columns)
    assert np.array_equal(found.numpy().view(np.int32), np.asarray(expected, np.float32).view(np.int32))
    assert len(found.unique()) > 100
