"""How the weight of each format is decoded to 16 bits: the source, its tables and its launch."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from math import comb

from whit.kernels.cuda_layout import BINARY_RESIDUAL, STRUCTURED_BINARY, VECTOR_CODEBOOK, Layout
from whit.kernels.cuda_plan import source_of

THREADS = 256
ROWS, STRIPE = 8, 8 * THREADS
"""Rows and columns that a thread block of `decode.cu` takes at a time."""
_FILES = {VECTOR_CODEBOOK: ("decode_codebook.cu",), STRUCTURED_BINARY: ("decode_structured.cu",)}


@lru_cache(maxsize=64)
def decode_source(layout: Layout) -> str:
    """The CUDA C++ of `decode` for a layout."""
    tables = _tables(*layout.numbers[:2]) if layout.kind == STRUCTURED_BINARY else ""
    return source_of("common.cuh") + tables + source_of(*_FILES.get(layout.kind, ("pairs.cuh", "decode.cu")))


def decode_options(layout: Layout, bfloat: bool) -> tuple[str, ...]:
    """Preprocessor options of `decode`."""
    values = {"BF16": bfloat, "EARLY": 0, "PIECE": layout.piece(128), "THREADS": THREADS, "ITEM": 128}
    return (*layout.defines(), *(f"-D{key}={int(value)}" for key, value in values.items()))


def decode_shared(layout: Layout) -> int:
    """Bytes of shared memory of `decode`: half a codebook in float32, or the levels of its groups, two sets each."""
    if layout.kind == VECTOR_CODEBOOK:
        return 2 * layout.numbers[0] * layout.numbers[1]
    return ROWS * 16 * (STRIPE // layout.group + 2) if layout.kind == BINARY_RESIDUAL else 0


def decode_grid(layout: Layout, rows: int, columns: int, processors: int) -> int:
    """Thread blocks of `decode`: one for every eight rows of a stripe of columns, or as many as are resident."""
    if layout.kind in _FILES:
        return 8 * processors
    return -(-rows // ROWS) * -(-columns // STRIPE)


def _tables(kept: int, group: int) -> str:
    """Kept columns of every N:M pattern in lexicographic order, one bit each; the five trits of a byte, two each."""
    patterns = [sum(1 << place for place in places) for places in combinations(range(group), kept)]
    trits = [sum(byte // 3**i % 3 << 2 * i for i in range(5)) for byte in range(256)]
    return (
        f"#define PATTERNS {comb(group, kept)}\n"
        f"__device__ const u16 columns_of_pattern[] = {{{', '.join(map(str, patterns))}}};\n"
        f"__device__ const u16 trits_of_byte[] = {{{', '.join(map(str, trits))}}};\n"
    )
