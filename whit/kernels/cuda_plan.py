"""How the CUDA kernels of packed products are launched: what fits the device, and which of that was found fastest.

A `Shape` is what may be chosen freely; a `Launch` is a shape made concrete for a weight and a device. Found shapes are
kept in a JSON file per kind of device: those shipped with the package (`tuned/`), and over them those that
`whit tune` (or `benchmarks/kernels.py --tune`) has written to the cache folder of this machine. Without an entry the
first shape of a fixed list that fits is taken. Shapes change speed alone: the sums of a row are the same numbers in
another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

from whit.kernels.cuda_bulk import bulk_stage_bytes
from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_wide import Decode, WideShape, warpgroup_product
from whit.kernels.found import keep_shapes, read_shapes, shape_from
from whit.kernels.nvrtc import cache_folder


@dataclass(frozen=True)
class Shape:
    """What may be chosen freely.

    Threads of a block, columns a warp takes at a time, blocks of 128 columns interleaved, whether one vector is
    multiplied as bit planes (`bits.cuh`) or as limbs (`limbs.cuh`), how many thread blocks a multiprocessor must have
    room for (with two, the next kernel of a stream is already there when one ends), how many of a cluster share the
    work of bringing one vector into its bit planes, whether the next kernel of a stream may start as soon as there is
    room (`eager`) or when this one has its input in registers (`late`; otherwise when it may read it), the most stages
    of a warp's ring, whether all but the first are asked for when the input has come (`patient`; otherwise before), and
    whether the tensor copy engine brings them (`bulk.cuh`).
    """

    threads: int
    item: int
    unroll: int
    bitwise: bool = False
    resident: int = 1
    share: int = 1
    eager: bool = False
    depth: int = 3
    late: bool = False
    patient: bool = False
    bulk: bool = False


Tuned: TypeAlias = Shape | WideShape | Decode
"""What can be found fastest for a call."""


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
        """Pairs of blocks of 128 columns that a warp brings into bit planes together, and those it asks for at once."""
        each = 2 * (self.shape.threads // 32) * self.shape.share
        turns = -(-(self.chunk // 128) // each)
        together = min(turns, 2)
        return together, min(-(-turns // together) * together, _MOST_TURNS)


_MOST_TURNS = 6
"""Pairs of blocks of 128 columns of which a warp keeps x in registers."""


def gemv_shapes(layout: Layout, binary: bool = True, clusters: bool = False) -> list[Shape]:
    """Shapes for one vector, the likeliest first.

    Args:
        layout: of the weight.
        binary: the device has binary tensor cores.
        clusters: blocks can read each other's shared memory.
    """
    if layout.bitwise and binary:
        widest, narrowest = (1024, 512) if layout.bits <= 2 else (512, 256)
        shapes = [Shape(512, widest, 1, True), Shape(512, narrowest, 1, True), Shape(256, narrowest, 1, True, 2)]
        shapes += [Shape(512, narrowest, 1, True, 2), Shape(768, narrowest, 1, True), Shape(256, 256, 1, True)]
        if clusters:
            shapes += [replace(shapes[1], share=share) for share in (2, 4)]
            shapes += [replace(shape, eager=True) for shape in shapes if shape.resident == 2]
            shapes += [Shape(256, widest, 1, True, 2, eager=True), replace(shapes[1], depth=4)]
            pair = Shape(256, widest, 2, True, 2, eager=True, depth=4)
            shapes += [pair, replace(pair, item=narrowest), Shape(512, widest, 2, True, depth=4)]
            shapes += [replace(pair, patient=True), replace(pair, eager=False, late=True)]
            shapes += [replace(pair, bulk=True, patient=patient) for patient in (False, True)]
            shapes.append(replace(pair, bulk=True, patient=True, eager=False, late=True))
        return shapes
    widest = 512 if layout.bits <= 2 else 256 if layout.bits <= 4 else 128
    narrowest = 256 if layout.bits <= 2 else 128 if layout.bits == 4 else widest
    shapes = [Shape(768, widest, 4), Shape(512, widest, 4), Shape(1024, widest, 2), Shape(512, widest, 2, resident=2)]
    if narrowest < widest:
        shapes += [Shape(1024, narrowest, 2), Shape(512, narrowest, 2, resident=2)]
    shapes.append(Shape(256, narrowest, 2))
    if clusters:
        shapes += [replace(shape, eager=True) for shape in shapes if shape.resident == 2]
    return shapes


_SMALL = 24
"""Items of 512 columns of a multiprocessor up to which a product is mostly start and end."""
_BUSY = 0.7
"""Share of the warps' turns that must be used: a wider item costs less, but not if more of them idle."""


def _beside(shape: Shape) -> bool:
    """The shape in which the kernels of a stream overlap most simply."""
    return shape == Shape(256, shape.item, 2, True, 2, eager=True, depth=4)


