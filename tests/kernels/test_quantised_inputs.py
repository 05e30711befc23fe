"""Products of codes on 8-bit units mean what the plain product of the numbers means, within the stated bound."""

import pytest
import torch

from whit.formats.quantised_inputs import QuantisedInputs
from whit.formats.scaled_codes import ScaledCodes
from whit.kernels import explain, packed_linear
from whit.kernels import quantised_inputs as units
from whit.kernels.linear import choose
from whit.kernels.quantised_inputs import E4M3, E5M2, float8_linear, int8_linear, unit_for

INT8_PAIRS = [("int8", "int8"), ("e2m5", "int8"), ("int8", "e2m1fn"), ("int6", "int4"), ("e2m3", "e2m5")]
FLOAT8_PAIRS = [("e4m3fn", "e4m3fn"), ("e4m3", "e4m3fn"), ("e5m2", "e4m3"), ("e4m3fn", "e5m2"), ("e4m3fn", "e2m1fn")]
FLOAT8_PAIRS += [("e3m2", "e4m3fn"), ("e5m2", "int4")]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2.0**-7}


def layer(inputs, weights, static=False, weight_group=0, input_group=0, rows=32, columns=48, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    inner = ScaledCodes(weights, weight_group)
    values = torch.randn(rows, columns, generator=generator)
    scales = torch.rand(inner.scale_shape(rows, columns), generator=generator) * 0.1 + 1 / inner.numbers.maximum
    layout = QuantisedInputs(inner, inputs, static, input_group)
    stored = torch.tensor([2.5 / layout.numbers.maximum]) if static else None
    return layout.pack(inner.pack(values, scales), stored).to(device)


def difference(fast, x, packed, bias):
    """Largest difference from the plain meaning, relative to sum |x_j w_j| and the bias."""
    out, plain = fast(x, packed, bias), packed.linear(x, bias)
    assert out.shape == plain.shape
    assert out.dtype == plain.dtype == x.dtype
    size = x.float().abs() @ packed.unpack().abs().T + (0 if bias is None else bias.abs())
    return float(((out.float() - plain.float()).abs() / size).max())


@pytest.mark.parametrize("pair", [*INT8_PAIRS, *FLOAT8_PAIRS])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("weight_group", [0, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_codes_give_the_plain_meaning(pair, static, weight_group, dtype, with_bias):
    packed = layer(*pair, static, weight_group)
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(2, 5, 48, generator=generator) * torch.logspace(-2, 0, 5).unsqueeze(1)).to(dtype)
    bias = torch.randn(32, generator=generator) if with_bias else None
    unit = unit_for(*pair)
    fast = int8_linear if unit == (torch.int8, torch.int8) else float8_linear
    assert difference(fast, x, packed, bias) < TOLERANCE[dtype]


def test_which_pairs_a_unit_can_multiply():
    assert all(unit_for(*pair) == (torch.int8, torch.int8) for pair in INT8_PAIRS)
    assert {unit_for(*pair) for pair in FLOAT8_PAIRS} == {(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)}
    for pair in [("e3m4", "e3m4"), ("int8", "e4m3"), ("e4m3fn", "int8"), ("e5m2", "e5m2"), ("e2m5fn", "int8")]:
        assert unit_for(*pair) is None


def test_a_cpu_with_int8_dot_products_uses_them(monkeypatch):
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(2))
    packed = layer("int8", "int8")
    monkeypatch.setattr(units, "multiplies_int8", lambda device: True)
    assert explain(x, packed) == "int8"
    assert choose(x, packed).linear is int8_linear
    torch.testing.assert_close(packed_linear(x, packed), packed.linear(x), rtol=1e-5, atol=1e-5)
    for other in (
        layer("int8", "int8", weight_group=16),
        layer("int8", "int8", input_group=16),
        layer("e4m3fn", "e4m3fn"),
        layer("int8", "e4m3fn"),
    ):
        assert explain(x, other) == "plain"
        assert torch.equal(packed_linear(x, other), other.linear(x))
    assert explain(x[:0], packed) == "plain"
    assert explain(x.clone().requires_grad_(), packed) == "plain"
    monkeypatch.setattr(units, "multiplies_int8", lambda device: False)
    assert explain(x, packed) == "plain"


def test_a_nan_spreads_over_its_token():
    x = torch.ones(2, 48)
    x[0, 5] = torch.nan
    out = int8_linear(x, layer("int8", "int8"), None)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pair", [*INT8_PAIRS, *FLOAT8_PAIRS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_units_of_a_gpu_give_the_plain_meaning(pair, dtype):
    float8 = unit_for(*pair) != (torch.int8, torch.int8)
    if float8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8 units")
    bias = torch.randn(64, generator=torch.Generator().manual_seed(4)).cuda()
    for static, weight_group, tokens in [(False, 0, 1), (False, -1, 17), (True, 0, 200), (True, -1, 5)]:
        packed = layer(*pair, static, weight_group, rows=64, columns=512, device="cuda")
        x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(3)).to("cuda", dtype)
        if dtype == torch.float32:
            assert explain(x, packed) == ("float8" if float8 else "int8")
        assert difference(float8_linear if float8 else int8_linear, x, packed, bias) < max(
            TOLERANCE[dtype], 2.0**-9 if float8 else 0
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_odd_shapes_on_a_gpu():
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(5)).cuda()
    for pair, name in ((("int8", "int8"), "int8"), (("e4m3fn", "e4m3fn"), "plain")):
        packed = layer(*pair, rows=30, columns=50, device="cuda")
        assert explain(x, packed) == name
        assert difference(packed_linear, x, packed, None) < 1e-6
