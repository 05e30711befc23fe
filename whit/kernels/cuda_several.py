"""One launch for several weights that meet the same vector: q, k and v; gate and up (`cuda/gemv.cu` with SEVERAL).

Weights whose rows could stand in one weight are joined where they are kept (`whit.generation.products`); this is for
those that share a layout and not what its rows have in common, as the marked columns of `binary-residual`. Every weight
gets thread blocks in proportion to its rows. Errors are those of the single product. Tuning files what it finds under
the rows of each; where it found nothing, they take the shape of one weight of as many rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.kernels.cuda_bulk import bulk_stage_bytes
from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_linear import op_arguments, usable
from whit.kernels.cuda_ops import (
    BulkWeight,
    Weight,
    aligned,
    build,
    choice,
    counts_bits,
    device_limits,
    layout_from,
    operand_of,
    starts_early,
    waits_for_nothing,
)
from whit.kernels.cuda_plan import Launch, choose, place_gemv
from whit.kernels.cuda_shapes import Shape, gemv_shapes
from whit.kernels.cuda_tuned import Tuned, keep_tuned, tuned_shapes, tuning_key, use_shape
from whit.kernels.cuda_wide import Decode, WideShape
from whit.kernels.linear import SeveralProducts, register_several
from whit.kernels.nvrtc import Argument, Kernel, compile_together, kernel
from whit.kernels.tuning import fastest

Chosen = Launch | WideShape | Decode
MOST = 4
"""Weights of one launch."""


class Task(ctypes.Structure):
    """One of the weights, its result, its first thread block and how many it has."""

    _fields_ = (("weight", Weight), ("y", ctypes.c_void_p), ("first", ctypes.c_int), ("blocks", ctypes.c_int))


class BulkTask(ctypes.Structure):
    """The same of weights that the tensor copy engine brings: a multiple of 64 bytes."""

    _fields_ = (
        ("weight", BulkWeight),
        ("y", ctypes.c_void_p),
        ("first", ctypes.c_int),
        ("blocks", ctypes.c_int),
        ("pad", ctypes.c_uint64 * 6),
    )


@lru_cache(maxsize=2 * MOST)
def tasks_of(count: int, bulk: bool = False) -> type[ctypes.Structure]:
    """The argument with so many of them."""
    task = BulkTask if bulk else Task
    return type("_Tasks", (ctypes.Structure,), {"_fields_": (("of", task * count),)})


def shares(rows: Sequence[int], processors: int) -> list[int]:
    """Thread blocks for each weight, `processors` in all: one each, and the others to whom has most tiles per block."""
    tiles = [-(-count // 16) for count in rows]
    blocks = [1] * len(rows)
    for _ in range(min(processors, sum(tiles)) - len(rows)):
        slowest = max(range(len(rows)), key=lambda i: (tiles[i] / blocks[i], -i))
        blocks[slowest] += 1
    return blocks


def several_key(layout: Layout, rows: Sequence[int], columns: int) -> str:
    """What a shape found for a joint launch is filed under."""
    return f"{tuning_key(layout, sum(rows), columns, 1)}/{'+'.join(map(str, rows))}"


def several_shapes(layout: Layout, binary: bool, early: bool) -> list[Shape]:
    """Shapes for a joint launch: blocks of several weights have no marked columns, so no bits of x, in common."""
    return [shape for shape in gemv_shapes(layout, binary, clusters=early) if shape.share == 1]


def _brought(layout: Layout, rows: Sequence[int], shape: Shape) -> bool:
    """Whether the weights come in the way that a shape says."""
    return not shape.bulk or all(bulk_stage_bytes(layout, count, shape.item) is not None for count in rows)


def placed_several(
    layout: Layout, rows: Sequence[int], columns: int, processors: int, memory: int, shape: Shape
) -> Launch | None:
    """The launch of one weight with as many tiles for each block as the slowest has, so that one round does."""
    if not _brought(layout, rows, shape):
        return None
    blocks = shares(rows, processors)
    rounds = max(-(-count // (16 * have)) for count, have in zip(rows, blocks, strict=True))
    return place_gemv(layout, 16 * rounds * processors, columns, processors, memory, shape)


def place_several(
    name: str,
    layout: Layout,
    rows: Sequence[int],
    columns: int,
    processors: int,
    memory: int,
    binary: bool,
    early: bool = False,
) -> tuple[Launch, list[int]]:
    """The launch of several weights on a device, and the thread blocks of each.

    The shape is the one found for them together, otherwise that of one weight of all rows; `early` says that the device
    can start a kernel before the last ends.
    """
    blocks = shares(rows, processors)
    own = tuned_shapes(name).get(several_key(layout, rows, columns))
    launch = None
    if isinstance(own, Shape) and own in several_shapes(layout, binary, early):
        launch = placed_several(layout, rows, columns, processors, memory, own)
    if launch is None:
        found = choose(name, layout, sum(rows), columns, 1, processors, memory, binary=binary, clusters=early)
        if found.shape.share > 1 or not _brought(layout, rows, found.shape):
            found = choose(name, layout, sum(rows), columns, 1, processors, memory, binary=binary, clusters=False)
        launch = placed_several(layout, rows, columns, processors, memory, found.shape) or found
    return replace(launch, grid=sum(blocks)), blocks


@lru_cache(maxsize=1024)
def own_shape(layout: Layout, rows: tuple[int, ...], columns: int, index: int) -> Tuned | None:
    """What tuning found for a joint launch."""
    return tuned_shapes(device_limits(index)[0]).get(several_key(layout, rows, columns))


@lru_cache(maxsize=1024)
def _prepared(
    layout: Layout, rows: tuple[int, ...], columns: int, bfloat: bool, index: int, shapes: tuple[Tuned | None, Chosen]
) -> tuple[Kernel, Launch, list[int]]:
    """`shapes`, that of their own and what one weight of as many rows takes now, are what the launch was chosen by:
    with others, found by tuning, all is made anew."""
    device, processors, memory = device_limits(index)
    early = starts_early(index)
    launch, blocks = place_several(device, layout, rows, columns, processors, memory, counts_bits(index), early)
    source, name, options = _built(layout, launch, len(rows), bfloat, early)
    return kernel(source, name, options, index), launch, blocks


def _built(layout: Layout, launch: Launch, count: int, bfloat: bool, early: bool) -> tuple[str, str, tuple[str, ...]]:
    """Source, name and options of the kernel for `count` weights."""
    source, name, options, _ = build(layout, launch, 1, bfloat, early)
    return source, name, (*options, f"-DSEVERAL={count}")


@torch.library.custom_op("whit::packed_products", mutates_args=(), device_types="cuda")
def packed_products(x: Tensor, tensors: list[Tensor], layout: list[int], rows: list[int], columns: int) -> Tensor:
    """x (1, columns), contiguous, times several packed weights, whose tensors follow one another: (1, sum of rows)."""
    described, given, tensors, index = layout_from(layout), tensors, aligned(tensors), x.device.index
    out = torch.empty(1, sum(rows), dtype=x.dtype, device=x.device)
    each = len(tensors) // len(rows)
    with torch.cuda.device(x.device):
        each_rows = tuple(rows)
        shapes = (own_shape(described, each_rows, columns, index), choice(described, sum(rows), columns, 1, index))
        run, launch, blocks = _prepared(described, each_rows, columns, x.dtype == torch.bfloat16, index, shapes)
        bulk = launch.shape.bulk
        tasks, row, first = tasks_of(len(rows), bulk)(), 0, 0
        for number, (count, share) in enumerate(zip(rows, blocks, strict=True)):
            own = tensors[number * each : (number + 1) * each]
            operand = operand_of(described, launch.shape, own, count, columns)
            place = out.data_ptr() + row * out.element_size()
            tasks.of[number] = (BulkTask if bulk else Task)(operand, place, first, share)
            row, first = row + count, first + share
        x = x if x.data_ptr() % 16 == 0 else x.clone()
        sizes = (ctypes.c_int(launch.chunk), ctypes.c_int(launch.tiles))
        arguments: list[Argument] = [ctypes.c_void_p(x.data_ptr()), tasks, *sizes]
        early = waits_for_nothing(index, given, tensors)
        run.launch(launch.grid, launch.shape.threads, launch.shared, arguments, early=early)
    return out


@packed_products.register_fake
def _(x: Tensor, tensors: list[Tensor], layout: list[int], rows: list[int], columns: int) -> Tensor:
    return x.new_empty(1, sum(rows))


def _supports(x: Tensor, weights: Sequence[Packed]) -> bool:
    if not 2 <= len(weights) <= MOST or x.numel() != x.shape[-1]:
        return False
    layouts = [usable(x, packed) for packed in weights]
    return layouts[0] is not None and layouts[0].multiplies and all(layout == layouts[0] for layout in layouts)


def _products(x: Tensor, weights: Sequence[Packed]) -> list[Tensor]:
    given = [op_arguments(packed) for packed in weights]
    tensors = [tensor for part, _ in given for tensor in part]
    rows = [packed.rows for packed in weights]
    flat = x.reshape(1, -1).contiguous()
    out: Tensor = torch.ops.whit.packed_products(flat, tensors, given[0][1], rows, weights[0].columns)
    return [part.reshape(*x.shape[:-1], count) for part, count in zip(torch.split(out, rows, -1), rows, strict=True)]


def _tune(x: Tensor, weights: Sequence[Packed], seconds: Callable[[], float]) -> int:
    """Find the fastest shape of the joint launch, use and keep it; returns how many could be launched."""
    layout, index, columns = usable(x, weights[0]), x.device.index, weights[0].columns
    assert layout is not None
    rows = tuple(packed.rows for packed in weights)
    device, processors, memory = device_limits(index)
    key = several_key(layout, rows, columns)

    def use(shape: Tuned | None) -> None:
        use_shape(device, key, shape)
        own_shape.cache_clear()

    early = starts_early(index)
    known = several_shapes(layout, counts_bits(index), early)
    placed = {shape: placed_several(layout, rows, columns, processors, memory, shape) for shape in known}
    launches = {shape: launch for shape, launch in placed.items() if launch is not None}
    built = [_built(layout, item, len(rows), x.dtype == torch.bfloat16, early) for item in launches.values()]
    compile_together([(source, options, False) for source, _, options in built], index)
    what = f"{len(weights)} weights at once of {weights[0].format}"
    shapes: list[Tuned] = list(launches)
    best, times = fastest(shapes, tuned_shapes(device).get(key), use, seconds, what)
    keep_tuned(device, {key: best})
    own_shape.cache_clear()
    return len(times)


for _format in ("binary-residual", "level-table", "grouped-integer", "signed-levels"):
    register_several(_format, SeveralProducts("cuda bit-plane gemv", _supports, _products, _tune))
