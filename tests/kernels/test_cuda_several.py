"""Several weights in one launch: on the CPU emulator against the single product, on a GPU against the plain meaning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.kernels.emulator import build
from tests.kernels.test_cuda_kernels import error_bound, inputs, random_packed, unit_columns
from whit.formats.base import Format, Packed
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.formats.structured_binary import StructuredBinary
from whit.generation.products import Products
from whit.kernels import cuda_ops, cuda_plan, cuda_several
from whit.kernels.cuda_layout import Layout, layout_of
from whit.kernels.cuda_ops import layout_fields
from whit.kernels.cuda_plan import Launch
from whit.kernels.cuda_several import place_several, placed_several, several_key, shares
from whit.kernels.cuda_shapes import Shape, gemv_shapes
from whit.kernels.cuda_step import paired
from whit.kernels.cuda_tuned import tuned_shapes, tuning_key
from whit.kernels.cuda_wide import WideShape
from whit.kernels.cuda_wide_plan import MANY
from whit.kernels.linear import choose_several
from whit.models.packed import PackedLinear

TWO = """
    Tasks tasks;
    tasks.of[0] = {operand_of(weight), (u16*)y, 0, 1};
    tasks.of[0].operand.w.rows = FIRST;
    tasks.of[1] = {operand_of(weight), (u16*)y + FIRST, 1, 2};
    tasks.of[1].operand.w.rows = weight.rows - FIRST;
    tasks.of[1].operand.w.codes[0] += FIRST * (long)weight.width;
    tasks.of[1].operand.w.codes[1] += FIRST * (long)weight.width;
    tasks.of[1].operand.w.scalars += FIRST * (long)weight.groups * SCALARS * 2;
    tasks.of[1].operand.w.salient = bias;
    gemv((const u16*)x, tasks, chunk, tiles);
"""


@pytest.mark.skipif(build.COMPILER is None, reason="needs g++")
@pytest.mark.parametrize(
    "shape", [Shape(64, 256, 2), Shape(256, 512, 1, True), Shape(256, 512, 1, True, 2, eager=True, ahead=True)], ids=str
)
def test_two_weights_with_marks_of_their_own(shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one weight, as two: the first in one thread block, the second, with other marked columns, in two."""
    layout, columns, first = BinaryResidual(128, False), 640, 21
    whole = random_packed(layout, 60, columns)
    other = Packed(layout, 60, columns, whole.tensors | {"salient": whole.tensors["salient"].bitwise_not()})
    described = layout_of(layout, columns)
    assert described is not None
    rows = (first, 60 - first)
    monkeypatch.setattr(cuda_several, "several_shapes", lambda layout, binary, early: [shape])
    monkeypatch.setattr(cuda_several, "tuned_shapes", lambda device: {several_key(described, rows, columns): shape})
    launch, blocks = place_several("a device", described, rows, columns, 3, 120_000, True, early=True)
    assert (launch.shape, launch.grid, blocks) == (shape, 3, [1, 2])
    monkeypatch.setitem(build.CALLS, "gemv", TWO.replace("FIRST", str(first)).replace("SCALARS", "4"))
    plain = build.options_of
    monkeypatch.setattr(build, "options_of", lambda *given, **named: (*plain(*given, **named), "-DSEVERAL=2"))
    program = build.compiled("gemv", described, launch, 1, False, tmp_path)
    x = inputs(1, columns, torch.float16, "cpu")
    tensors = [whole.tensors[name] for name in described.names if name]
    actual = build.run(program, described, launch, tensors, (60, columns), x, other.tensors["salient"])
    weight = torch.cat([whole.unpack()[:first], other.unpack()[first:]]).double()
    expected = x.double() @ weight.T
    assert ((actual.double() - expected).abs() <= error_bound(x, weight, expected)).all()


GATE = """
    Tasks tasks;
    tasks.of[0] = {operand_of(weight), (u16*)y};
    tasks.of[0].operand.w.rows = FIRST;
    tasks.of[1] = tasks.of[0];
    tasks.of[1].operand.w.codes[0] += FIRST * (long)weight.width;
    tasks.of[1].operand.w.codes[1] += FIRST * (long)weight.width;
    tasks.of[1].operand.w.scalars += FIRST * (long)weight.groups * 14;
    tasks.of[1].operand.w.salient = bias;
    gemv((const u16*)x, tasks, chunk, tiles);
"""


