"""INT8 and FP8 layers in Triton against their plain meaning, within the bounds stated in `whit/kernels/eight_bit.py`.

As in `test_outlier_int8_kernels.py`, kernels run in Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import assert_interpreted_tests_pass, needs_interpreter
from whit.formats import Packed
from whit.formats.quantised_inputs import QuantisedInputs
from whit.formats.scaled_codes import ScaledCodes
from whit.kernels import explain, packed_linear
from whit.kernels.eight_cuda import NAME as FEW_NAME
from whit.kernels.launching import interpreted

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a CUDA device of compute capability 8.9",
)
PAIRS = [("int8", "int8"), ("e4m3fn", "e4m3fn"), ("e4m3", "e4m3fn"), ("e5m2", "e4m3fn"), ("e4m3fn", "e5m2")]
ALONE = [("int8", 0), ("int8", -1), ("e4m3fn", 0), ("e5m2", 0), ("e3m4", 0), ("e2m5fn", 0), ("e4m3fn", 16)]
ALONE += [("int8", 24), ("int4", 16), ("int4", 0), ("e2m1fn", 0), ("e2m1fn", 32), ("e3m0", 64), ("e1m2fn", -1)]


def weight_only(system: str, group: int, rows: int, columns: int) -> Packed:
    generator = torch.Generator().manual_seed(0)
    layout = ScaledCodes(system, group)
    values = torch.randn(rows, columns, generator=generator)
    scales = torch.rand(layout.scale_shape(rows, columns), generator=generator) * 0.1 + 2 / layout.numbers.maximum
    return layout.pack(values, scales)


def rounded(pair: tuple[str, str], static: bool, group: int, rows: int, columns: int) -> Packed:
    layout = QuantisedInputs(ScaledCodes(pair[1], group), pair[0], static)
    stored = torch.tensor([2.5 / layout.numbers.maximum]) if static else None
    return layout.pack(weight_only(pair[1], group, rows, columns), stored)


def inputs(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(tokens, columns, generator=generator) * torch.logspace(-2, 0, tokens).unsqueeze(1)).to(dtype)


def excess(x: Tensor, packed: Packed, bias: Tensor | None) -> float:
    """Largest difference from the plain meaning over the stated bound. The interpreter cuts off bfloat16."""
    out, plain = packed_linear(x, packed, bias), packed.linear(x, bias)
    assert out.shape == plain.shape and out.dtype == plain.dtype == x.dtype
    spacing = torch.finfo(x.dtype).eps * (2 if interpreted() and x.dtype == torch.bfloat16 else 1)
    given = 0 if bias is None else bias.abs().float()
    size = x.float().abs() @ packed.unpack().abs().T + given
    layout = packed.format
    if not isinstance(layout, QuantisedInputs):
        bound = torch.finfo(x.dtype).eps + 2.0**-18
    else:
        bound = max(packed.columns, 64) * 2.0**-24 if layout.system == "int8" else 2.0**-9
    allowed = bound * size + spacing * (plain.float().abs() + given) + 1e-30
    return float(((out.float() - plain.float()).abs() / allowed).nan_to_num(nan=torch.inf).max())


@needs_interpreter
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("group", [0, -1])
def test_interpreted_kernels_round_inputs(pair: tuple[str, str], static: bool, group: int) -> None:
    for rows, columns, tokens, dtype in [(17, 64, 1, torch.float16), (40, 260, 1, torch.bfloat16)]:
        packed = rounded(pair, static, group, rows, columns)
        bias = torch.randn(rows, generator=torch.Generator().manual_seed(2))
        assert explain(inputs(tokens, columns, dtype), packed) == "fused 8-bit (Triton)"
        assert excess(inputs(tokens, columns, dtype), packed, bias) <= 1
    if pair == ("int8", "int8"):  # the interpreter has no product of FP8 numbers
        packed = rounded(pair, static, group, 33, 70)
        assert explain(inputs(5, 70, torch.float16), packed) == "fused 8-bit (Triton)"
        assert excess(inputs(5, 70, torch.float16), packed, None) <= 1


@needs_interpreter
@pytest.mark.parametrize(("system", "group"), ALONE)
def test_interpreted_kernels_with_weights_alone(system: str, group: int) -> None:
    native = system in ("int8", "e4m3fn", "e5m2") and group <= 0
    for tokens in (1, 3):
        packed = weight_only(system, group, 33, 72)
        bias = torch.randn(33, generator=torch.Generator().manual_seed(2))
        x = inputs(tokens, 72, torch.float16)
        one = tokens == 1 and group != 24  # groups of the kernel for one token are powers of two
        assert explain(x, packed) == ("few vectors (Triton)" if native or one else "decode + matmul (Triton)")
        if not native or system == "int8" or tokens == 1:  # the interpreter has no product of FP8 numbers
            assert excess(x, packed, bias) <= 1


@needs_interpreter
def test_interpreted_kernels_decode_what_unpacking_gives() -> None:
    for system, group in ALONE:
        packed = weight_only(system, group, 19, 50)
        layout = packed.format
        assert isinstance(layout, ScaledCodes)
        weight = torch.ops.whit.decoded_codes(
            packed.tensors["codes"], packed.tensors["scales"], 19, 50, layout.group_size, system, torch.float16
        )
        assert torch.equal(weight, packed.unpack().half())


@needs_interpreter
def test_interpreted_kernels_spread_nan() -> None:
    for pair in PAIRS:
        x = torch.ones(1, 48, dtype=torch.float16)
        x[0, 5] = torch.nan
        assert bool(packed_linear(x, rounded(pair, False, 0, 9, 48)).isnan().all())
        assert bool((packed_linear(torch.zeros_like(x), rounded(pair, False, 0, 9, 48)) == 0).all())


@needs_interpreter
def test_interpreted_kernels_are_traced_without_a_break() -> None:
    compiled = torch.compile(packed_linear, fullgraph=True, backend="aot_eager")
    for packed in (rounded(PAIRS[0], False, 0, 9, 48), weight_only("e4m3fn", 0, 9, 48)):
        x = inputs(1, 48, torch.float16)
        assert torch.equal(compiled(x, packed), packed_linear(x, packed))


@pytest.mark.skipif(interpreted(), reason="this is the interpreter's process")
def test_kernels_in_the_interpreter() -> None:
    assert_interpreted_tests_pass(__file__)


def test_what_the_kernels_leave_alone() -> None:
    packed = rounded(("int8", "int8"), False, 0, 16, 32)
    for x in (torch.ones(2, 32), torch.ones(0, 32).half(), torch.ones(2, 32).half().requires_grad_()):
        assert explain(x, packed) != "fused 8-bit (Triton)"
        assert explain(x, weight_only("int8", 0, 16, 32)) == "plain"
    assert explain(torch.ones(2, 32).half(), weight_only("int6", 0, 16, 32)) == "plain"
    grouped = QuantisedInputs(ScaledCodes("int8", 16), "int8", False).pack(weight_only("int8", 16, 16, 32))
    assert explain(torch.ones(2, 32).half(), grouped) == "plain"


GPU_SHAPES = [(33, 200, torch.float16), (528, 4096, torch.bfloat16)]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("rows", "columns", "dtype"), GPU_SHAPES)
def test_rounded_inputs_on_a_gpu(pair: tuple[str, str], rows: int, columns: int, dtype: torch.dtype) -> None:
    packed = rounded(pair, rows == 33, -int(rows == 33), rows, columns).to("cuda")
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(2)).cuda()
    for tokens in (1, 17, 300):
        x = inputs(tokens, columns, dtype).cuda()
        if tokens == 1 or pair[0][:4] == pair[1][:4]:
            hopper = torch.cuda.get_device_capability() == (9, 0)
            wide = hopper and (tokens, rows) == (300, 528) and pair == ("int8", "int8")
            few = hopper and tokens == 1 and rows == 528 and pair[0] in ("int8", "e4m3fn", "e4m3")
            assert explain(x, packed) == ("fused 8-bit (cuda)" if wide else FEW_NAME if few else "fused 8-bit (Triton)")
            assert excess(x, packed, bias) <= 1, tokens
            assert excess(x, packed, bias.to(dtype)) <= 1, tokens


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("system", "group"), ALONE)
def test_weights_alone_on_a_gpu(system: str, group: int) -> None:
    for rows, columns, dtype in GPU_SHAPES:
        packed = weight_only(system, group, rows, columns).to("cuda")
        bias = torch.randn(rows, generator=torch.Generator().manual_seed(2)).cuda()
        for tokens in (1, 17, 100):
            x = inputs(tokens, columns, dtype).cuda()
            hopper = torch.cuda.get_device_capability() == (9, 0)
            few = hopper and rows == 528 and tokens < 17 and system in ("int8", "e4m3fn", "e5m2") and group <= 0
            assert explain(x, packed) == FEW_NAME if few else explain(x, packed).endswith("(Triton)")
            assert excess(x, packed, bias) <= 1, (rows, tokens)


@pytest.mark.gpu
@needs_gpu
def test_graphs_and_compilation_on_a_gpu() -> None:
    for packed in (rounded(("e4m3fn", "e4m3fn"), False, 0, 256, 1024), weight_only("e4m3fn", 0, 256, 1024)):
        packed = packed.to("cuda")
        for tokens in (1, 100):
            x = inputs(tokens, 1024, torch.bfloat16).cuda()
            expected = packed_linear(x, packed)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = packed_linear(x, packed)
            graph.replay()
            assert torch.equal(out, expected)
            assert torch.equal(torch.compile(packed_linear, fullgraph=True, backend="aot_eager")(x, packed), expected)
