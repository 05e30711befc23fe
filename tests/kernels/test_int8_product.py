"""Fast products of INT8 matrices: the very integers of the float64 oracle, so that layers give the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whit.formats import Packed
from whit.formats.outlier_int8 import OutlierInt8, float64_product
from whit.kernels import explain, packed_linear
from whit.kernels.int8_product import EXACT_COLUMNS, float32_product, int32_product
from whit.methods import LayerStatistics, make_method

PRODUCTS = [int32_product, float32_product]


def codes(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("tokens", "columns", "rows"), [(1, 1, 1), (3, 7, 5), (0, 8, 8), (19, 2100, 33), (2, 64, 0)])
def test_integers_are_those_of_the_oracle(product, tokens: int, columns: int, rows: int) -> None:  # type: ignore[no-untyped-def]
    left, right = codes(tokens, columns, 0), codes(rows, columns, 1)
    out = product(left, right)
    assert out.shape == (tokens, rows)
    assert torch.equal(out.double(), float64_product(left, right))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("columns", [EXACT_COLUMNS, 133_000])
def test_the_largest_sums_are_exact(product, columns: int) -> None:  # type: ignore[no-untyped-def]
    ones = torch.full((1, columns), 127, dtype=torch.int8)
    assert 127**2 * columns < 2**31
    assert int(product(ones, -ones)) == -(127**2) * columns
    ones[0, 0] = 126  # an odd sum beside the largest one: float32 would not hold it much longer
    assert int(product(ones, ones)) == 127**2 * columns - 253


def test_blocks_of_columns_are_as_wide_as_float32_allows() -> None:
    assert 127**2 * EXACT_COLUMNS <= 2**24 < 127**2 * (EXACT_COLUMNS + 8)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outliers", ["dynamic", "static", "none"])
def test_layers_have_the_same_bits_whatever_the_product(product, dtype: torch.dtype, outliers: str) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 1100, generator=generator)
    inputs = torch.randn(2, 9, 1100, generator=generator)
    inputs[..., 5] *= 10
    statistics = LayerStatistics(1100, 18, absolute_maximum=inputs.abs().amax((0, 1)))
    packed = make_method("llm-int8", {"outliers": outliers}).compress(weight, statistics).packed
    assert isinstance(packed.format, OutlierInt8)
    bias = torch.randn(50, generator=generator)
    plain = packed.linear(inputs.to(dtype), bias)
    fast = packed.format.linear_with(product, inputs.to(dtype), packed.tensors, 50, 1100, bias)
    assert torch.equal(plain, fast)
    assert torch.equal(plain, packed_linear(inputs.to(dtype), packed, bias))


def test_large_outputs_are_made_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = make_method("llm-int8", {"outlier_weights": "int8"}).compress(torch.randn(37, 24), LayerStatistics(24))
    inputs = 4 * torch.randn(5, 24)
    whole = packed.packed.linear(inputs)
    monkeypatch.setattr("whit.formats.outlier_int8.OUTPUTS_AT_ONCE", 40)
    monkeypatch.setattr("whit.formats.outlier_int8.WEIGHT_ROWS_AT_ONCE", 3)
    assert torch.equal(packed.packed.linear(inputs), whole)


def test_a_fast_version_is_chosen_on_the_cpu() -> None:
    packed = Packed(OutlierInt8(6.0, "dynamic"), 3, 5, {"codes": codes(3, 5, 0), "absmax": torch.ones(3)})
    assert explain(torch.ones(1, 5), packed) in ("int8 to int32", "float32 blocks")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("tokens", "columns", "rows"), [(1, 64, 40), (17, 63, 41), (300, 1100, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outliers", ["dynamic", "static", "none"])
def test_a_gpu_gives_the_outputs_of_the_cpu(
    tokens: int, columns: int, rows: int, dtype: torch.dtype, outliers: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(rows, columns, generator=generator), torch.randn(tokens, columns, generator=generator)
    inputs[:, 5] *= 10
    statistics = LayerStatistics(columns, tokens, absolute_maximum=inputs.abs().amax(0))
    packed = make_method("llm-int8", {"outliers": outliers}).compress(weight, statistics).packed
    there = packed.to("cuda")
    if dtype == torch.float32:
        assert explain(inputs.to("cuda", dtype), there) == "int8 to int32"
    assert isinstance(there.format, OutlierInt8)
    out = there.format.linear_with(int32_product, inputs.to("cuda", dtype), there.tensors, rows, columns).cpu()
    expected = packed.linear(inputs.to(dtype))
    spacing = torch.finfo(dtype).eps * expected.double().abs()
    assert bool(((out.double() - expected.double()).abs() <= spacing).all())
