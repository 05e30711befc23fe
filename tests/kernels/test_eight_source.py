"""The kernel of few vectors and 8-bit weights, thread by thread on a CPU and on a GPU, against the plain meaning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.emulator.build import COMPILER, built_call, run_call
from whit.formats.base import Format, Packed
from whit.formats.outlier_int8 import DTYPES, OutlierInt8
from whit.formats.quantised_inputs import QuantisedInputs
from whit.formats.scaled_codes import ScaledCodes
from whit.kernels import decode_ops, explain, packed_linear
from whit.kernels.cuda_inputs import Normed, products_of
from whit.kernels.cuda_step import input_options
from whit.kernels.eight_cuda import NAME, multiply_eight, wins
from whit.kernels.eight_few import HOPPER, MOST_VECTORS, few_options, few_source, fits_few, place_few
from whit.kernels.eight_layer import EightBit, eight_bit_of
from whit.kernels.eight_shapes import FewKind, FewShape, few_shapes, likeliest

MAP = (
    "TensorMap map{{(u64)b[1], (u64)n[6] / 2, (u64)n[5]}}; float numbers[2]; memcpy(numbers, b[7], 8);"
    " Work w{b[2], (const float*)b[3], (const int*)b[4], (const u16*)b[8], b[5], (u16*)b[6],"
    " n[4], n[5], n[6], n[7], n[8], n[9], numbers[0], numbers[1]};"
)
GIVEN = MAP + "eight((const u16*)b[0], map, w)"
MADE = MAP + ("const Input input = {(u16*)b[0], (u16*)b[9], (u16*)b[10], (u16*)b[11], 1e-5f}; eight(input, map, w)")
INT8, E4M3, E5M2 = (ScaledCodes(system, 0) for system in ("int8", "e4m3fn", "e5m2"))
CASES: list[tuple[Format, torch.dtype, int, FewShape]] = [
    (OutlierInt8(6.0, "dynamic"), torch.bfloat16, 3, FewShape(2, 256, 3, 64, patient=True)),
    (OutlierInt8(6.0, "dynamic"), torch.float16, 1, FewShape(1, 128, 3, 64)),
    (OutlierInt8(6.0, "dynamic"), torch.float16, 18, FewShape(4, 128, 3, 64)),
    (OutlierInt8(6.0, "dynamic"), torch.bfloat16, 8, FewShape(1, 128, 2, 128, patient=True)),
    (OutlierInt8(0.0, "static", 9), torch.float16, 12, FewShape(2, 128, 3, 64)),
    (OutlierInt8(6.0, "dynamic", 4, "bfloat16"), torch.bfloat16, 11, FewShape(2, 128, 3, 64)),
    (OutlierInt8(0.0, "static", 19, "float16"), torch.float16, 2, FewShape(4, 128, 3, 64)),
    (OutlierInt8(0.0, "none"), torch.bfloat16, 9, FewShape(4, 128, 2, 64)),
    (QuantisedInputs(INT8, "int8", False), torch.bfloat16, 17, FewShape(2, 128, 3, 64)),
    (QuantisedInputs(ScaledCodes("int8", -1), "int8", True), torch.float16, 2, FewShape(2, 128, 3, 64)),
    (QuantisedInputs(E4M3, "e4m3fn", False), torch.bfloat16, 2, FewShape(2, 256, 3, 64)),
    (QuantisedInputs(E5M2, "e4m3", True), torch.float16, 9, FewShape(1, 128, 3, 64)),
    (INT8, torch.float16, 2, FewShape(1, 256, 3, 64, patient=True)),
    (INT8, torch.bfloat16, 9, FewShape(2, 128, 3, 64)),
    (INT8, torch.bfloat16, 1, FewShape(1, 128, 3, 64)),
    (E4M3, torch.bfloat16, 1, FewShape(2, 256, 3, 64)),
    (E4M3, torch.bfloat16, 3, FewShape(2, 256, 3, 64)),
    (E4M3, torch.float16, 9, FewShape(1, 256, 3, 64)),
    (E5M2, torch.bfloat16, 2, FewShape(1, 256, 3, 64)),
    (E5M2, torch.bfloat16, 17, FewShape(1, 128, 2, 64)),
    (ScaledCodes("e5m2", -1), torch.float16, 1, FewShape(1, 128, 3, 64)),
]
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper"
)


def inputs(vectors: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Normal, with loud columns, one of them loud for one vector alone; the last of several vectors is zero."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(vectors, columns, generator=generator).clamp(-5, 5)
    x[:, 3::190] *= 20
    x[0, 5] = 9.0
    if vectors > 2:
        x[-1] = 0
    return x.to(dtype)


def weight(layout: Format, rows: int, columns: int) -> Packed:
    """Random tensors of a layout."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(layout, QuantisedInputs):
        stored = torch.tensor([3.0 / layout.numbers.maximum]) if layout.static else None
        return layout.pack(weight(layout.weight, rows, columns), stored)
    if isinstance(layout, ScaledCodes):
        scales = torch.rand(layout.scale_shape(rows, columns), generator=generator) + 2
        return layout.pack(torch.randn(rows, columns, generator=generator), scales / layout.numbers.maximum)
    assert isinstance(layout, OutlierInt8)
    tensors = {
        "codes": torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator),
        "absmax": torch.rand(rows, generator=generator) + 0.5,
    }
    if layout.stored_columns:
        tensors["outlier_index"] = torch.arange(layout.stored_columns, dtype=torch.int32) * 19 + 3
    if layout.stored_dtype != "int8":
        cached = torch.randn(rows, layout.stored_columns, generator=generator)
        tensors["outlier_weight"] = cached.to(DTYPES[layout.stored_dtype])
    return Packed(layout, rows, columns, tensors)


