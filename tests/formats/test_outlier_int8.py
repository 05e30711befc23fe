"""The meaning of an LLM.int8() layer: published values, identities of the decomposition, exact integers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from whit.errors import ModelError
from whit.formats import Packed, format_from_json
from whit.formats.outlier_int8 import OutlierInt8, dequantise, quantise
from whit.methods import LayerStatistics, make_method

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pack(weight: Tensor, largest: Tensor | None = None, **knobs: object) -> Packed:
    """The weight compressed by llm-int8; with `largest` magnitudes of the inputs if columns are to be listed."""
    if largest is None:
        knobs.setdefault("outlier_weights", "int8")
    statistics = LayerStatistics(weight.shape[1], 0 if largest is None else 100, absolute_maximum=largest)
    return make_method("llm-int8", knobs).compress(weight, statistics).packed


def case(seed: int = 0, rows: int = 24, columns: int = 40, tokens: int = 7) -> tuple[Tensor, Tensor]:
    """A weight, and inputs whose columns 3 and 17 hold outliers."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator).clamp(-4, 4)
    inputs[0, 3], inputs[:, 17] = 20.0, -9.0
    return 0.1 * torch.randn(rows, columns, generator=generator), inputs


def split(packed: Packed, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(packed.format, OutlierInt8)
    out = packed.format.split(inputs, packed.tensors)
    return out.codes, out.absmax, out.outliers


def int8_product(packed: Packed, inputs: Tensor) -> Tensor:
    """The INT8 part of the output alone, by the equation."""
    codes, absmax, _ = split(packed, inputs)
    sums = codes.long() @ packed.tensors["codes"].long().T
    return sums * absmax.double() * packed.tensors["absmax"].double() / 127**2


@pytest.mark.parametrize("compat", [False, True])
def test_published_example(compat: bool) -> None:
    inputs = torch.tensor([[1, -2, 0.5, 8], [0.25, 3, -1, 0.5]]).half()
    packed = pack(torch.tensor([[0.5, -0.25, 1, 0.1], [-1, 0.75, 0.2, 2]]), compat=compat)
    codes, absmax, outliers = split(packed, inputs)
    assert codes.tolist() == [[64, -127, 32, 0], [11, 127, -42, 0]]
    assert absmax.tolist() == [[2], [3]]
    assert outliers.tolist() == [3]
    assert packed.tensors["codes"].tolist() == [[64, -32, 127, 13], [-64, 48, 13, 127]]
    assert packed.tensors["absmax"].tolist() == [1, 2]
    assert (codes.long() @ packed.tensors["codes"].long().T).tolist() == [[12224, -9776], [-8694, 4846]]
    exact = torch.tensor([[2.3347, 13.5756], [-1.5659, 2.8027]])
    torch.testing.assert_close(packed.linear(inputs.float()), exact, rtol=0, atol=6e-5)
    # bitsandbytes rounds twice; rounded once, -1.56591 becomes -1.5654.
    rounded = [[2.3340, 13.5781], [-1.5664 if compat else -1.5654, 2.8027]]
    assert packed.linear(inputs).tolist() == torch.tensor(rounded).half().tolist()
    plain = Packed(replace(packed.format, outliers="none", threshold=0.0), 2, 4, packed.tensors)
    without = torch.tensor([[2.3387, 13.5639], [-1.5663, 2.7949]])
    # bitsandbytes' CPU code has a constant 1.8e-5 larger than 1 / 127^2.
    torch.testing.assert_close(plain.linear(inputs.float()), without, rtol=2e-5, atol=6e-5)


def test_halves_go_to_even_codes() -> None:
    assert quantise(torch.tensor([[0.5, -0.25, 1.0]]), torch.ones(1, 1)).tolist() == [[64, -32, 127]]
    assert quantise(torch.tensor([[62.5, -63.5, 127.0]]), torch.full((1, 1), 127.0)).tolist() == [[62, -64, 127]]


@pytest.mark.parametrize(
    ("outliers", "compat"), [("dynamic", False), ("static", False), ("none", False), ("dynamic", True), ("none", True)]
)
def test_zero_rows_give_zeros_and_the_bias(outliers: str, compat: bool) -> None:
    weight, inputs = case()
    weight[2], inputs[1] = 0, 0
    packed = pack(weight, inputs.abs().amax(0) if outliers == "static" else None, outliers=outliers, compat=compat)
    out = packed.linear(inputs)
    assert torch.equal(out[:, 2], torch.zeros(7))
    if outliers != "dynamic":
        assert torch.equal(out[1], torch.zeros(24))
    zeros = torch.zeros(2, 40)
    assert torch.equal(packed.linear(zeros), torch.zeros(2, 24))
    bias = torch.arange(24.0)
    assert torch.equal(packed.linear(zeros, bias), bias.expand(2, -1))


def test_tiny_rows_are_finite() -> None:
    packed = pack(torch.full((2, 3), 1e-40))
    assert bool(torch.isfinite(packed.linear(torch.full((1, 3), 1e-38))).all())


def test_a_threshold_nothing_reaches_changes_nothing() -> None:
    weight, inputs = case()
    assert torch.equal(pack(weight, threshold=20.5).linear(inputs), pack(weight, outliers="none").linear(inputs))
    assert not torch.equal(pack(weight, threshold=20.0).linear(inputs), pack(weight, outliers="none").linear(inputs))


def test_a_threshold_below_everything_leaves_the_dequantised_weight() -> None:
    weight, inputs = case()
    packed = pack(weight, threshold=1e-30)
    expected = inputs.double() @ packed.unpack().double().T
    assert torch.equal(packed.linear(inputs), expected.float())


def test_listing_every_column_leaves_the_16_bit_weight() -> None:
    weight, inputs = case()
    for outliers in ("dynamic", "static"):
        packed = pack(weight, inputs.abs().amax(0), outliers=outliers, threshold=1e-30, max_outlier_share=1.0)
        expected = inputs.double() @ weight.half().double().T
        torch.testing.assert_close(packed.linear(inputs), expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("outliers", ["dynamic", "static", "none"])
def test_permuting_features_changes_nothing(outliers: str) -> None:
    weight, inputs = case()
    largest = inputs.abs().amax(0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    knobs = {"outliers": outliers, "max_outlier_share": 0.05, "outlier_weights": "cached"}
    there = pack(weight, largest, **knobs).linear(inputs)
    back = pack(weight[:, order], largest[order], **knobs).linear(inputs[:, order])
    torch.testing.assert_close(there, back, rtol=1e-6, atol=1e-6)


def test_scaling_a_token_scales_its_int8_part() -> None:
    weight, inputs = case()
    packed = pack(weight, outliers="none")
    scaled = inputs.clone()
    scaled[2] *= 0.25
    before, after = packed.linear(inputs), packed.linear(scaled)
    assert torch.equal(after[2], 0.25 * before[2])
    assert torch.equal(after[3:], before[3:])


def test_rounding_errors_are_at_most_half_a_step() -> None:
    weight, inputs = case(rows=200, columns=300)
    packed = pack(weight, outliers="none")
    assert ((packed.unpack() - weight).abs() <= packed.tensors["absmax"].unsqueeze(1) / 254 * (1 + 1e-5)).all()
    codes, absmax, _ = split(packed, inputs)
    assert ((codes * absmax / 127 - inputs).abs() <= absmax / 254 * (1 + 1e-5)).all()


@pytest.mark.parametrize("seed", range(5))
def test_errors_are_ordered_as_in_the_error_model(seed: int) -> None:
    """W ~ N(0, 0.02^2), X ~ N(0, 1) with six columns in (-60, -35): constants for everything are worst, constants per
    row better, 16-bit outliers several times better, and again with 16-bit weights for them."""
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = 0.02 * torch.randn(512, 1024, generator=generator), torch.randn(256, 1024, generator=generator)
    loud = torch.randperm(1024, generator=generator)[:6]
    inputs[:, loud] = torch.empty(256, 6).uniform_(-60, -35, generator=generator)
    exact = inputs.double() @ weight.double().T
    largest = inputs.abs().amax(0)
    errors = [
        float((pack(weight, largest, **knobs).linear(inputs).double() - exact).norm() / exact.norm())
        for knobs in (
            {"outliers": "none", "granularity": "tensor"},
            {"outliers": "none", "granularity": "row"},
            {"outliers": "none"},
            {"outlier_weights": "int8"},
            {"outlier_weights": "cached"},
        )
    ]
    assert errors == sorted(errors, reverse=True)
    tensor, _, vector, decomposed, cached = errors
    assert tensor == pytest.approx(0.038, rel=0.15)
    assert vector == pytest.approx(0.035, rel=0.15)
    assert decomposed == pytest.approx(0.0082, rel=0.15)
    assert cached == pytest.approx(0.0030, rel=0.15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", ["static", "none"])
def test_a_token_alone_has_the_bits_it_has_in_a_batch(dtype: torch.dtype, outliers: str) -> None:
    weight, inputs = case(rows=64, columns=96, tokens=33)
    packed = pack(weight, inputs.abs().amax(0), outliers=outliers, max_outlier_share=0.05)
    together = packed.linear(inputs.to(dtype))
    assert torch.equal(together, torch.cat([packed.linear(row) for row in inputs.to(dtype).split(1)]))


def test_dynamic_columns_depend_on_the_batch() -> None:
    weight, inputs = case()
    packed = pack(weight)
    assert not torch.equal(packed.linear(inputs)[1], packed.linear(inputs[1]))
    assert split(packed, inputs)[2].tolist() == [3, 17]
    assert split(packed, inputs[1:])[2].tolist() == [17]


def test_columns_outside_the_cache_are_dequantised() -> None:
    weight, inputs = case()
    largest = torch.zeros(40)
    largest[17] = 9.0
    packed = pack(weight, largest)
    assert packed.tensors["outlier_index"].tolist() == [17]
    mixed = torch.stack([packed.unpack()[:, 3], weight[:, 17].half().float()])
    expected = int8_product(packed, inputs) + inputs[:, [3, 17]].double() @ mixed.double()
    assert torch.equal(packed.linear(inputs), expected.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (0, 40)])
@pytest.mark.parametrize("outliers", ["dynamic", "static", "none"])
def test_inputs_of_any_shape_and_dtype_are_left_alone(
    dtype: torch.dtype, shape: tuple[int, ...], outliers: str
) -> None:
    weight, samples = case()
    packed = pack(weight, samples.abs().amax(0), outliers=outliers)
    inputs = (4 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    before = inputs.clone()
    out = packed.linear(inputs, torch.ones(24))
    assert torch.equal(inputs, before)
    assert (out.shape, out.dtype) == ((*shape[:-1], 24), dtype)
    close = torch.nn.functional.linear(inputs.double(), weight.double()) + 1
    torch.testing.assert_close(out.double(), close, rtol=0.02, atol=0.15)


def test_a_bad_token_spoils_no_other() -> None:
    weight, inputs = case()
    packed = pack(weight)
    broken = inputs.clone()
    broken[4, 5] = float("nan")
    out, good = packed.linear(broken), packed.linear(inputs)
    assert bool(out[4].isnan().all())
    others = [0, 1, 2, 3, 5, 6]
    assert torch.equal(out[others], good[others])
    broken[4, 5] = float("inf")
    out = packed.linear(broken)
    assert not bool(torch.isfinite(out[4]).any())
    assert bool(torch.isfinite(out[others]).all())


@pytest.mark.parametrize("granularity", ["vector", "row", "tensor"])
def test_constants_are_per_row_or_one(granularity: str) -> None:
    weight, inputs = case()
    packed = pack(weight, outliers="none", granularity=granularity)
    assert packed.tensors["absmax"].shape == ((24,) if granularity == "vector" else (1,))
    absmax = split(packed, inputs)[1]
    assert absmax.shape == ((1, 1) if granularity == "tensor" else (7, 1))
    assert torch.equal(packed.linear(inputs), int8_product(packed, inputs).float())
    assert packed.linear(inputs[:0]).shape == (0, 24)


def test_compat_counts_small_values_of_outlier_columns_and_rounds_through_float16() -> None:
    weight = torch.ones(1, 3)
    inputs = torch.tensor([[1.0, 5.0, 2.0], [1.0, 7.0, 2.0]])
    assert split(pack(weight, compat=True), inputs)[1].tolist() == [[5.0], [2.0]]
    assert split(pack(weight), inputs)[1].tolist() == [[2.0], [2.0]]
    almost = torch.tensor([[1.0, 5.999, 1.0]])
    assert split(pack(weight, compat=True), almost)[2].tolist() == [1]
    assert split(pack(weight), almost)[2].tolist() == []
    assert split(pack(weight, compat=True), almost[:, [0, 0, 2]])[2].tolist() == []


@pytest.mark.parametrize("outliers", ["dynamic", "static", "none"])
def test_rows_of_an_embedding_are_decoded_alone(outliers: str) -> None:
    weight, inputs = case()
    packed = pack(weight, inputs.abs().amax(0), outliers=outliers)
    index = torch.tensor([5, 0, 5, 23])
    rows = packed.format.unpack_rows(packed.tensors, 24, 40, index)
    assert torch.equal(rows, packed.unpack()[index])
    assert packed.format.unpack_rows(packed.tensors, 24, 40, index[:0]).shape == (0, 40)


@pytest.mark.parametrize("outliers", ["dynamic", "static", "none"])
def test_gradients_pass_as_if_nothing_were_rounded(outliers: str) -> None:
    weight, inputs = case()
    packed = pack(weight, inputs.abs().amax(0), outliers=outliers)
    learned = inputs.reshape(1, 7, 40).clone().requires_grad_()
    bias = torch.zeros(24, requires_grad=True)
    out = packed.linear(learned, bias)
    assert torch.equal(out.detach()[0], packed.linear(inputs))
    factor = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    (out[0] * factor).sum().backward()
    assert learned.grad is not None and bias.grad is not None
    torch.testing.assert_close(learned.grad[0], factor @ packed.unpack())
    torch.testing.assert_close(bias.grad, factor.sum(0))
    one = inputs[0].clone().requires_grad_()
    packed.linear(one).sum().backward()
    assert one.grad is not None
    torch.testing.assert_close(one.grad, packed.unpack().sum(0))


def test_bytes_of_a_large_layer() -> None:
    assert OutlierInt8(6.0, "dynamic").bytes(4096, 11008) == 45_088_768 + 4 * 4096
    assert OutlierInt8(6.0, "dynamic").bytes(11008, 4096) == 45_088_768 + 44_032
    assert OutlierInt8(6.0, "dynamic", 7, "float16").bytes(11008, 4096) == 45_088_768 + 44_032 + 7 * (2 * 11008 + 4)
    assert OutlierInt8(0.0, "static", 7).bytes(11008, 4096) == 45_088_768 + 44_032 + 7 * 4


@pytest.mark.parametrize(
    "layout",
    [
        OutlierInt8(6.0, "dynamic"),
        OutlierInt8(4.5, "dynamic", 3, "bfloat16"),
        OutlierInt8(0.0, "static", 3, "float16"),
        OutlierInt8(0.0, "none", granularity="tensor"),
        OutlierInt8(6.0, "dynamic", compat=True),
    ],
)
def test_json_round_trip(layout: OutlierInt8) -> None:
    assert format_from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": 6.0, "outliers": "sometimes"}, "outliers must be one of dynamic, static, none, got 'sometimes'"),
        ({"threshold": 0.0, "outliers": "dynamic"}, "threshold must be positive"),
        ({"threshold": 6.0, "outliers": "dynamic", "stored_columns": -1}, "stored_columns is -1"),
        ({"threshold": 0.0, "outliers": "none", "stored_columns": 2}, "stored_columns is 2 with outliers 'none'"),
        ({"threshold": 6.0, "outliers": "dynamic", "stored_columns": 2}, "need no list"),
        ({"threshold": 6.0, "outliers": "dynamic", "stored_dtype": "float64"}, "stored_dtype must be one of"),
        ({"threshold": 6.0, "outliers": "dynamic", "granularity": "group"}, "granularity must be one of"),
    ],
)
def test_a_damaged_description_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        format_from_json({"format": "outlier-int8", **fields})


def test_dequantised_codes_are_what_is_stored() -> None:
    codes = torch.tensor([[-127, 0, 127], [1, 2, 3]], dtype=torch.int8)
    assert dequantise(codes, torch.tensor([2.0, 127.0])).tolist() == [[-2, 0, 2], [1, 2, 3]]
