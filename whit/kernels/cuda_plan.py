"""How the CUDA kernels `gemv` and `small` are launched: what fits the device, and which of that is taken.

A `Shape` is what may be chosen freely; a `Launch` is a shape made concrete for a weight and a device. Where no shape
was found fastest (`cuda_tuned.py`), the first of a fixed list that fits is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from whit.kernels.cuda_bulk import bulk_stage_bytes
from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_shapes import Shape, beside, gemv_shapes, likeliest, small_shapes
from whit.kernels.cuda_tuned import tuned_shapes, tuning_key


@dataclass(frozen=True)
class Launch:
    """`grid` blocks of `shape.threads`; rings of `depth` stages; `chunk` columns of x held at once; `tiles` row tiles
    per round; `shared` bytes of shared memory. Of one vector: `whole` if its columns are a multiple of 32."""

    grid: int
    shape: Shape
    depth: int
    chunk: int
    tiles: int
    shared: int
    whole: bool = False

    def turns(self) -> tuple[int, int]:
        """Fours of blocks of 128 columns that a warp brings into bit planes together, and those it asks for at once."""
        each = 4 * (self.shape.threads // 32) * self.shape.share
        turns = -(-(self.chunk // 128) // each)
        together = min(turns, 2)
        return together, min(-(-turns // together) * together, _MOST_TURNS)


_MOST_TURNS = 4
"""Fours of blocks of 128 columns of which a warp keeps x in registers."""


def room(memory: int, shape: Shape) -> int:
    """Bytes of shared memory for a block when `shape.resident` of them share what one may have (1 KiB each is lost)."""
    return (memory + 1024) // shape.resident - 1024


def place_gemv(layout: Layout, rows: int, columns: int, processors: int, memory: int, shape: Shape) -> Launch | None:
    """Launch of `gemv` in a shape on a device with `processors` multiprocessors of `memory` bytes of shared memory.

    Columns of x are cut into the fewest equal chunks that fit; None if two stages and one item of x do not, or the
    tensor copy engine cannot bring the weight.
    """
    item = shape.item
    stage = bulk_stage_bytes(layout, rows, item) if shape.bulk else layout.stage_bytes(item)
    if stage is None:
        return None
    whole, columns = columns % 32 == 0, layout.span(columns)
    tiles, across = -(-rows // 16), -(-columns // item)
    grid = min(tiles, processors) // shape.share * shape.share
    if grid == 0:
        return None
    per_round = max(1, min(-(-tiles // grid), memory // 512 // across))
    flushes = 1 if layout.group % 128 == 0 else 2
    # of x, per block of 128 columns: operand words and pairs of floats
    block = layout.operand_bytes + 16 if shape.bitwise else 1024 + 32 * flushes
    most = across if shape.share == 1 else 1  # blocks that share must stage at the same time, once
    for chunks in range(1, most + 1):
        chunk = -(-across // chunks) * item
        for depth in range(shape.depth, 1, -1):
            shared = chunk // 128 * block + per_round * across * 64 + shape.threads // 32 * depth * stage
            if shared <= room(memory, shape):
                return Launch(grid, shape, depth, chunk, per_round, shared, whole)
    return None


def place_small(
    layout: Layout, rows: int, columns: int, tokens: int, processors: int, memory: int, shape: Shape
) -> Launch | None:
    """Launch of `small` for `tokens` vectors (8, 16 or 32 after rounding up); as `place_gemv`."""
    item, stage = shape.item, layout.stage_bytes(shape.item)
    tiles, across = -(-rows // 16), -(-columns // item)
    grid = min(tiles, processors)
    cells = 16 * (tokens + 1) * 4
    for chunks in range(1, across + 1):
        chunk = -(-across // chunks) * item
        per_round = min(-(-tiles // grid), 16 if chunks > 1 else 1 << 20)
        marks = chunk * 2 + -(-chunk // 512) * 16 if layout.kind == 0 else 0
        totals = per_round * cells if chunks > 1 else 0
        for depth in (3, 2):
            shared = chunk * tokens * 2 + marks + shape.threads // 32 * (cells + depth * stage) + totals
            if shared <= room(memory, shape):
                return Launch(grid, shape, depth, chunk, per_round, shared)
    return None


def plan(
    layout: Layout,
    rows: int,
    columns: int,
    tokens: int,
    processors: int,
    memory: int,
    shapes: Sequence[Shape] | None = None,
) -> Launch:
    """The first of the shapes that fits with the fewest chunks of x.

    Args:
        layout: of the weight.
        rows: outputs.
        columns: inputs.
        tokens: vectors: 1, or 8, 16 or 32.
        processors: multiprocessors of the device.
        memory: bytes of shared memory that a block may have.
        shapes: to choose from; by default `gemv_shapes` or `small_shapes`.

    Raises:
        ValueError: nothing fits.
    """
    if shapes is None:
        shapes = gemv_shapes(layout) if tokens == 1 else small_shapes(layout)
    placed = [
        place_gemv(layout, rows, columns, processors, memory, shape)
        if tokens == 1
        else place_small(layout, rows, columns, tokens, processors, memory, shape)
        for shape in shapes
    ]
    fitting = [launch for launch in placed if launch is not None]
    if not fitting:
        raise ValueError(f"no launch of {rows} x {columns} fits {memory} bytes of shared memory")
    return max(fitting, key=lambda launch: min(launch.chunk, columns))  # the first of equals


def choose(
    device: str,
    layout: Layout,
    rows: int,
    columns: int,
    tokens: int,
    processors: int,
    memory: int,
    *,
    binary: bool = True,
    clusters: bool = True,
) -> Launch:
    """The launch of `gemv` or `small`: the found shape if there is one and it fits, otherwise `plan`'s."""
    found = tuned_shapes(device).get(tuning_key(layout, rows, columns, tokens))
    shapes = gemv_shapes(layout, binary) if tokens == 1 else small_shapes(layout)
    if isinstance(found, Shape):
        shape = replace(found, bitwise=found.bitwise and layout.bitwise and binary)
        known = gemv_shapes(layout, binary, clusters) if tokens == 1 else shapes
        if shape in known:  # the kernel is written for these, not for whatever a file may say
            with suppress(ValueError):
                return plan(layout, rows, columns, tokens, processors, memory, [shape])
    if tokens == 1:
        shapes = likeliest(shapes, rows, columns, processors)
        if clusters:  # half a multiprocessor, so that the next kernel begins beside this one: it has won nearly always
            shapes = [shape for shape in gemv_shapes(layout, binary, clusters) if beside(shape)][:1] + shapes
    return plan(layout, rows, columns, tokens, processors, memory, shapes)
