"""The CUDA sources run on a CPU, thread by thread, against the plain meaning: their arithmetic, indexing and barriers.

Every memory access is checked at the end of each tensor and of the shared memory (a fault fails the test); running the
threads of a block in the opposite order must not change a bit of the result.
"""

import re
from importlib import resources

import pytest
import torch

from tests.kernels.emulator.build import COMPILER, compiled, run
from tests.kernels.emulator.meanings import MEANINGS
from tests.kernels.test_cuda_kernels import error_bound, inputs, name_of, random_packed, unit_columns
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.formats.vector_codebook import VectorCodebook
from whit.kernels.cuda_layout import layout_of
from whit.kernels.cuda_plan import place_gemv, place_small
from whit.kernels.cuda_shapes import Shape
from whit.kernels.cuda_sources import source_of, wide_source
from whit.kernels.cuda_wide import WideShape
from whit.kernels.outlier_wide import product_source

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

ONE = [
    (BinaryResidual(128, True), True),
    (BinaryResidual(128, False), False),
    (BinaryResidual(64, True), False),
    (BinaryResidual(0, True), True),
    (LevelTable(1, 0), True),
    (LevelTable(2, 0), True),
    (LevelTable(2, 128), True),
    (GroupedInteger(2, 0, False), True),
    (GroupedInteger(3, 0, True), True),
    (LevelTable(2, 384), False),
    (GroupedInteger(2, 128, False), True),
    (GroupedInteger(3, 128, False), True),
    (GroupedInteger(3, 64, True), False),
    (GroupedInteger(4, 128, False), False),
    (GroupedInteger(8, 0, True), False),
    (GroupedInteger(2, 64, False), True),
    (GroupedInteger(3, 64, False), True),
    (GroupedInteger(4, 64, True), True),
    (GroupedInteger(4, 128, False), True),
    (LevelTable(1, 64), True),
    (LevelTable(2, 64), True),
]
FEW = [
    BinaryResidual(128, True),
    LevelTable(2, 64),
    GroupedInteger(1, 128, True),
    GroupedInteger(3, 64, False),
    GroupedInteger(4, 128, True),
    GroupedInteger(8, 128, False),
]


def tightest(place, **arguments):
    """The launch in the least memory, so that x comes in several chunks and rings are short."""
    launches = (place(memory=memory, **arguments) for memory in range(3_000, 120_000, 500))
    return next(launch for launch in launches if launch is not None)


@pytest.mark.parametrize(
    ("layout", "bitwise"), ONE, ids=lambda value: name_of(value) if not isinstance(value, bool) else ""
)
def test_one_vector(layout, bitwise, tmp_path):
    shapes = ((33, 1000, torch.float16), (20, 640, torch.bfloat16))
    for rows, columns, dtype in shapes if layout == LevelTable(2, 128) else (shapes[bitwise],):
        described = layout_of(layout, columns)
        item = 128 if layout.to_json().get("bits") == 8 else 1024 if layout == LevelTable(2, 0) else 256
        shape = Shape(64, item, 2, bitwise)
        launch = tightest(place_gemv, layout=described, rows=rows, columns=columns, processors=2, shape=shape)
        assert launch.chunk < columns or item > columns
        program = compiled("gemv", described, launch, 1, dtype == torch.bfloat16, tmp_path)
        packed = random_packed(layout, rows, columns)
        x, bias = inputs(1, columns, dtype, "cpu"), torch.linspace(-1, 1, rows).to(dtype)
        tensors = [packed.tensors[name] for name in described.names if name]
        actual = run(program, described, launch, tensors, (rows, columns), x, bias)
        weight = packed.unpack().double()
        expected = x.double() @ weight.T + bias.double()
        bound = error_bound(x, weight, expected, block=unit_columns(layout, columns))
        assert ((actual.double() - expected).abs() <= bound).all()
        assert torch.equal(run(program, described, launch, tensors, (rows, columns), x, bias, descending=True), actual)


