"""One or two vectors times a 4:8 sparse binary weight of three regions (`cuda/structured_vector.cu`).

For indices of nine groups in seven bytes, which is what every width from 2248 columns on has, and scalars of the whole
row. Levels become 16-bit fixed point relative to the largest of their row, x one of 31 bits relative to its largest
magnitude; with u the unit roundoff of the type of x, |error| <= u |y| + 2^-16 max_j |w_ij| sum_j |x_j| + 2^-20 sum_j
|w_ij x_j|.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from whit.kernels.cuda_layout import STRUCTURED_BINARY, WHOLE_ROW, Layout
from whit.kernels.cuda_ops import aligned, starts_early, waits_for_nothing, weight_of
from whit.kernels.cuda_sources import source_of
from whit.kernels.nvrtc import Argument, Kernel, kernel
from whit.kernels.structured_plan import GROUP_COLUMNS, ROWS, tables_of

WORD_GROUPS, WORD_BYTES = 9, 7
SLICE_GROUPS = 4 * WORD_GROUPS
TABLES = 128 + 70 * 256 + 81 * 128
"""Bytes of the tables but that of signs, and of barriers."""
SIGN_TABLES = (16 * 128, 256 * 64)
"""Bytes of the table of signs, by one group of columns or by two."""
MOST_AT_ONCE = 2
"""Vectors whose limbs fill the columns of an integer product."""
DEEPEST = 6
MOST_WARPS = {1: 15, 2: 8}
"""Warps of a block that decode, by the blocks that share a multiprocessor. Two of eight, one of which belongs to the
kernel that comes next, are faster than one of fifteen where both find room."""


@dataclass(frozen=True)
class VectorLaunch:
    """`grid` blocks of `threads`, a warp of which asks for the codes of `stage_tiles` row tiles at a time, `depth`
    times ahead; `slices` items across a row, at most `rows` rows of a block, `shared` bytes, for `vectors` of
    `columns`. A multiprocessor has room for `resident` blocks."""

    grid: int
    threads: int
    slices: int
    rows: int
    stage_tiles: int
    depth: int
    shared: int
    vectors: int
    columns: int
    resident: int = 1

    @property
    def x_groups(self) -> int:
        """Groups of columns that a thread brings into limbs."""
        return -(-self.slices * SLICE_GROUPS // self.threads)


def reads_words(layout: Layout) -> bool:
    """Whether the kernels that decode words of the index read a layout."""
    whole_row = layout.kind == STRUCTURED_BINARY and layout.group == WHOLE_ROW
    return whole_row and layout.bits == WORD_BYTES and layout.numbers == (4, GROUP_COLUMNS, WORD_GROUPS, 3)


def _staged(width: int, rows: int) -> int:
    pitch = width + (16 if width % 32 == 0 else 0)
    return (pitch * rows + 31) // 16 * 16


def vector_launch(
    layout: Layout,
    rows: int,
    columns: int,
    processors: int,
    memory: int,
    vectors: int = 1,
    *,
    warps: int | None = None,
) -> VectorLaunch | None:
    """The launch of `structured_vector`; None if it cannot take the call.

    Args:
        layout: of the weight.
        rows: outputs.
        columns: inputs.
        processors: multiprocessors, each of which gets a block.
        memory: bytes of shared memory that a block may have.
        vectors: 1 or 2.
        warps: of a block that decode.
    """
    if not reads_words(layout) or columns % GROUP_COLUMNS or not 1 <= vectors <= MOST_AT_ONCE:
        return None
    groups, tiles = columns // GROUP_COLUMNS, -(-rows // ROWS)
    slices, grid = -(-groups // SLICE_GROUPS), min(tiles, processors)
    most_tiles = -(-tiles // grid)
    widths = (layout.width, -(-groups // 2), -(-groups * 4 // 5))
    fixed = TABLES + SIGN_TABLES[1] + 32 * ROWS * most_tiles + 4 * vectors * (slices * SLICE_GROUPS * 8 + 32) + 80
    fixed += slices * (SLICE_GROUPS * 8 + 4) + vectors * (128 + ROWS * most_tiles * slices * 4) + 16
    for resident in (2, 1):
        most = warps or MOST_WARPS[resident]
        decode = most // slices * slices if slices <= most else -(-slices // -(-slices // most))
        # two tiles at once where there are no more: nothing comes while they are decoded
        stage_tiles = most_tiles if most_tiles <= 2 else max(1, decode // slices)
        stages = -(-most_tiles // stage_tiles)
        each = sum(_staged(width, stage_tiles * ROWS) for width in widths)
        room = memory // resident - 1024 * (resident - 1) - fixed
        depth = min(stages, room // each, DEEPEST)
        if depth >= min(stages, 2):
            return VectorLaunch(
                grid,
                32 * (decode + 1),
                slices,
                ROWS * most_tiles,
                stage_tiles,
                depth,
                fixed + depth * each,
                vectors,
                columns,
                resident,
            )
    return None


def vector_source(layout: Layout) -> str:
    """The CUDA C++."""
    parts = source_of("barriers.cuh", "structured_words.cuh", "structured_vector.cu")
    return source_of("common.cuh") + tables_of(layout) + parts


def vector_options(layout: Layout, launch: VectorLaunch, bfloat: bool, early: bool) -> tuple[str, ...]:
    """Preprocessor options."""
    facts = (option for option in layout.defines() if not option.startswith("-DALIGN"))  # which rows differ in
    values = {
        "BF16": bfloat,
        "EARLY": early,
        "PIECE": 2,
        "ITEM": 128,
        "ALIGN": 1,
        "THREADS": launch.threads,
        "RESIDENT": launch.resident,
        "STAGE_TILES": launch.stage_tiles,
        "DEPTH": launch.depth,
        "X_GROUPS": launch.x_groups,
        "TOKENS": launch.vectors,
        "FIXED": 1,
        "PAIRED": 1,
        "SIGN_WORDS": launch.columns % 64 == 0,
    }
    return (*facts, *(f"-D{key}={int(value)}" for key, value in values.items()))


@lru_cache(maxsize=1024)
def _compiled(layout: Layout, launch: VectorLaunch, bfloat: bool, index: int) -> Kernel:
    options = vector_options(layout, launch, bfloat, starts_early(index))
    return kernel(vector_source(layout), "structured_vector", options, index)


def launch_vector(
    x: Tensor,
    tensors: list[Tensor],
    bias: Tensor | None,
    layout: Layout,
    shape: tuple[int, int],
    launch: VectorLaunch,
) -> Tensor:
    """x (1 or 2, columns) times the packed weight of `shape` (rows, columns) by a given launch."""
    rows, columns = shape
    given, tensors, index = tensors, aligned(tensors), x.device.index
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        run = _compiled(layout, launch, x.dtype == torch.bfloat16, index)
        arguments: list[Argument] = [
            ctypes.c_void_p(x.data_ptr()),
            weight_of(layout, tensors, rows, columns),
            ctypes.c_void_p(None if bias is None else bias.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_int(launch.slices),
            ctypes.c_int(launch.rows),
        ]
        early = waits_for_nothing(index, given, tensors)
        run.launch(launch.grid, launch.threads, launch.shared, arguments, early=early)
    return out
