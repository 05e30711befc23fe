"""How `cuda/codebook_product.cu` is built and launched: one vector times a weight of 256 signed codewords."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from whit.kernels.cuda_layout import VECTOR_CODEBOOK, Layout
from whit.kernels.cuda_plan import source_of

CODES = 256
TILE_GROUPS = 128
TABLE_BYTES = TILE_GROUPS * (CODES // 2) * 4
MOST_SPLITS = 8
"""Blocks of a cluster that every device with clusters takes."""
WIDEST = 64
LEAST_ROWS = 32
"""Rows for which a table is worth being made."""


@dataclass(frozen=True)
class CodebookLaunch:
    """`clusters` of `splits` blocks of `threads`; each block holds `passes` tiles of the table in turn, for
    `rows_each` rows. A multiprocessor has room for `resident` blocks of `shared` bytes."""

    splits: int
    passes: int
    clusters: int
    rows_each: int
    threads: int = 512
    resident: int = 2

    @property
    def grid(self) -> int:
        """Thread blocks."""
        return self.clusters * self.splits

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return TABLE_BYTES + 4 * self.rows_each


def codebook_tiles(layout: Layout) -> int:
    """Tiles of the table of a row."""
    return -(-layout.groups // TILE_GROUPS)


def has_codebook_product(layout: Layout) -> bool:
    """Whether the kernel reads a layout: 256 codes, at most 64 columns each."""
    return layout.kind == VECTOR_CODEBOOK and layout.numbers[0] == CODES and layout.numbers[1] <= WIDEST


def place_codebook(
    layout: Layout,
    rows: int,
    processors: int,
    memory: int,
    most_splits: int = MOST_SPLITS,
    threads: int = 512,
    resident: int = 2,
) -> CodebookLaunch | None:
    """The launch on a device with `processors` multiprocessors of `memory` bytes; None if the kernel cannot run.

    Args:
        most_splits: blocks that a cluster may have; 1 where there are no clusters.
        threads: of a block: 512 or 1024.
        resident: blocks for which a multiprocessor has registers.
    """
    if not has_codebook_product(layout):
        return None
    tiles = codebook_tiles(layout)
    passes = -(-tiles // min(most_splits, processors))
    splits = -(-tiles // passes)
    clusters = max(1, min(processors // splits, -(-rows // LEAST_ROWS)))
    rows_each = -(-rows // (4 * clusters)) * 4
    launch = CodebookLaunch(splits, passes, -(-rows // rows_each), rows_each, threads, resident)
    return launch if launch.shared <= memory else None


@lru_cache(maxsize=1)
def codebook_source() -> str:
    """The CUDA C++ of `codebook_product`."""
    return source_of("common.cuh", "codebook_product.cu")


def codebook_options(layout: Layout, launch: CodebookLaunch, bfloat: bool, early: bool) -> tuple[str, ...]:
    """Preprocessor options; `early` asks for programmatic dependent launch."""
    facts = (option for option in layout.defines() if not option.startswith("-DALIGN"))  # which rows differ in
    values = {
        "BF16": bfloat,
        "EARLY": early,
        "PIECE": 2,
        "ITEM": 128,
        "THREADS": launch.threads,
        "SPLITS": launch.splits,
        "RESIDENT": launch.resident,
        "ALIGN": 1,
    }
    return (*facts, *(f"-D{key}={int(value)}" for key, value in values.items()))
