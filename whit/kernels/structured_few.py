"""How `cuda/structured_few.cu` is built and launched: up to 16 vectors times a 4:8 sparse binary weight."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_ops import aligned, starts_early, waits_for_nothing, weight_of
from whit.kernels.cuda_sources import source_of
from whit.kernels.nvrtc import Argument, Kernel, kernel
from whit.kernels.structured_plan import GROUP_COLUMNS, MOST_VECTORS, ROWS, tables_of
from whit.kernels.structured_vector import SIGN_TABLES, SLICE_GROUPS, TABLES, reads_words

MOST_WARPS = 16
MOST_SPLITS = 8
DEEPEST = 4
MOST_TILES = {8: 6, 16: 3}
"""Row tiles of a block, by vectors, up to which this was measured to be the fastest."""


@dataclass(frozen=True)
class FewLaunch:
    """`grid` blocks of `threads` in clusters of `splits`, each with `slices` items across its part of a row, at most
    `rows` rows, which come `depth` times `stage_tiles` tiles ahead; `shared` bytes, for up to `tokens` vectors."""

    grid: int
    threads: int
    splits: int
    slices: int
    rows: int
    stage_tiles: int
    depth: int
    shared: int
    tokens: int


def _pieces(size: int) -> int:
    return (size + 38) // 16 | 1


def few_launch(
    layout: Layout,
    rows: int,
    columns: int,
    vectors: int,
    memory: int,
    clusters_at_once: Mapping[int, int],
    splits: int | None = None,
) -> FewLaunch | None:
    """The launch of `structured_few`; None if it cannot take the call.

    Args:
        layout: of the weight.
        rows: outputs.
        columns: inputs.
        vectors: of x.
        memory: bytes of shared memory that a block may have.
        clusters_at_once: as for `codebook_plan.place_codebook`.
        splits: parts of the columns; if not given, as few as leave room for x.
    """
    if not reads_words(layout) or columns % GROUP_COLUMNS or not 1 <= vectors <= MOST_VECTORS:
        return None
    tokens = 8 if vectors <= 8 else 16
    all_slices = -(-columns // (GROUP_COLUMNS * SLICE_GROUPS))
    tiles = -(-rows // ROWS)
    for count in range(1, MOST_SPLITS + 1) if splits is None else (splits,):
        slices = -(-all_slices // count)
        room = clusters_at_once.get(count, 0)
        if room == 0 or (count - 1) * slices >= all_slices:
            continue
        clusters = min(tiles, room)
        most_tiles = -(-tiles // clusters)
        pitch = slices * SLICE_GROUPS * 8 + (0 if slices % 2 else 32)
        pieces = _pieces(slices * 28) + _pieces(slices * 18) + _pieces(slices * 144 // 5 + 1)
        for stage_tiles in (2, 1):
            fixed = TABLES + SIGN_TABLES[0] + 32 * ROWS * most_tiles + 2 * tokens * pitch
            fixed += stage_tiles * slices * 64 * tokens + slices * SLICE_GROUPS * 8 + 4 * slices + 32
            each, stages = stage_tiles * 256 * pieces, -(-most_tiles // stage_tiles)
            depth = min(stages, (memory - fixed) // each, DEEPEST)
            if depth < min(2, stages):
                continue
            warps = -(-slices // -(-slices // MOST_WARPS))
            shared = fixed + depth * each
            return FewLaunch(
                clusters * count, 32 * warps, count, slices, ROWS * most_tiles, stage_tiles, depth, shared, tokens
            )
    return None


def faster_than_units(launch: FewLaunch) -> bool:
    """Whether `structured_few` was found faster than `structured_product`: where blocks have all columns, few tiles.

    With more, 16 rows of codes come too slowly by copies of less than a row each.
    """
    return launch.splits == 1 and launch.rows <= ROWS * MOST_TILES[launch.tokens]


def few_source(layout: Layout) -> str:
    """The CUDA C++."""
    return (
        source_of("common.cuh")
        + tables_of(layout)
        + source_of("barriers.cuh", "structured_words.cuh", "structured_few.cu")
    )


def few_options(layout: Layout, launch: FewLaunch, bfloat: bool, early: bool) -> tuple[str, ...]:
    """Preprocessor options."""
    facts = (option for option in layout.defines() if not option.startswith("-DALIGN"))  # which rows differ in
    values = {
        "BF16": bfloat,
        "EARLY": early,
        "PIECE": 2,
        "ITEM": 128,
        "THREADS": launch.threads,
        "TOKENS": launch.tokens,
        "SPLITS": launch.splits,
        "STAGE_TILES": launch.stage_tiles,
        "DEPTH": launch.depth,
        "FIXED": 0,
        "PAIRED": 0,
        "SIGN_WORDS": 0,
        "ALIGN": 1,
    }
    return (*facts, *(f"-D{key}={int(value)}" for key, value in values.items()))


@lru_cache(maxsize=1024)
def _compiled(layout: Layout, launch: FewLaunch, bfloat: bool, index: int) -> Kernel:
    options = few_options(layout, launch, bfloat, starts_early(index))
    return kernel(few_source(layout), "structured_few", options, index)


def launch_few(
    x: Tensor,
    tensors: list[Tensor],
    bias: Tensor | None,
    layout: Layout,
    shape: tuple[int, int],
    launch: FewLaunch,
) -> Tensor:
    """x (m, columns) times the packed weight of `shape` (rows, columns) by a given launch."""
    rows, columns = shape
    given, tensors, index = tensors, aligned(tensors), x.device.index
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    parts = x.new_empty(launch.splits, x.shape[0], -(-rows // ROWS) * ROWS, dtype=torch.float32)
    with torch.cuda.device(x.device):
        run = _compiled(layout, launch, x.dtype == torch.bfloat16, index)
        arguments: list[Argument] = [
            ctypes.c_void_p(x.data_ptr()),
            weight_of(layout, tensors, rows, columns),
            ctypes.c_void_p(None if bias is None else bias.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_void_p(parts.data_ptr()),
            *(ctypes.c_int(number) for number in (x.shape[0], launch.slices, launch.rows)),
        ]
        early = waits_for_nothing(index, given, tensors)
        run.launch(launch.grid, launch.threads, launch.shared, arguments, early=early, cluster=launch.splits)
    return out