WAYS = [
    (LevelTable(1, 128), 80, 2048, Shape(64, 1024, 2, True, depth=4, bulk=True), False),
    (LevelTable(2, 128), 72, 2560, Shape(64, 1024, 2, True, depth=4, bulk=True, patient=True), False),
    (LevelTable(2, 0), 48, 2688, Shape(64, 512, 1, True, bulk=True, patient=True, late=True), True),
    (BinaryResidual(128, True), 100, 2048, Shape(64, 1024, 2, True, bulk=True, patient=True), False),
    (BinaryResidual(0, False), 64, 2560, Shape(64, 1024, 2, True, bulk=True), True),
    (GroupedInteger(3, 128, False), 50, 1056, Shape(64, 256, 1, True, patient=True, late=True), False),
    (BinaryResidual(128, True), 50, 6400, Shape(64, 256, 1, True, patient=True, ahead=True), False),
]


@pytest.mark.parametrize(("layout", "rows", "columns", "shape", "tight"), WAYS)
def test_one_vector_in_every_way_to_bring_the_weight(layout, rows, columns, shape, tight, tmp_path):
    """By the tensor copy engine; most of it after x has come; x in several turns, asked for together or not."""
    described = layout_of(layout, columns)
    sizes = {"layout": described, "rows": rows, "columns": columns, "processors": 2, "shape": shape}
    launch = tightest(place_gemv, **sizes) if tight else place_gemv(memory=220_000, **sizes)
    assert (launch.chunk < columns) is tight and launch.whole and (tight or launch.turns()[0] == 2)
    program = compiled("gemv", described, launch, 1, False, tmp_path)
    packed = random_packed(layout, rows, columns)
    x, bias = inputs(1, columns, torch.float16, "cpu"), torch.linspace(-1, 1, rows).half()
    tensors = [packed.tensors[name] for name in described.names if name]
    actual = run(program, described, launch, tensors, (rows, columns), x, bias)
    weight = packed.unpack().double()
    expected = x.double() @ weight.T + bias.double()
    bound = error_bound(x, weight, expected, block=unit_columns(layout, columns))
    assert ((actual.double() - expected).abs() <= bound).all()
    assert torch.equal(run(program, described, launch, tensors, (rows, columns), x, bias, descending=True), actual)


@pytest.mark.parametrize("name", ["stage_planes.cuh", "planes.cuh", "limbs.cuh", "small.cu", "gemv.cu"])
def test_what_the_kernel_before_may_have_written_is_not_read_as_constant(name):
    """NVRTC has moved such a load to before the instruction that waits for that kernel."""
    source = source_of(name)
    assert re.search(r"__ldg\((\(const \w+\*\))?\(?(x|from)\b", source) is None
    assert "__ldg(salient" in source or name in ("planes.cuh", "small.cu", "gemv.cu")


@pytest.mark.parametrize(
    "layout", [BinaryResidual(128, True), LevelTable(2, 0), GroupedInteger(3, 128, True)], ids=name_of
)
def test_one_vector_whose_staging_is_shared(layout, tmp_path):
    rows, columns, dtype, share = 80, 1100, torch.float16, 2 if layout.name == "level-table" else 4
    described = layout_of(layout, columns)
    launch = place_gemv(described, rows, columns, 5, 90_000, Shape(64, 256, 2, True, 1, share))
    assert launch.grid == 4 and launch.chunk >= columns
    program = compiled("gemv", described, launch, 1, False, tmp_path)
    packed = random_packed(layout, rows, columns)
    x = inputs(1, columns, dtype, "cpu")
    tensors = [packed.tensors[name] for name in described.names if name]
    actual = run(program, described, launch, tensors, (rows, columns), x, None)
    weight = packed.unpack().double()
    expected = x.double() @ weight.T
    bound = error_bound(x, weight, expected, block=unit_columns(layout, columns))
    assert ((actual.double() - expected).abs() <= bound).all()
    assert torch.equal(run(program, described, launch, tensors, (rows, columns), x, None, descending=True), actual)


