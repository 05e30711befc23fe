"""All values of a tensor are numbers, or not, whatever their sum is."""

from __future__ import annotations

import pytest
import torch

from whit.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_kind_of_number(dtype: torch.dtype) -> None:
    values = torch.full((3, 1000), torch.finfo(dtype).max, dtype=dtype)  # whose sum is infinite in float32 and above
    assert all_finite(values) and all_finite(values[:0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        wrong = values.clone()
        wrong[1, 500] = bad
        assert not all_finite(wrong)
        wrong[2, 3] = -bad
        assert not all_finite(wrong)


def test_integers_are_numbers() -> None:
    assert all_finite(torch.tensor([1, 2])) and all_finite(torch.tensor([True]))
