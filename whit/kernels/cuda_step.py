"""Which launches products of a decoding step with one vector take, and what their kernels are compiled from.

A thread block that makes its input (`inputs.cuh`) makes all of it, and has its multiprocessor for itself. A launch
found within a step (`step_tuning`) comes first, then those found for the products alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from whit.kernels.codebook_plan import (
    CodebookLaunch,
    clusters_at_once,
    codebook_options,
    codebook_source,
    has_codebook_product,
    place_codebook,
    place_codebooks,
)
from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_ops import build, choice, counts_bits, device_limits, starts_early
from whit.kernels.cuda_plan import Launch, place_gemv
from whit.kernels.cuda_several import Chosen, own_shape, place_several, placed_several, several_key, shares
from whit.kernels.cuda_shapes import Shape, step_sizes, step_timings
from whit.kernels.cuda_tuned import Tuned, tuned_shapes, tuning_key
from whit.kernels.nvrtc import Argument, Kernel, Source, kernel

MOST_EIGHTS = 8
"""Eights of columns that a thread makes, at most: it keeps them in registers."""


@dataclass(frozen=True)
class Call:
    """What a kernel is compiled for: `makes`, `add`: INPUT, ADD of `inputs.cuh`; `gated`: GATED of `gemv.cu`."""

    layout: Layout
    rows: tuple[int, ...]
    columns: int
    bfloat: bool
    index: int
    makes: bool
    add: bool
    gated: bool = False

    def options(self, threads: int) -> tuple[str, ...]:
        """Preprocessor options beside those of the product."""
        several = [f"-DSEVERAL={len(self.rows)}"] if len(self.rows) > 1 else []
        several += ["-DGATED=1"] if self.gated else []
        return (*several, *(input_options(self.add, self.columns, threads) if self.makes else ()))


def input_options(add: bool, columns: int, threads: int) -> tuple[str, ...]:
    """Preprocessor options of `inputs.cuh` for a kernel that makes its input."""
    return ("-DINPUT=1", f"-DADD={int(add)}", f"-DEIGHTS={-(-columns // (8 * threads))}")


@dataclass(frozen=True)
class Prepared:
    """A kernel and how it is launched."""

    run: Kernel
    launch: Launch | CodebookLaunch
    parts: tuple[int, ...]  # thread blocks, or clusters, of each weight
    made: int = 0  # bytes for the input beside those of the launch
    gated: bool = False

    def start(self, arguments: list[Argument], early: bool) -> None:
        """Launch it with these arguments; the launch's own numbers come behind them."""
        launch = self.launch
        if isinstance(launch, CodebookLaunch):
            numbers, shared = (launch.passes, launch.rows_each), launch.shared + self.made
            threads, cluster = launch.threads, launch.splits
        else:
            numbers, shared = (launch.chunk, launch.tiles), launch.shared
            threads, cluster = launch.shape.threads, 2 if self.gated else 1
        arguments = [*arguments, *(ctypes.c_int(number) for number in numbers)]
        self.run.launch(launch.grid, threads, shared, arguments, early=early, cluster=cluster)


@lru_cache(maxsize=1024)
def prepared_kernel(call: Call, chosen: tuple[Chosen | None, Tuned | None, Tuned | None]) -> Prepared | None:
    """The kernel of a call; None where no launch makes its input.

    Args:
        chosen: what one weight of as many rows takes, what tuning found for several, and what it found for a step of
            decoding: with others all is made anew.
    """
    if has_codebook_product(call.layout):
        return _prepared_codebooks(call)
    found, _, step = chosen
    if not isinstance(found, Launch):
        return None
    device, processors, memory = device_limits(call.index)
    early, parts, span = starts_early(call.index), list[int](), call.layout.span(call.columns)
    sizes = (call.columns, processors, memory)
    launch = place_step(call.layout, call.rows, *sizes, step, gated=call.gated)
    if launch is not None:
        parts = shares(call.rows, processors) if len(call.rows) > 1 else []
    elif call.gated:
        return None
    elif len(call.rows) > 1:
        launch, parts = place_several(
            device, call.layout, call.rows, *sizes, binary=counts_bits(call.index), early=early
        )
        if launch.chunk < span:  # a block has its multiprocessor for itself, whatever its shape says
            wider = placed_several(call.layout, call.rows, *sizes, replace(launch.shape, resident=1))
            launch = None if wider is None else replace(wider, grid=launch.grid)
    else:  # every block makes all of the input
        shape = replace(found.shape, share=1)
        launch = place_gemv(call.layout, call.rows[0], *sizes, shape)
        if launch is not None and launch.chunk < span:
            launch = place_gemv(call.layout, call.rows[0], *sizes, replace(shape, resident=1))
    if launch is None or not _holds(call.layout, launch, call.columns):
        return None
    source, options, _ = call_source(call, launch)
    run = kernel(source, "gemv", options, call.index)
    return Prepared(run, replace(launch, shared=max(launch.shared, alone(memory))), tuple(parts), gated=call.gated)


