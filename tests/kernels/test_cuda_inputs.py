"""Products that make their input: on the CPU emulator and on a GPU against an op of decoding and a product."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.emulator import build
from tests.kernels.test_cuda_kernels import error_bound, inputs, random_packed, unit_columns
from whit.formats.base import Format, Packed
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.formats.signed_levels import signed_levels
from whit.formats.structured_binary import StructuredBinary
from whit.formats.vector_codebook import VectorCodebook
from whit.kernels import decode_ops, packed_linear
from whit.kernels.codebook_plan import codebook_options, codebook_source, place_codebook, place_codebooks
from whit.kernels.cuda_inputs import Normed, products_of
from whit.kernels.cuda_layout import layout_of
from whit.kernels.cuda_ops import device_limits
from whit.kernels.cuda_plan import place_gemv
from whit.kernels.cuda_shapes import Shape, step_sizes, step_timings
from whit.kernels.cuda_step import alone, input_options, place_step, step_key
from whit.kernels.cuda_tuned import use_shape

EPSILON = 1e-5
INPUT = (
    "const Input input = {(u16*)x, (u16*)bias, (u16*)bias + weight.columns, (u16*)bias + 2 * weight.columns, 1e-5f};"
)
ONE = INPUT + "gemv(input, operand_of(weight), nullptr, (u16*)y, chunk, tiles);"
TWO = (
    INPUT
    + """
    Tasks tasks;
    tasks.of[0] = {weight, (u16*)y, 0};
    tasks.of[0].w.rows = FIRST;
    tasks.of[1] = {weight, (u16*)y + FIRST, CLUSTERS};
    tasks.of[1].w.rows = weight.rows - FIRST;
    tasks.of[1].w.codes[0] += FIRST * (long)weight.width;
    tasks.of[1].w.scalars += FIRST * 2;
    codebook_product(input, tasks, chunk, tiles);
"""
)
CASES: list[tuple[Format, bool, int]] = [
    (LevelTable(2, 0), True, 1096),
    (BinaryResidual(128, True), True, 640),
    (GroupedInteger(3, 128, False), True, 392),
    (BinaryResidual(128, False), False, 640),
    (GroupedInteger(8, 64, True), False, 328),
    (StructuredBinary(4, 8, 0), True, 1096),
]


def given(
    columns: int, dtype: torch.dtype, add: bool, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, the second vector, the norm's weight; and h and the input that the plain ops make of them."""
    x, second = (inputs(1, columns, dtype, device) for _ in range(2))
    weight = torch.rand(columns, device=device).to(dtype)
    total, made = decode_ops.add_rms_norm(x, second if add else None, weight, EPSILON)
    return x, second, weight, total, made


def running(packed: Packed) -> Packed:
    """The weight in the form in which decoding multiplies it, with the same room for marked columns in all."""
    return signed_levels(packed, 300) if isinstance(packed.format, StructuredBinary) else packed


def slack(made: Tensor, weight: Tensor) -> Tensor:
    """What one unit in the last place of every entry of an input may do to the products."""
    return torch.finfo(made.dtype).eps * made.double().abs() @ weight.abs().T