def bound(x: Tensor, packed: Packed, expected: Tensor) -> Tensor:
    """Of the difference from the plain meaning: those of `outlier_int8` and `eight_bit`, which are for any kernel."""
    size = x.double().abs() @ packed.unpack().double().abs().T
    layout, unit = packed.format, torch.finfo(x.dtype).eps
    share = unit + 2.0**-18
    if isinstance(layout, QuantisedInputs):
        share = max(packed.columns, 64) * 2.0**-24 if layout.system == "int8" else 2.0**-9
    elif isinstance(layout, OutlierInt8):
        share = 2.0**-18
    return unit * expected.double().abs() + share * size + 1e-12


def emulated(
    x: Tensor, layer: EightBit, shape: FewShape, bias: Tensor | None, folder: Path, norm: tuple[Tensor, ...] = ()
) -> list[Tensor]:
    """Results of the source, with threads in both orders; `norm`: another vector to add, and the norm's weight."""
    (vectors, columns), rows = x.shape, len(layer.codes)
    launch = place_few(layer.kind, vectors, rows, columns, 5, HOPPER, shape, bool(norm))
    assert launch is not None
    options = (*few_options(layer.kind, launch, vectors, early=False), f"-DCLUSTER={shape.splits}")
    if norm:
        options = (*options, *input_options(True, columns, shape.threads))
    program = built_call("eight", MADE if norm else GIVEN, few_source(), options, folder)
    results = []
    for descending in (0, 1):
        out = torch.full((vectors, rows), torch.nan, dtype=x.dtype)
        tensors = [x, layer.codes, layer.scales, layer.input_scale, layer.index, bias, out]
        tensors += [
            torch.tensor([layer.threshold, layer.maximum]),
            layer.cached,
            *norm,
            *([torch.empty_like(x)] if norm else []),
        ]
        stored = 0 if layer.index is None else len(layer.index)
        numbers = [vectors, rows, columns, int(len(layer.scales) > 1), stored, launch.span]
        blocks = [launch.clusters * shape.splits, shape.threads, -(-launch.shared // 1024) * 1024, descending]
        run_call(program, tensors, blocks, numbers)
        results.append(out)
    return results


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize(("layout", "dtype", "vectors", "shape"), CASES, ids=str)
def test_sources(layout: Format, dtype: torch.dtype, vectors: int, shape: FewShape, tmp_path: Path) -> None:
    rows, columns = (37, 784) if shape.splits < 4 else (33, 400)
    packed, x = weight(layout, rows, columns), inputs(vectors, columns, dtype)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(2)).to(dtype) if vectors % 2 else None
    layer = eight_bit_of(packed, dtype == torch.bfloat16)
    assert layer is not None
    results = emulated(x, layer, shape, bias, tmp_path)
    expected = packed.linear(x, bias)
    given = 0 if bias is None else bias.double().abs() * 2.0**-21
    assert ((results[0].double() - expected.double()).abs() <= bound(x, packed, expected) + given).all()
    assert torch.equal(*results)


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("layout", [OutlierInt8(6.0, "dynamic"), E4M3], ids=str)
def test_source_that_makes_its_input(layout: Format, tmp_path: Path) -> None:
    columns, dtype = 656, torch.bfloat16
    packed = weight(layout, 33, columns)
    x, second = inputs(1, columns, dtype), 0.1 * inputs(1, columns, dtype)
    norm = torch.rand(columns, generator=torch.Generator().manual_seed(4)).to(dtype)
    _, made = decode_ops.add_rms_norm(x, second, norm, 1e-5)
    layer = eight_bit_of(packed, True)
    assert layer is not None
    results = emulated(x, layer, FewShape(2, 128, 2, 64), None, tmp_path, (second, norm))
    expected = packed.linear(made)
    unit = torch.finfo(dtype).eps * made.double().abs() @ packed.unpack().double().abs().T
    limit = bound(made, packed, expected) + (2 if isinstance(layout, OutlierInt8) else 1) * unit
    assert ((results[0].double() - expected.double()).abs() <= limit).all()
    assert torch.equal(*results)


@pytest.mark.parametrize("vectors", [1, 2, 16, 17, 32])
@pytest.mark.parametrize("columns", [16, 4096, 11008, 14336])
def test_there_is_a_launch_for_what_is_promised(vectors: int, columns: int) -> None:
    for kind in (FewKind(0, True, 1, 1, True), FewKind(1, True)):
        shapes = likeliest(kind, vectors, 4096, columns)
        for rows in (1, 4096, 128_256):
            placed = [place_few(kind, vectors, rows, columns, 132, HOPPER, shape) for shape in shapes]
            launches = [launch for launch in placed if launch is not None]
            assert bool(launches) or not fits_few(kind, vectors, columns)
            for launch in launches:
                assert launch.shared <= HOPPER and launch.span * launch.shape.splits >= columns
    assert set(shapes) == set(few_shapes(vectors)) and vectors <= MOST_VECTORS


def test_what_the_kernel_does_not_know_is_left_to_others() -> None:
    for layout in (
        ScaledCodes("int8", 16),
        ScaledCodes("e3m4", 0),
        QuantisedInputs(INT8, "e4m3fn", False),
        QuantisedInputs(E4M3, "e5m2", False),
    ):
        assert eight_bit_of(weight(layout, 8, 64), True) is None


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("layout", "dtype", "vectors", "shape"), CASES, ids=str)
def test_kernels(layout: Format, dtype: torch.dtype, vectors: int, shape: FewShape) -> None:
    for rows, columns in ((37, 784), (1000, 4112)):
        packed = weight(layout, rows, columns).to("cuda")
        bias = torch.randn(rows, device="cuda").to(dtype)
        layer = eight_bit_of(packed, dtype == torch.bfloat16)
        assert layer is not None
        for count in {vectors, 16}:
            x = inputs(count, columns, dtype).cuda()
            assert (explain(x, packed) == NAME) == wins(layer.kind, count)
            expected, actual = packed.linear(x, bias), multiply_eight(x, *layer.arguments(bias))
            limit = bound(x, packed, expected) + bias.double().abs() * torch.finfo(dtype).eps
            assert ((actual.double() - expected.double()).abs() <= limit).all()
            assert torch.equal(actual, multiply_eight(x, *layer.arguments(bias)))
        total, second = inputs(1, columns, dtype).cuda(), inputs(1, columns, dtype).cuda() / 10
        norm = torch.rand(columns, device="cuda").to(dtype)
        kept, made = decode_ops.add_rms_norm(total, second, norm, 1e-5)
        found = products_of(Normed(total, second, norm, 1e-5), [packed])
        assert (found is None) == (not wins(layer.kind, 1))
        if found is None:
            continue
        assert torch.equal(found[0], kept)
        expected = packed.linear(made)
        unit = 3 * torch.finfo(dtype).eps * made.double().abs() @ packed.unpack().double().abs().T
        assert ((found[1][0].double() - expected.double()).abs() <= bound(made, packed, expected) + unit).all()


@pytest.mark.gpu
@needs_gpu
def test_compiled_and_captured() -> None:
    packed = weight(OutlierInt8(6.0, "dynamic"), 256, 1024).to("cuda")
    x = inputs(5, 1024, torch.bfloat16).cuda()
    expected = packed_linear(x, packed)
    assert torch.equal(torch.compile(packed_linear, fullgraph=True, backend="aot_eager")(x, packed), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = packed_linear(x, packed)
    graph.replay()
    assert torch.equal(out, expected)