def alone(memory: int) -> int:
    """Shared memory, of that which a block may have, with which a block has a multiprocessor for itself.

    Where two fit, kernels with few or small blocks between products make two blocks of one product meet on one
    multiprocessor while another has none.
    """
    return memory // 2


def call_source(call: Call, launch: Launch) -> Source:
    """What the kernel of a call is compiled from."""
    source, _, options, specific = build(call.layout, launch, 1, call.bfloat, starts_early(call.index))
    return source, (*options, *call.options(launch.shape.threads)), specific


def _holds(layout: Layout, launch: Launch, columns: int) -> bool:
    """Whether a block makes all of an input at once."""
    return launch.chunk >= layout.span(columns) and columns <= 8 * launch.shape.threads * MOST_EIGHTS


def paired(launch: Launch, rows: Sequence[int], parts: Sequence[int], memory: int) -> Launch | None:
    """The launch with room for what blocks of a cluster exchange; None where they have not the same rows at once."""
    shared = launch.shared + 2 * 64 * launch.tiles
    whole = len(rows) == 2 and len(set(rows)) == len(set(parts)) == 1 and launch.tiles * parts[0] * 16 >= rows[0]
    return replace(launch, shared=shared) if whole and launch.shape.share == 1 and shared <= memory else None


def place_step(
    layout: Layout,
    rows: Sequence[int],
    columns: int,
    processors: int,
    memory: int,
    shape: Tuned | None,
    *,
    gated: bool = False,
) -> Launch | None:
    """The launch of one or several weights in one of the shapes for a step of decoding; None where it cannot be."""
    if not isinstance(shape, Shape) or all(shape not in step_timings(size) for size in step_sizes(layout)):
        return None
    if len(rows) > 1:
        launch = placed_several(layout, rows, columns, processors, memory, shape)
        launch = None if launch is None else replace(launch, grid=sum(shares(rows, processors)))
    else:
        launch = place_gemv(layout, rows[0], columns, processors, memory, shape)
    if launch is None or not _holds(layout, launch, columns):
        return None
    return paired(launch, rows, shares(rows, processors), memory) if gated else launch


def step_key(layout: Layout, rows: Sequence[int], columns: int, gated: bool = False) -> str:
    """What a shape found within a step of decoding is filed under; one weight times the SiLU of another elsewhere."""
    outside = several_key(layout, rows, columns) if len(rows) > 1 else tuning_key(layout, rows[0], columns, 1)
    return f"{outside}/{'gated' if gated else 'step'}"


def chosen_for(call: Call) -> tuple[Chosen | None, Tuned | None, Tuned | None]:
    """What `prepared_kernel` depends on beside the call."""
    if has_codebook_product(call.layout):
        return None, None, None
    found = choice(call.layout, sum(call.rows), call.columns, 1, call.index)
    own = own_shape(call.layout, call.rows, call.columns, call.index) if len(call.rows) > 1 else None
    step = tuned_shapes(device_limits(call.index)[0]).get(step_key(call.layout, call.rows, call.columns, call.gated))
    return found, own, step if counts_bits(call.index) else None


def placed_codebooks(call: Call) -> tuple[CodebookLaunch, list[int], int] | None:
    """The launch, clusters of each of several weights, and bytes for the input; None where it does not fit."""
    _, processors, memory = device_limits(call.index)
    made = -(-2 * call.columns // 128) * 128 if call.makes else 0
    room, memory = clusters_at_once(processors, starts_early(call.index)), memory - made
    found: tuple[CodebookLaunch, list[int]] | None
    if len(call.rows) > 1:
        found = place_codebooks(call.layout, call.rows, memory, room)
    else:
        single = place_codebook(call.layout, call.rows[0], memory, room)
        found = None if single is None else (single, [])
    if found is None or (call.makes and call.columns > 8 * found[0].threads * MOST_EIGHTS):
        return None
    return *found, made


def _prepared_codebooks(call: Call) -> Prepared | None:
    placed = placed_codebooks(call)
    if placed is None:
        return None
    launch, parts, made = placed
    options = codebook_options(call.layout, launch, call.bfloat, starts_early(call.index))
    run = kernel(codebook_source(), "codebook_product", (*options, *call.options(launch.threads)), call.index)
    return Prepared(run, launch, tuple(parts), made)
