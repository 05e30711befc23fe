"""Shapes of the CUDA kernels `gemv` and `small`: what may be chosen freely, and what is worth trying first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from whit.kernels.cuda_layout import Layout


@dataclass(frozen=True)
class Shape:
    """What may be chosen freely.

    Threads of a block, columns a warp takes at a time, blocks of 128 columns interleaved, whether one vector is
    multiplied as bit planes (`bits.cuh`) or as limbs (`limbs.cuh`), how many thread blocks a multiprocessor must have
    room for (with two, the next kernel of a stream is already there when one ends), how many of a cluster share the
    work of bringing one vector into its bit planes, whether the next kernel of a stream may start as soon as there is
    room (`eager`) or when this one has its input in registers (`late`; otherwise when it may read it), the most stages
    of a warp's ring, whether all but the first are asked for when the input has come (`patient`; otherwise before),
    whether the tensor copy engine brings them (`bulk.cuh`), and whether marks and a norm's weight are asked for before
    any of them (`ahead`).
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
    ahead: bool = False


def gemv_shapes(layout: Layout, binary: bool = True, clusters: bool = False) -> list[Shape]:
    """Shapes for one vector, the likeliest first.

    Args:
        layout: of the weight.
        binary: the device has binary tensor cores.
        clusters: blocks can read each other's shared memory.
    """
    if layout.bitwise and binary and layout.bits == 4:  # as fast as limbs, and faster in groups of 64
        return [*_limb_shapes(layout, clusters), *(Shape(512, item, 1, True) for item in (512, 256))]
    if layout.bitwise and binary:
        widest, narrowest = (1024, 512) if layout.bits <= 2 else (512, 256)
        shapes = [Shape(512, widest, 1, True), Shape(512, narrowest, 1, True), Shape(256, narrowest, 1, True, 2)]
        shapes += [Shape(512, narrowest, 1, True, 2), Shape(768, narrowest, 1, True), Shape(256, 256, 1, True)]
        if clusters:
            shapes += [replace(shapes[1], share=share) for share in (2, 4)]
            shapes += [replace(shape, eager=True) for shape in shapes if shape.resident == 2]
            shapes += [Shape(256, widest, 1, True, 2, eager=True), replace(shapes[1], depth=4)]
            unroll = 1 if layout.crowded else 2
            pair = Shape(256, widest, unroll, True, 2, eager=True, depth=4)
            shapes += [pair, replace(pair, item=narrowest), Shape(512, widest, 2, True, depth=4)]
            shapes += [replace(pair, patient=True), replace(pair, eager=False, late=True)]
            shapes += [replace(pair, bulk=True, patient=patient) for patient in (False, True)]
            shapes.append(replace(pair, bulk=True, patient=True, eager=False, late=True))
            if layout.planes > 2:  # items that leave room for all of x
                narrow = replace(pair, item=narrowest, bulk=True, patient=True)
                shapes += [narrow, replace(narrow, eager=False, late=True)]
                shapes += [replace(narrow, threads=384, item=item, resident=1) for item in (widest, narrowest)]
        return shapes
    return _limb_shapes(layout, clusters)


def _limb_shapes(layout: Layout, clusters: bool) -> list[Shape]:
    widest = 512 if layout.bits <= 2 else 256 if layout.bits <= 4 else 128
    narrowest = 256 if layout.bits <= 2 else 128 if layout.bits == 4 else widest
    shapes = [Shape(768, widest, 4), Shape(512, widest, 4), Shape(1024, widest, 2), Shape(512, widest, 2, resident=2)]
    if narrowest < widest:
        shapes += [Shape(1024, narrowest, 2), Shape(512, narrowest, 2, resident=2)]
    shapes.append(Shape(256, narrowest, 2))
    if clusters:
        shapes += [replace(shape, eager=True) for shape in shapes if shape.resident == 2]
    return shapes


@dataclass(frozen=True)
class Outside:
    """Found for a step of decoding: no launch of its own, since what holds outside of it is as fast."""

    outside: bool = True


_DEPTHS = (2, 4)
"""Most stages of a ring that may take all the shared memory of a multiprocessor."""


def step_sizes(layout: Layout) -> list[Shape]:
    """Shapes for one vector where a thread block has a multiprocessor for itself, as in a step of decoding."""
    if not (layout.bitwise and layout.multiplies):
        return []
    widest, narrowest = (1024, 512) if layout.bits <= 2 else (512, 256)
    sizes = [(256, widest, 2), (384, widest, 2), (512, widest, 2), (512, narrowest, 1)]
    common = Shape(256, widest, 2, True, depth=_DEPTHS[0], late=True, patient=True)
    return [
        replace(common, threads=threads, item=item, unroll=unroll, bulk=bulk)
        for threads, item, unroll in sizes
        for bulk in (False, True)
    ]


def step_timings(size: Shape) -> list[Shape]:
    """One of `step_sizes` with other rings, asking for what it reads and starting the next kernel at other times."""
    return [
        replace(size, depth=depth, patient=patient, eager=not late, late=late, ahead=ahead)
        for ahead in (False, True)
        for depth in _DEPTHS
        for patient, late in ((True, True), (True, False), (False, False))
    ]


_SMALL = 24
"""Items of 512 columns of a multiprocessor up to which a product is mostly start and end."""
_BUSY = 0.7
"""Share of the warps' turns that must be used: a wider item costs less, but not if more of them idle."""


def beside(shape: Shape) -> bool:
    """The shape in which the kernels of a stream overlap most simply."""
    return shape == Shape(256, shape.item, shape.unroll, True, 2, eager=True, depth=4)


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
