"""How `cuda/codebook_product.cu` is built and launched: one vector times a weight of 256 signed codewords."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from whit.kernels.cuda_layout import VECTOR_CODEBOOK, Layout
from whit.kernels.cuda_sources import source_of

CODES = 256
TILE_GROUPS = 128
TABLE_BYTES = TILE_GROUPS * (CODES // 2) * 4
SHARES = {2: 132, 3: 117, 4: 120, 5: 100, 6: 90, 7: 105, 8: 120}
"""By blocks of a cluster, how many of an H200's 132 multiprocessors such clusters can fill, whose groups differ in
size. Found by trying for 3, 4 and 8; with one cluster more, the last would wait for or share with another."""
BATCH = 8
"""Rows that a warp looks up at a time."""
TABLE_TIME, BATCH_TIME, CLUSTER_TIME = 1.25, 0.85, 1.5
"""Measured on an H200 in microseconds: a tile of the table, a batch of every warp, a cluster of more than two."""
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
    resident: int = 1

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


def clusters_at_once(processors: int, clusters: bool) -> dict[int, int]:
    """By blocks of a cluster, how many run at a time, each block on a multiprocessor of its own.

    Args:
        processors: multiprocessors of the device.
        clusters: the device has them.
    """
    larger = {size: processors * share // (132 * size) for size, share in SHARES.items()} if clusters else {}
    return {1: processors} | larger


def place_codebook(
    layout: Layout, rows: int, memory: int, clusters_at_once: Mapping[int, int], resident: int = 1
) -> CodebookLaunch | None:
    """The launch of the least estimated time; None if the kernel cannot run.

    Args:
        layout: of the weight.
        rows: outputs.
        memory: bytes of shared memory that a block may have.
        clusters_at_once: see there.
        resident: blocks for which a multiprocessor has registers.
    """
    if not has_codebook_product(layout):
        return None
    tiles = codebook_tiles(layout)
    found: list[tuple[float, CodebookLaunch]] = []
    for most, room in clusters_at_once.items():
        if room == 0:
            continue
        passes = -(-tiles // most)
        splits = -(-tiles // passes)
        if splits < most:
            continue
        clusters = min(room, -(-rows // LEAST_ROWS))
        rows_each = -(-rows // (BATCH * clusters)) * BATCH
        launch = CodebookLaunch(splits, passes, -(-rows // rows_each), rows_each, resident=resident)
        if launch.shared <= memory:
            batches = -(-rows_each // (BATCH * launch.threads // 32))
            found.append((passes * (TABLE_TIME + batches * BATCH_TIME) + CLUSTER_TIME * (splits > 2), launch))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def place_codebooks(
    layout: Layout, rows: Sequence[int], memory: int, clusters_at_once: Mapping[int, int]
) -> tuple[CodebookLaunch, list[int]] | None:
    """One launch for several weights of these rows, and the clusters of each; None if the kernel cannot run.

    All run at once: blocks take as many rows as that needs.
    """
    single = place_codebook(layout, sum(rows), memory, clusters_at_once)
    if single is None:
        return None
    most = clusters_at_once.get(single.splits, single.clusters)
    rows_each = single.rows_each
    while sum(-(-count // rows_each) for count in rows) > max(most, len(rows)):
        rows_each += BATCH
    clusters = [-(-count // rows_each) for count in rows]
    launch = replace(single, clusters=sum(clusters), rows_each=rows_each)
    return (launch, clusters) if launch.shared <= memory else None


@lru_cache(maxsize=1)
def codebook_source() -> str:
    """The CUDA C++ of `codebook_product`."""
    return source_of("common.cuh", "clusters.cuh", "inputs.cuh", "codebook_product.cu")


def codebook_options(layout: Layout, launch: CodebookLaunch, bfloat: bool, early: bool) -> tuple[str, ...]:
    """Preprocessor options; `early` asks for programmatic dependent launch."""
    facts = (option for option in layout.defines() if not option.startswith("-DALIGN"))  # which rows differ in
    values = {
        "BF16": bfloat,
        "EARLY": early,
        "THREADS": launch.threads,
        "SPLITS": launch.splits,
        "RESIDENT": launch.resident,
        "ALIGN": 1,
    }
    return (*facts, *(f"-D{key}={int(value)}" for key, value in values.items()))
