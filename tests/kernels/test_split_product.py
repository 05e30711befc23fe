"""A float32 matrix as three bfloat16 ones: nothing is lost, and products with signs are those of float32."""

import pytest
import torch

from whit.kernels.split_product import SplitMatrix, split


def matrix(rows: int = 40, inner: int = 70) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, inner, generator=generator) * torch.logspace(-6, 6, inner)


def signs(inner: int = 70, columns: int = 30) -> torch.Tensor:
    return torch.randint(-1, 2, (inner, columns), generator=torch.Generator().manual_seed(1)).float()


def test_the_parts_add_up_exactly():
    parts = split(matrix())
    assert [part.dtype for part in parts] == [torch.bfloat16] * 3
    assert torch.equal(sum(part.double() for part in reversed(parts)), matrix().double())


def test_a_cpu_multiplies_as_ever():
    assert torch.equal(SplitMatrix(matrix()).times(signs()), matrix() @ signs())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensor_cores_give_the_float32_product():
    expected = matrix().double() @ signs().double()
    size = matrix().abs() @ signs().abs()
    out = SplitMatrix(matrix().cuda()).times(signs().cuda()).cpu()
    assert float(((out - expected).abs() / size).max()) < 1e-6