@pytest.mark.skipif(build.COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize(("layout", "bitwise", "columns"), CASES, ids=str)
def test_sources(
    layout: Format, bitwise: bool, columns: int, add: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16 if add else torch.float16
    packed = running(random_packed(layout, 40, columns))
    described = layout_of(packed.format, columns)
    assert described is not None
    shape = Shape(64, 128 if described.bits == 8 else 256, 1, bitwise)
    launch = place_gemv(described, 40, columns, 2, 90_000, shape)
    assert launch is not None and launch.chunk >= columns
    monkeypatch.setitem(build.CALLS, "gemv", ONE)
    plain = build.options_of
    extra = input_options(add, columns, shape.threads)
    monkeypatch.setattr(build, "options_of", lambda *items, **named: (*plain(*items, **named), *extra))
    program = build.compiled("gemv", described, launch, 1, dtype == torch.bfloat16, tmp_path)
    x, second, norm, _, made = given(columns, dtype, add)
    others = torch.cat([second[0], norm, torch.zeros_like(norm)])
    tensors = [packed.tensors[name] for name in described.names if name]
    results = [
        build.run(program, described, launch, tensors, (40, columns), x, others, descending=descending)
        for descending in (False, True)
    ]
    weight = packed.unpack().double()
    expected = made.double() @ weight.T
    bound = error_bound(made, weight, expected, block=unit_columns(packed.format, columns)) + slack(made, weight)
    assert ((results[0].double() - expected).abs() <= bound).all()
    assert torch.equal(*results)


@pytest.mark.skipif(build.COMPILER is None, reason="needs g++")
def test_two_codebook_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, columns, rows = VectorCodebook(256, 12, False), 2000, (40, 21)
    described = layout_of(layout, columns)
    assert described is not None
    found = place_codebooks(described, rows, 200_000, {2: 4})
    assert found is not None
    launch, clusters = found
    assert launch.splits == 2 and len(clusters) == 2 and launch.clusters == sum(clusters)
    monkeypatch.setitem(
        build.CALLS, "codebook_product", TWO.replace("FIRST", str(rows[0])).replace("CLUSTERS", str(clusters[0]))
    )
    options = (*codebook_options(described, launch, True, False), *input_options(True, columns, launch.threads))
    program = build.built("codebook_product", codebook_source(), (*options, "-DSEVERAL=2"), tmp_path)
    packed = random_packed(layout, sum(rows), columns)
    x, second, norm, _, made = given(columns, torch.bfloat16, True)
    others = torch.cat([second[0], norm, torch.zeros_like(norm)])
    tensors = [packed.tensors[name] for name in described.names if name]
    numbers = (launch.passes, launch.rows_each, launch.grid, launch.shared + 2 * columns)
    results = [
        build.executed(
            program, described, (*numbers, descending, launch.splits), tensors, (sum(rows), columns), x, others
        )
        for descending in (0, 1)
    ]
    weight = packed.unpack().double()
    expected = made.double() @ weight.T
    bound = error_bound(made, weight, expected, "table") + slack(made, weight)
    assert ((results[0].double() - expected).abs() <= bound).all()
    assert torch.equal(*results)


@pytest.mark.parametrize("rows", [(4096, 4096, 4096), (11008, 11008), (4096, 512, 512), (40, 21)])
def test_clusters_of_several_codebooks_cover_their_rows(rows: tuple[int, ...]) -> None:
    described = layout_of(VectorCodebook(256, 12, False), 4096)
    assert described is not None
    found = place_codebooks(described, rows, 232448, {1: 132, 2: 66, 3: 39})
    assert found is not None
    launch, clusters = found
    assert launch.clusters == sum(clusters) <= {1: 132, 2: 66, 3: 39}[launch.splits]
    for count, own in zip(rows, clusters, strict=True):
        assert own * launch.rows_each >= count > (own - 1) * launch.rows_each
    assert place_codebook(described, sum(rows), 232448, {3: 39}) is not None


def test_two_blocks_that_are_alone_do_not_fit_a_multiprocessor() -> None:
    for memory in (
        166_912,
        232_448,
    ):  # of a block, on A100 and H100; a multiprocessor has 1 KiB more and takes 1 per block
        assert alone(memory) <= memory
        assert 2 * (alone(memory) + 1024) > memory + 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "layout",
    [*(layout for layout, _, _ in CASES), GroupedInteger(1, 128, True), VectorCodebook(256, 12, False)],
    ids=str,
)
def test_kernels(layout: Format) -> None:
    columns, dtype = 1096, torch.bfloat16
    weights = [running(random_packed(layout, rows, columns)).to("cuda") for rows in (1000, 24)]
    x, second, norm = (inputs(1, columns, dtype, "cuda") for _ in range(3))
    norm = norm[0].contiguous()
    total, made = decode_ops.add_rms_norm(x, second, norm, EPSILON)
    alike = (
        (Normed(x, second, norm, EPSILON), weights),
        (Normed(total, None, norm, EPSILON), weights[:1]),
        (made, weights),
    )
    for input_of, own in alike:
        found, again = products_of(input_of, own), products_of(input_of, own)
        assert found is not None and again is not None
        assert torch.equal(found[0], made if input_of is made else total)
        for mine, twice, packed in zip(found[1], again[1], own, strict=True):
            weight = packed.unpack().double()
            expected = made.double() @ weight.T
            bound = error_bound(made, weight, expected, block=unit_columns(packed.format, columns)) + slack(
                made, weight
            )
            assert ((mine.double() - expected).abs() <= bound).all()
            assert torch.equal(mine, twice)
            assert ((packed_linear(made, packed).double() - expected).abs() <= bound).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", [BinaryResidual(128, True), LevelTable(2, 0), GroupedInteger(1, 128, True)], ids=str)
def test_kernels_in_the_shapes_of_a_step(layout: Format) -> None:
    rows, columns, dtype = (1008, 1008), 2048, torch.bfloat16
    weights = [random_packed(layout, count, columns).to("cuda") for count in rows]
    x, second, norm = (inputs(1, columns, dtype, "cuda") for _ in range(3))
    norm = norm[0].contiguous()
    total, made = decode_ops.add_rms_norm(x, second, norm, EPSILON)
    described = layout_of(layout, columns)
    assert described is not None
    device, *limits = device_limits(0)
    key, tried = step_key(described, rows, columns), 0
    try:
        for shape in (step_timings(size)[at] for size in step_sizes(described) for at in (0, -1)):
            if place_step(described, rows, columns, *limits, shape) is None:
                continue
            use_shape(device, key, shape)
            found = products_of(Normed(x, second, norm, EPSILON), weights)
            assert found is not None and torch.equal(found[0], total)
            for mine, packed in zip(found[1], weights, strict=True):
                weight = packed.unpack().double()
                expected = made.double() @ weight.T
                bound = error_bound(made, weight, expected, block=unit_columns(layout, columns)) + slack(made, weight)
                assert ((mine.double() - expected).abs() <= bound).all()
            tried += 1
    finally:
        use_shape(device, key, None)
    assert tried > 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "layout",
    [BinaryResidual(128, True), LevelTable(2, 0), GroupedInteger(3, 64, False), StructuredBinary(4, 8, 0)],
    ids=str,
)
def test_gated_kernels_in_the_shapes_of_a_step(layout: Format) -> None:
    """Clusters give what two products and the kernel behind them do; without a shape found for them none runs."""
    rows, columns, dtype = (1008, 1008), 2048, torch.bfloat16
    weights = [running(random_packed(layout, count, columns)).to("cuda") for count in rows]
    x, second, norm = (inputs(1, columns, dtype, "cuda") for _ in range(3))
    given_input = Normed(x, second, norm[0].contiguous(), EPSILON)
    plain = products_of(given_input, weights)
    assert plain is not None
    expected = decode_ops.gated(*plain[1]).double()
    described = layout_of(weights[0].format, columns)
    assert described is not None
    device, *limits = device_limits(0)
    key, tried = step_key(described, rows, columns, gated=True), 0
    assert products_of(given_input, weights, gated=True) is None
    try:
        for shape in (step_timings(size)[at] for size in step_sizes(described) for at in (0, -1)):
            if place_step(described, rows, columns, *limits, shape, gated=True) is None:
                continue
            use_shape(device, key, shape)
            found = products_of(given_input, weights, gated=True)
            assert found is not None and torch.equal(found[0], plain[0]) and len(found[1]) == 1
            error = (found[1][0].double() - expected).abs()
            assert (error <= 4 * torch.finfo(dtype).eps * expected.abs() + 1e-3 * expected.abs().max()).all()
            again = products_of(given_input, weights, gated=True)
            assert again is not None and torch.equal(again[1][0], found[1][0])
            tried += 1
    finally:
        use_shape(device, key, None)
    assert tried >= 8  # three bits come in no boxes of the copy engine