@pytest.mark.parametrize("layout", FEW, ids=name_of)
@pytest.mark.parametrize("tokens", [3, 13])
def test_few_vectors(layout, tokens, tmp_path):
    rows, columns, dtype = 40, 1000, torch.float16 if tokens == 3 else torch.bfloat16
    described = layout_of(layout, columns)
    item, padded = 128 if layout.to_json().get("bits") == 8 else 256, 8 if tokens <= 8 else 16
    sizes = {"layout": described, "rows": rows, "columns": columns, "tokens": padded, "processors": 2}
    if tokens == 3:
        launch = tightest(place_small, shape=Shape(64, item, 2), **sizes)
        assert launch.chunk < columns
    else:
        launch = place_small(memory=90_000, shape=Shape(64, item, 2), **sizes)
        assert launch.chunk >= columns
    program = compiled("small", described, launch, padded, dtype == torch.bfloat16, tmp_path)
    packed = random_packed(layout, rows, columns)
    x = inputs(tokens, columns, dtype, "cpu")
    tensors = [packed.tensors[name] for name in described.names if name]
    actual = run(program, described, launch, tensors, (rows, columns), x, None)
    weight = packed.unpack().double()
    expected = x.double() @ weight.T
    assert ((actual.double() - expected).abs() <= error_bound(x, weight, expected)).all()
    assert torch.equal(run(program, described, launch, tensors, (rows, columns), x, None, descending=True), actual)


WIDE = [
    (BinaryResidual(128, True), WideShape(16, 1, 3, 6, 1), 11),
    (BinaryResidual(64, False), WideShape(8, 2, 1, 4, 1), 3),
    (LevelTable(1, 0), WideShape(16, 1, 2, 4, 1, 128), 20),
    (LevelTable(2, 128), WideShape(128, 2, 2, 4, 1), 150),
    (LevelTable(2, 384), WideShape(8, 2, 2, 3, 1, 128), 8),
    (GroupedInteger(1, 128, True), WideShape(8, 1, 1, 2, 1), 8),
    (GroupedInteger(2, 64, False), WideShape(32, 1, 1, 4, 1), 20),
    (GroupedInteger(3, 128, False), WideShape(16, 1, 2, 4, 1, 128), 16),
    (GroupedInteger(4, 128, False), WideShape(16, 2, 1, 3, 1), 9),
    (GroupedInteger(4, 64, True), WideShape(8, 1, 1, 3, 1), 8),
    (GroupedInteger(8, 0, True), WideShape(16, 1, 2, 4, 1, 128), 16),
    (GroupedInteger(8, 64, False), WideShape(8, 1, 1, 3, 1), 7),
    (LevelTable(2, 128), WideShape(128, 1, 1, 3, 1, 64, 3), 150),
    (BinaryResidual(128, True), WideShape(64, 3, 1, 2, 1, 128, 3), 70),
    (LevelTable(2, 128), WideShape(16, 2, 4, 3, 1, 128, sends=True), 13),
    (BinaryResidual(128, False), WideShape(64, 1, 2, 2, 1, 128, 3, sends=True), 50),
    (BinaryResidual(256, True), WideShape(16, 1, 2, 3, 1, 128, 1, sends=True), 20),
    (BinaryResidual(0, False), WideShape(16, 2, 3, 2, 1, 128, 3), 16),
    (BinaryResidual(128, True), WideShape(16, 1, 4, 2, 1, 128, 3, sends=True, staged=True), 16),
    (BinaryResidual(0, False), WideShape(16, 1, 1, 3, 1, 128, 1, staged=True), 11),
    (LevelTable(2, 128), WideShape(16, 2, 3, 2, 1, 128, 1, staged=True), 8),
    (GroupedInteger(3, 128, False), WideShape(64, 1, 1, 2, 1, 128, 3, staged=True), 50),
    (GroupedInteger(4, 128, True), WideShape(16, 1, 2, 3, 1, 128, 3, staged=True), 16),
    (GroupedInteger(4, 64, False), WideShape(16, 1, 2, 3, 1, 128, 3), 16),
    (GroupedInteger(3, 64, True), WideShape(16, 2, 3, 3, 1, 128, 1, staged=True), 11),
    (GroupedInteger(2, 64, False), WideShape(64, 1, 1, 2, 1, 128, 3), 50),
    (LevelTable(2, 64), WideShape(16, 1, 1, 3, 1, 128, 1, staged=True), 16),
    (GroupedInteger(8, 64, False), WideShape(8, 1, 1, 3, 1, 128, 3), 7),
    (VectorCodebook(256, 12, False), WideShape(16, 1, 2, 3, 1, 128, 3, copies=8), 13),
    (VectorCodebook(256, 12, True), WideShape(8, 1, 1, 3, 1, 128, 1, copies=4), 8),
    (VectorCodebook(256, 8, False), WideShape(16, 1, 2, 3, 1, 128, 3, copies=8), 11),
    (GroupedInteger(4, 128, False), WideShape(16, 1, 2, 2, 1, 256, 3), 16),
    (BinaryResidual(128, True), WideShape(16, 2, 2, 2, 1, 256, 3, staged=True), 14),
    (GroupedInteger(4, 64, False), WideShape(16, 2, 2, 2, 1, 256, 3, staged=True), 16),
    (GroupedInteger(3, 128, True), WideShape(16, 1, 1, 3, 1, 256, 3, staged=True), 12),
    (GroupedInteger(8, 128, True), WideShape(64, 1, 1, 3, 1, 128, 7), 50),
    (GroupedInteger(4, 0, True), WideShape(64, 1, 1, 2, 1, 256, 7, staged=True), 50),
    (GroupedInteger(8, 64, False), WideShape(16, 1, 2, 3, 1, 128, 3), 11),
    (GroupedInteger(3, 64, False), WideShape(16, 1, 1, 3, 1, 256, 3, staged=True), 11),
    (GroupedInteger(4, 64, False), WideShape(8, 1, 1, 3, 1, 128, 3), 8),
    (VectorCodebook(256, 12, False), WideShape(8, 1, 2, 3, 1), 1),
    (VectorCodebook(256, 8, True), WideShape(8, 1, 1, 3, 1, 128), 5),
    (VectorCodebook(64, 4, True), WideShape(16, 2, 1, 3, 1, 128), 11),
]


