"""How the weight of each format is decoded to 16 bits: the source, its tables and its launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb

from whit.kernels.cuda_layout import STRUCTURED_BINARY, VECTOR_CODEBOOK, WIDEST_CODEBOOK, Layout
from whit.kernels.cuda_sources import source_of

OCTETS, CODEWORDS, PATTERNS, CODEBOOK, GROUPS = (
    "decode.cu",
    "decode_codewords.cu",
    "decode_patterns.cu",
    "decode_codebook.cu",
    "decode_structured.cu",
)
"""Sources of `decode`: of codes of few bits, of numbers of codewords in bytes, of N:8; of any codebook and any N:M."""
_SLOW = (CODEBOOK, GROUPS)
SMALLEST_GROUP = 64
"""Columns of a group of N:8 weights of which there is room for the levels of an item."""


@dataclass(frozen=True)
class DecodeShape:
    """`threads` of a block, each eight columns of `rows` rows at a time, and how many blocks a multiprocessor must have
    room for."""

    threads: int = 256
    rows: int = 4
    resident: int = 4


SHAPE = DecodeShape()


def decode_way(layout: Layout, columns: int) -> str:
    """The file of the kernel that decodes a weight of `columns` columns.

    Raises:
        ValueError: there is none.
    """
    if not layout.decodes:
        raise ValueError("no kernel decodes signed levels: decode the weight that they were made of")
    if layout.kind == VECTOR_CODEBOOK:
        codes, width, _ = layout.numbers
        fast = layout.bits == 8 and width % 4 == 0 and 2 * codes * width <= WIDEST_CODEBOOK
        return CODEWORDS if fast else CODEBOOK
    if layout.kind == STRUCTURED_BINARY:
        kept, of, _, _ = layout.numbers
        few_cells = layout.group % of == 0 and layout.group >= SMALLEST_GROUP
        return PATTERNS if of == 8 and 0 < kept < of and columns % of == 0 and few_cells else GROUPS
    return OCTETS


@lru_cache(maxsize=64)
def decode_source(layout: Layout, columns: int) -> str:
    """The CUDA C++ of `decode` for a weight."""
    way = decode_way(layout, columns)
    before = ""
    if way == PATTERNS:
        before = _entries(layout.numbers[0], layout.numbers[1], layout.bits, layout.numbers[2])
    elif way == GROUPS:
        before = _bits(*layout.numbers[:2])
    return source_of("common.cuh", "pairs.cuh") + before + source_of(way)


def decode_options(layout: Layout, bfloat: bool, early: bool = False, shape: DecodeShape = SHAPE) -> tuple[str, ...]:
    """Preprocessor options of `decode`; `early` asks for programmatic dependent launch."""
    values = {
        "BF16": bfloat,
        "EARLY": early,
        "THREADS": shape.threads,
        "ROWS": shape.rows,
        "RESIDENT": shape.resident,
    }
    return (*layout.defines(), *(f"-D{key}={int(value)}" for key, value in values.items()))


def decode_shared(layout: Layout, columns: int, shape: DecodeShape = SHAPE) -> int:
    """Bytes of shared memory of a block of `decode`."""
    way, stripe = decode_way(layout, columns), 8 * shape.threads
    if way == GROUPS:
        return 0
    if way in (CODEWORDS, CODEBOOK):  # 16 bits an entry, or half of them in 32
        return 2 * layout.numbers[0] * layout.numbers[1]
    cells = 1 if layout.group % stripe == 0 else stripe // layout.group + (2 if stripe % layout.group else 0)
    if way == OCTETS:  # two sets of what scales the groups of an item
        return 2 * shape.rows * cells * 16
    kept, of, word_groups, regions = layout.numbers
    words = (shape.threads + word_groups - 2) // word_groups + 1
    region_bytes = {1: 0, 2: shape.threads * kept // 8 + 3, 3: shape.threads * kept // 5 + 3}[regions]
    parts = (words * layout.bits, shape.threads * kept // 8 + 2, region_bytes, cells * layout.scalars * 2)
    staged = sum(_staged(size) for size in parts if size)
    digits = -(-words * word_groups // 4) * 4
    tables = 128 * comb(of, kept) + (256 * 128 if regions == 3 else 0)
    return tables + shape.rows * (3 * staged + 2 * (32 * cells + digits))


def _staged(size: int) -> int:
    """Bytes in which `size` bytes that begin anywhere are staged by pieces of 16."""
    return (size + 30) // 16 * 16


def decode_grid(layout: Layout, rows: int, columns: int, processors: int, shape: DecodeShape = SHAPE) -> int:
    """Thread blocks of `decode`: as many as are resident, or fewer that have as many items each."""
    if decode_way(layout, columns) in _SLOW:
        return 8 * processors
    stripes, blocks = -(-columns // (8 * shape.threads)), -(-rows // shape.rows)
    abreast = max(1, shape.resident * processors // stripes)
    return stripes * -(-blocks // -(-blocks // abreast))


def _array(kind: str, name: str, values: list[int]) -> str:
    return f"__device__ const __align__(8) {kind} {name}[] = {{{', '.join(f'{value}u' for value in values)}}};\n"


def _entries(kept: int, of: int, word_bytes: int, word_groups: int) -> str:
    """Of every pattern in lexicographic order two words, and the regions of a byte: see `decode_patterns.cu`."""
    entries = []
    for places in combinations(range(of), kept):
        nibbles = [places.index(column) if column in places else 7 for column in range(of)]
        first = sum(nibble << 4 * column for column, nibble in enumerate(nibbles))
        second = sum(column << 4 * place for place, column in enumerate(places))
        entries += [first, second if kept > 4 else second << 16 | first >> 16]
    regions = [sum(byte // 3**i % 3 << 4 * i + 1 for i in range(5)) for byte in range(256)]
    tables = _array("u32", "entries_of_pattern", entries) + _array("u32", "codes_of_byte", regions)
    return f"#define PATTERNS {comb(of, kept)}u\n" + _parting(word_bytes, comb(of, kept), word_groups) + tables


def _parting(word_bytes: int, patterns: int, word_groups: int) -> str:
    """How a word above 32 bits becomes two numbers: digits of the lower, that power, factor and shift of the quotient.

    With V the word, v its highest 32 bits and s = 8 bytes - 32: floor(v factor / 2^32) >> shift, factor =
    floor(2^(32 + t) / power) and shift = t - s, is at most 2^(s - t + 1) < 1 below V / power, so one too small at most.
    """
    if word_bytes <= 4:
        return ""
    digits = next(n for n in range(word_groups - 1, 0, -1) if patterns**n < 2**31)
    power = patterns**digits
    t = power.bit_length() - (2 if power & (power - 1) == 0 else 1)
    factor, shift = (1 << 32 + t) // power, t - (8 * word_bytes - 32)
    values = {"LOW_DIGITS": digits, "LOW_POWER": power, "HIGH_FACTOR": factor, "HIGH_SHIFT": shift}
    return "".join(f"#define {name} {value}u\n" for name, value in values.items())


def _bits(kept: int, of: int) -> str:
    """Kept columns of every N:M pattern in lexicographic order, one bit each; the five trits of a byte, two each."""
    patterns = [sum(1 << place for place in places) for places in combinations(range(of), kept)]
    trits = [sum(byte // 3**i % 3 << 2 * i for i in range(5)) for byte in range(256)]
    tables = _array("u16", "columns_of_pattern", patterns) + _array("u16", "trits_of_byte", trits)
    return f"#define PATTERNS {comb(of, kept)}\n" + tables