def likeliest(shapes: Sequence[Shape], rows: int, columns: int, processors: int) -> list[Shape]:
    """The shapes of `gemv_shapes` in the order in which one would try them for a weight, for want of a measurement.

    Small products want room for the next kernel; warps should not wait for a last turn of few.
    """
    tiles = -(-rows // 16)
    small = tiles * columns <= _SMALL * 512 * processors
    own = -(-tiles // processors)

    def unlikely(shape: Shape) -> tuple[bool, bool]:
        turns = -(-own * -(-columns // shape.item) // (shape.threads // 32))
        idle = own * columns < _BUSY * turns * (shape.threads // 32) * shape.item
        return shape.bitwise and small != (shape.resident == 2), shape.bitwise and idle

    return sorted(shapes, key=unlikely)


def small_shapes(layout: Layout) -> list[Shape]:
    """Shapes for 2 to 32 vectors, the likeliest first."""
    items = (128,) if layout.bits == 8 else (256, 512) if layout.bits <= 2 else (256,)
    return [*(Shape(threads, item, 2) for item in items for threads in (512, 256)), Shape(128, items[0], 2)]


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
    tiles, across = -(-rows // 16), -(-columns // item)
    grid = min(tiles, processors) // shape.share * shape.share
    if grid == 0:
        return None
    per_round = max(1, min(-(-tiles // grid), memory // 512 // across))
    kinds, flushes = (2 if layout.kind == 0 else 1), (1 if layout.group % 128 == 0 else 2)
    # of x, per block of 128 columns: operand words and pairs of floats
    block = (1152 if layout.bits == 3 else 256 * kinds) + 16 if shape.bitwise else 1024 + 32 * flushes
    most = across if shape.share == 1 else 1  # blocks that share must stage at the same time, once
    for chunks in range(1, most + 1):
        chunk = -(-across // chunks) * item
        for depth in range(shape.depth, 1, -1):
            shared = chunk // 128 * block + per_round * across * 64 + shape.threads // 32 * depth * stage
            if shared <= room(memory, shape):
                return Launch(grid, shape, depth, chunk, per_round, shared, columns % 32 == 0)
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


def options_of(layout: Layout, launch: Launch, tokens: int, bfloat: bool, early: bool) -> tuple[str, ...]:
    """Preprocessor options of a kernel; `early` asks for programmatic dependent launch."""
    shape, (turns, loads) = launch.shape, launch.turns()
    values = {
        "BF16": bfloat,
        "EARLY": early,
        "BITWISE": shape.bitwise,
        "TILES": tokens // 8,
        "PIECE": layout.piece(shape.item),
        "THREADS": shape.threads,
        "ITEM": shape.item,
        "DEPTH": launch.depth,
        "UNROLL": shape.unroll,
        "RESIDENT": shape.resident,
        "STAGING_BLOCKS": shape.share,
        "EAGER": 2 if shape.late else shape.eager,
        "PATIENT": shape.patient,
        "BULK": shape.bulk,
        "X_WHOLE": launch.whole,
        "TURNS": turns,
        "LOADS": loads,
    }
    return (*layout.defines(), *(f"-D{key}={int(value)}" for key, value in values.items()))


def parts_of(name: str, shape: Shape) -> tuple[str, ...]:
    """The source files of a kernel, in order."""
    if name == "gemv":
        return (
            "common.cuh",
            "inputs.cuh",
            "group.cuh",
            *(("barriers.cuh", "bulk.cuh") if shape.bulk else ()),
            *(("planes.cuh", "bits.cuh") if shape.bitwise else ("limbs.cuh",)),
            "gemv.cu",
        )
    return ("common.cuh", f"{name}.cu")


@lru_cache(maxsize=64)
def source_of(*names: str) -> str:
    """The CUDA C++ of a kernel: its parts, one after the other."""
    folder = files("whit.kernels") / "cuda"
    return "".join((folder / name).read_text(encoding="utf-8") for name in names)


@lru_cache(maxsize=16)
def wide_source(tokens: int) -> str:
    """The CUDA C++ of `wide` for tiles of `tokens` vectors."""
    parts = source_of("pairs.cuh", "barriers.cuh", "warpgroup.cuh", "codes.cuh", "wide.cu")
    return source_of("common.cuh") + warpgroup_product(tokens) + parts


def tuning_key(layout: Layout, rows: int, columns: int, tokens: int) -> str:
    """What a found shape is filed under."""
    group = "row" if layout.groups == 1 else str(layout.group)
    numbers = "".join(f"-{number}" for number in layout.numbers)
    kind = f"{layout.kind}-{layout.bits}-{layout.scalars}{'-zeros' if layout.asymmetric else ''}{numbers}"
    return f"{kind}/{group}/{rows}x{columns}/{tokens}"


def tuning_file(device: str) -> Path:
    """Where shapes found on this machine are kept."""
    return cache_folder() / _own_file(device)


def _own_file(device: str) -> str:
    return f"tuned-{device.replace(' ', '-')}.json"


def _tuned_from(values: dict[str, Any]) -> Tuned:
    kind: type[Tuned] = Decode if "decode" in values else WideShape if "splits" in values else Shape
    return shape_from(kind, values)


@lru_cache(maxsize=8)
def tuned_shapes(device: str) -> dict[str, Tuned]:
    """Shapes found for a kind of device: the shipped ones, and over them those of this machine."""
    return read_shapes(f"{device.replace(' ', '-')}.json", _own_file(device), _tuned_from)


def keep_tuned(device: str, shapes: Mapping[str, Tuned]) -> None:
    """Add found shapes to this machine's file.

    Raises:
        OutputError: it cannot be written.
    """
    keep_shapes(_own_file(device), shapes, _tuned_from)
    tuned_shapes.cache_clear()


def use_shape(device: str, key: str, shape: Tuned | None) -> None:
    """Take a shape (or with None no longer any) for what `key` names, in this process alone."""
    found = tuned_shapes(device)
    if shape is None:
        found.pop(key, None)
    else:
        found[key] = shape


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
            shapes = [shape for shape in gemv_shapes(layout, binary, clusters) if _beside(shape)][:1] + shapes
    return plan(layout, rows, columns, tokens, processors, memory, shapes)