@pytest.mark.skipif(build.COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("rows", [32, 72])
@pytest.mark.parametrize("shape", [Shape(64, 256, 1, True), Shape(256, 512, 1, True)], ids=str)
def test_gated_products(shape: Shape, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clusters, whose blocks have the same rows of two weights with different marked columns."""
    layout, columns = BinaryResidual(128, True), 640
    whole = random_packed(layout, 2 * rows, columns)
    other = Packed(layout, 2 * rows, columns, whole.tensors | {"salient": whole.tensors["salient"].bitwise_not()})
    described = layout_of(layout, columns)
    assert described is not None
    placed = placed_several(described, (rows, rows), columns, 4, 200_000, shape)
    assert placed is not None
    launch = paired(placed, (rows, rows), (2, 2), 200_000)
    assert launch is not None and launch.grid == 4
    monkeypatch.setitem(build.CALLS, "gemv", GATE.replace("FIRST", str(rows)))
    options = (*build.options_of(described, launch, 1, False, early=False), "-DSEVERAL=2", "-DGATED=1")
    program = build.built("gemv", build.source_of(*build.parts_of("gemv", shape)), options, tmp_path)
    x = inputs(1, columns, torch.float16, "cpu")
    tensors = [whole.tensors[name] for name in described.names if name]
    weight = torch.stack([whole.unpack()[:rows], other.unpack()[rows:]]).double()
    gate, up = (x.double() @ part.T for part in weight)
    expected = torch.nn.functional.silu(gate) * up
    bounds = [error_bound(x, part, product) for part, product in zip(weight, (gate, up), strict=True)]
    bound = 1.2 * bounds[0] * up.abs() + bounds[1] * gate.abs() + 2e-3 * expected.abs() + bounds[0] * bounds[1] + 1e-6
    for descending in (0, 1):
        numbers = (launch.chunk, launch.tiles, launch.grid, launch.shared, descending, 2)
        whole_rows = (2 * rows, columns)
        found = build.executed(program, described, numbers, tensors, whole_rows, x, other.tensors["salient"])
        assert ((found[:, :rows].double() - expected).abs() <= bound).all()
        assert found[:, rows:].isnan().all()  # nothing else is written


@pytest.mark.parametrize("rows", [(4096, 4096, 4096), (4096, 1024, 1024), (11008, 11008), (16, 16), (5, 4000, 3)])
@pytest.mark.parametrize("processors", [4, 132])
def test_thread_blocks_go_where_the_rows_are(rows: tuple[int, ...], processors: int) -> None:
    blocks, tiles = shares(rows, processors), [-(-count // 16) for count in rows]
    assert sum(blocks) == min(processors, sum(tiles)) and min(blocks) >= 1
    assert all(have <= want for have, want in zip(blocks, tiles, strict=True))
    rounds = max(-(-want // have) for want, have in zip(tiles, blocks, strict=True))
    assert rounds <= -(-sum(tiles) // max(1, processors - len(rows) + 1))


def test_one_round_is_enough_for_every_weight() -> None:
    layout = layout_of(BinaryResidual(0, False), 4096)
    assert layout is not None
    launch, blocks = place_several("a device", layout, (4096, 4096, 4096), 4096, 132, 227 * 1024, True)
    assert launch.grid == sum(blocks) == 132
    assert launch.tiles >= max(-(-4096 // (16 * share)) for share in blocks)


def test_a_found_shape_whose_blocks_share_their_work_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor does it keep a shape that starts the next kernel at once from being taken."""
    layout = layout_of(BinaryResidual(0, False), 4096)
    assert layout is not None
    key = tuning_key(layout, 8192, 4096, 1)
    for shape in (Shape(512, 512, 1, True, share=2), Shape(256, 512, 1, True, 2, eager=True)):
        monkeypatch.setattr(cuda_plan, "tuned_shapes", lambda device, shape=shape: {key: shape})
        launch, blocks = place_several("a device", layout, (4096, 4096), 4096, 132, 227 * 1024, True, early=True)
        assert sum(blocks) == 132 and launch.shape.share == 1
        assert (launch.shape == shape) is shape.eager


def test_a_shape_found_for_them_together_goes_before_that_of_one_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(BinaryResidual(0, False), 4096)
    assert layout is not None
    rows, single, joint = (4096, 1024, 1024), Shape(512, 512, 1, True), Shape(768, 512, 1, True)
    found = {tuning_key(layout, 6144, 4096, 1): single, several_key(layout, rows, 4096): joint}
    monkeypatch.setattr(cuda_plan, "tuned_shapes", lambda device: found)
    monkeypatch.setattr(cuda_several, "tuned_shapes", lambda device: found)

    def shape(*rows: int) -> Shape:
        return place_several("a device", layout, rows, 4096, 132, 227 * 1024, True, early=True)[0].shape

    assert shape(*rows) == joint
    assert shape(1024, 4096, 1024) == shape(3072, 3072) == single  # those have blocks of their own
    for wrong in (Shape(512, 512, 1, True, share=2), Shape(96, 512, 1, True), WideShape(64, 1, 1, 1, 2)):
        found[several_key(layout, rows, 4096)] = wrong
        assert shape(*rows) == single


def test_every_shape_is_tried_and_the_fastest_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch asks for its shape anew each time that tuning takes another."""
    monkeypatch.setenv("WHIT_CACHE", str(tmp_path))
    layout = BinaryResidual(0, False)
    described = layout_of(layout, 640)
    assert described is not None
    for module in (cuda_several, cuda_ops):
        monkeypatch.setattr(module, "device_limits", lambda index: ("No Such GPU", 132, 227 * 1024))
        monkeypatch.setattr(module, "counts_bits", lambda index: True)
        monkeypatch.setattr(module, "starts_early", lambda index: True)
    monkeypatch.setattr(cuda_several, "usable", lambda x, packed: described)
    made: list[Shape] = []
    ahead: list[int] = []
    monkeypatch.setattr(cuda_several, "compile_together", lambda sources, index: ahead.append(len(sources)))

    def built(layout: Layout, launch: Launch, *others: object) -> tuple[str, str, tuple[str, ...], bool]:
        made.append(launch.shape)
        return "", "gemv", (), False

    monkeypatch.setattr(cuda_several, "build", built)
    monkeypatch.setattr(cuda_several, "kernel", lambda *arguments: None)
    for item in (cuda_several.own_shape, cuda_several._prepared, cuda_ops.choice, tuned_shapes):
        item.cache_clear()
    weights = [random_packed(layout, rows, 640) for rows in (48, 16, 32)]
    x = torch.empty(1, 640, device="meta")
    index = x.device.index
    arguments = (described, (48, 16, 32), 640)
    wanted = [shape for shape in gemv_shapes(described, clusters=True) if shape.share == 1]

    def launched() -> Shape:
        shapes = (cuda_several.own_shape(*arguments, index), cuda_ops.choice(described, 96, 640, 1, index))
        return cuda_several._prepared(*arguments, True, index, shapes)[1].shape

    def seconds() -> float:
        return 0.5 if launched() == wanted[4] else 1.0

    assert cuda_several._tune(x, weights, seconds) == len(wanted) == len(set(made))
    assert ahead == [len(wanted)]
    assert launched() == wanted[4]
    for item in (cuda_several.own_shape, tuned_shapes):
        item.cache_clear()
    assert launched() == wanted[4]


ROW = BinaryResidual(0, False)


def modules(device: str, *, same: bool, layout: Format = ROW) -> list[PackedLinear]:
    out = []
    for rows in (48, 16, 32):
        weight = random_packed(layout if same or rows != 16 else LevelTable(2, 0), rows, 640)
        if rows == 48 and same:  # or they could be joined
            weight.tensors["salient"].bitwise_not_()
        module = PackedLinear(weight.format, rows, 640, None)
        module.set_packed(weight)
        out.append(module.to(device))
    return out


def test_a_cpu_multiplies_in_turn() -> None:
    layers = modules("cpu", same=True)
    x = torch.randn(1, 640)
    assert choose_several(x, [layer.packed for layer in layers]) is None
    assert Products(layers).explain(x) == "in turn"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_launch_on_a_gpu(dtype: torch.dtype) -> None:
    layers = modules("cuda", same=True)
    x = inputs(1, 640, dtype, "cuda")
    products = Products(layers)
    with torch.inference_mode():
        assert products.explain(x) == "one launch"
        found = products(x)
    for mine, layer in zip(found, layers, strict=True):
        weight = layer.weight.double()
        expected = x.double() @ weight.T
        bound = error_bound(x, weight, expected, block=unit_columns(BinaryResidual(0, False), 640))
        assert ((mine.double() - expected).abs() <= bound).all()
    assert products.explain(inputs(2, 640, dtype, "cuda")) == "branches"
    assert Products(modules("cuda", same=False)).explain(x) == "branches"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_launch_in_a_graph_is_the_single_products() -> None:
    for layout in (GroupedInteger(4, 64, True), LevelTable(2, 128), BinaryResidual(128, True)):
        weights = [random_packed(layout, rows, 1024).to("cuda") for rows in (4096, 1024, 1024)]
        x = inputs(1, 1024, torch.bfloat16, "cuda")
        version = choose_several(x, weights)
        assert version is not None
        version.products(x, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = version.products(x, weights)
        x.copy_(inputs(1, 1024, torch.bfloat16, "cuda"))
        graph.replay()
        for mine, packed in zip(found, weights, strict=True):
            weight = packed.unpack().double()
            expected = x.double() @ weight.T
            assert ((mine.double() - expected).abs() <= error_bound(x, weight, expected)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_prompt_meets_weights_that_are_decoded_into_one(dtype: torch.dtype) -> None:
    layers = modules("cuda", same=True, layout=StructuredBinary(4, 8, 0))
    x = inputs(MANY + 3, 640, dtype, "cuda")
    weights = [layer.packed for layer in layers]
    version = choose_several(x, weights)
    assert version is not None and version.name == "cuda decode + matmul"
    for mine, packed in zip(Products(layers)(x), weights, strict=True):
        weight = packed.unpack().double()
        expected = x.double() @ weight.T
        assert mine.shape == expected.shape
        assert ((mine.double() - expected).abs() <= error_bound(x, weight, expected, "decoded")).all()
    assert choose_several(x[:40], weights) is None
    assert choose_several(x, [layer.packed for layer in modules("cuda", same=False)]) is None


def test_the_op_of_several_decoded_weights_has_a_shape_without_a_gpu() -> None:
    layout = layout_of(BinaryResidual(0, False), 640)
    assert layout is not None
    with FakeTensorMode():
        tensors = [torch.empty(1, device="cuda", dtype=torch.uint8) for _ in range(8)]
        out = torch.ops.whit.decoded_weights(tensors, layout_fields(layout), [48, 16], 640, torch.float16)
    assert out.shape == (64, 640) and out.dtype == torch.float16
