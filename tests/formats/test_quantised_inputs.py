import pytest
import torch

from whit.errors import ModelError
from whit.formats import format_from_json
from whit.formats.minifloat import number_system
from whit.formats.quantised_inputs import QuantisedInputs
from whit.formats.scaled_codes import ScaledCodes


def layer(system="int8", static=False, group=0, weight="int8", rows=6, columns=20, weight_group=0):
    generator = torch.Generator().manual_seed(0)
    inner = ScaledCodes(weight, weight_group)
    scales = torch.rand(inner.scale_shape(rows, columns), generator=generator) + 0.1
    packed = inner.pack(torch.randn(rows, columns, generator=generator), scales)
    layout = QuantisedInputs(inner, system, static, group)
    groups = -(-columns // (group or columns))
    return layout.pack(packed, torch.rand(groups, generator=generator) * 0.02 + 0.01 if static else None)


@pytest.mark.parametrize("system", ["int8", "e4m3fn", "e3m4", "e2m3", "int4"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_is_the_product_of_rounded_inputs(system, static, group, dtype):
    packed = layer(system, static, group)
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randn(3, 4, 20, generator=generator).to(dtype), torch.randn(6, generator=generator)
    numbers, rounded = number_system(system), torch.empty(3, 4, 20)
    for start in range(0, 20, group or 20):
        part = x[..., start : start + (group or 20)].float()
        scale = part.abs().amax(-1, keepdim=True) / numbers.maximum
        if static:
            scale = packed.tensors["input_scales"][start // (group or 20)]
        rounded[..., start : start + (group or 20)] = numbers.round(part / scale) * scale
    expected = (rounded @ packed.unpack().T + bias).to(dtype)
    out = packed.linear(x, bias)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-5)
    assert (rounded != x.float()).any()


def test_each_token_has_its_own_scale():
    packed = layer()
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(2))
    one_by_one = torch.cat(
        [packed.linear(row.unsqueeze(0)) for row in x * torch.tensor([1, 50, 0, 1e-6, 3]).unsqueeze(1)]
    )
    together = packed.linear(x * torch.tensor([1, 50, 0, 1e-6, 3]).unsqueeze(1))
    torch.testing.assert_close(together, one_by_one)
    assert (together[2] == 0).all()
    assert together[3].abs().max() > 0


def test_a_stored_scale_saturates():
    packed = layer(static=True)
    limit = 127 * packed.tensors["input_scales"][0]
    x = torch.full((1, 20), 2.0) * limit
    torch.testing.assert_close(packed.linear(x), packed.linear(x / 2))


def test_a_nan_spreads_over_its_token_alone():
    x = torch.ones(2, 20)
    x[0, 3] = torch.nan
    out = layer().linear(x)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_no_tokens():
    assert layer().linear(torch.zeros(0, 20)).shape == (0, 6)


def test_gradients_pass_straight_through_what_is_in_range():
    packed = layer(static=True)
    limit = float(127 * packed.tensors["input_scales"][0])
    x = torch.linspace(-1.5, 1.5, 20).unsqueeze(0) * limit
    x.requires_grad_()
    out = packed.linear(x)
    assert torch.equal(out, packed.linear(x.detach()))
    out.sum().backward()
    expected = packed.unpack().sum(0) * (x[0].abs() < limit)
    torch.testing.assert_close(x.grad[0], expected)


def test_the_weight_and_its_rows_are_those_of_the_inner_layout():
    packed = layer(weight="e2m1fn", weight_group=8)
    inner = packed.format.inner(packed.tensors, 6, 20)
    assert torch.equal(packed.unpack(), inner.unpack())
    index = torch.tensor([4, 4, 0])
    assert torch.equal(packed.format.unpack_rows(packed.tensors, 6, 20, index), inner.unpack()[index])


def test_only_a_stored_scale_takes_bytes():
    inner = ScaledCodes("int8", 0).bytes(6, 20)
    assert layer().stored_bytes() == inner
    assert layer(static=True).stored_bytes() == inner + 4
    assert layer(static=True, group=8).stored_bytes() == inner + 12
    with pytest.raises(ValueError, match="static input scales"):
        QuantisedInputs(ScaledCodes("int8", 0), "int8", True).pack(layer().format.inner(layer().tensors, 6, 20))


def test_json_round_trip_and_bad_fields():
    layout = QuantisedInputs(ScaledCodes("int4", 32), "e4m3fn", True, 16)
    assert layout.changes_inputs
    assert format_from_json(layout.to_json()) == layout
    for fields, message in [
        ({"weight": layout.to_json(), "system": "int8", "static": False}, "leaves its inputs alone"),
        ({"weight": 3, "system": "int8", "static": False}, "must be a layout"),
        ({"weight": ScaledCodes("int8", 0).to_json(), "system": "int80", "static": False}, "'int80'"),
        (
            {"weight": ScaledCodes("int8", 0).to_json(), "system": "int8", "static": True, "group_size": -1},
            "group_size",
        ),
    ]:
        with pytest.raises(ModelError, match=message):
            format_from_json({"format": "quantised-inputs", **fields})