@pytest.mark.parametrize(("layout", "shape", "tokens"), WIDE, ids=str)
def test_many_vectors(layout, shape, tokens, tmp_path):
    rows, columns, dtype = (
        83,
        768 if shape.held == 128 else 704,
        torch.bfloat16 if tokens in (8, 11) else torch.float16,
    )
    described = layout_of(layout, columns)
    program = compiled("wide", described, shape, tokens, dtype == torch.bfloat16, tmp_path)
    packed = random_packed(layout, rows, columns)
    x, bias = inputs(tokens, columns, dtype, "cpu"), torch.linspace(-1, 1, rows).to(dtype)
    tensors = [packed.tensors[name] for name in described.names if name]
    actual = run(program, described, shape, tensors, (rows, columns), x, bias)
    weight = packed.unpack().double()
    expected = x.double() @ weight.T + bias.double()
    assert ((actual.double() - expected).abs() <= error_bound(x, weight, expected)).all()
    assert torch.equal(run(program, described, shape, tensors, (rows, columns), x, bias, descending=True), actual)


def test_tiles_that_do_not_fill_the_device_are_cut_finer(tmp_path):
    layout, shape = BinaryResidual(128, True), WideShape(16, 1, 1, 3, 1, 128, 1, 2)
    rows, columns, tokens = 83, 512, 40
    described, packed = layout_of(layout, columns), random_packed(layout, rows, columns)
    x, weight = inputs(tokens, columns, torch.float16, "cpu"), packed.unpack().double()
    tensors = [packed.tensors[name] for name in described.names if name]
    parts = shape.parts(rows, tokens, 4)
    assert [(part.splits, first, count) for part, first, count in parts] == [(1, 0, 4), (2, 4, 2)]
    results = []
    for part, first, count in parts:
        folder = tmp_path / str(first)
        folder.mkdir()
        program = compiled("wide", described, part, tokens, False, folder)
        results.append(run(program, described, part, tensors, (rows, columns), x, None, tiles=(first, count)))
    assert torch.equal(results[0].isnan(), ~results[1].isnan())
    expected = x.double() @ weight.T
    actual = torch.where(results[0].isnan(), results[1], results[0])
    assert ((actual.double() - expected).abs() <= error_bound(x, weight, expected)).all()


def test_the_emulator_replaces_every_assembly_function():
    written = resources.files("whit.kernels").joinpath("cuda").iterdir()
    source = "".join(path.read_text(encoding="utf-8") for path in written) + wide_source(8) + product_source(64)
    assert [start for start in MEANINGS if start not in source] == []
