"""How the kernels of N:M sparse binary weights (`cuda/structured*.cu`) are built and launched.

They take groups of 8 columns of which 1 to 7 are kept, and scalars of the whole row: what the method `stbllm` makes by
default. Other patterns and blocks of columns are decoded group by group (`cuda/decode_structured.cu`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb, gcd

from whit.kernels.cuda_layout import STRUCTURED_BINARY, WHOLE_ROW, Layout
from whit.kernels.cuda_sources import source_of

GROUP_COLUMNS = 8
ROWS = 16
"""Rows of an item, and of a tile."""
UNIT_GROUPS = 40
"""Groups that a lane decodes in one go, about."""
LONGEST_UNIT = 96
MOST_VECTORS = 16
MOST_WARPS = 20
ENOUGH_WARPS = 12


@dataclass(frozen=True)
class Unit:
    """The shortest run of groups after which index, signs and regions are at the same places again, or several.

    `groups` of 8 columns in `words` of the index, `fives` of kept weights, and the pieces of 16 bytes in which four
    such runs of a row are staged: index, signs, regions.
    """

    groups: int
    words: int
    fives: int
    pieces: tuple[int, int, int]

    @property
    def item_bytes(self) -> int:
        """Bytes of a staged item: 16 rows of 4 units."""
        return ROWS * 16 * sum(self.pieces)

    @property
    def pitch(self) -> int:
        """16-bit elements of x from one unit to the next in shared memory."""
        return 8 * (self.groups | 1)

    def parts(self, columns: int) -> int:
        """Items across a row."""
        return -(-columns // (4 * GROUP_COLUMNS * self.groups))


@lru_cache(maxsize=256)
def unit_of(layout: Layout) -> Unit | None:
    """The unit of a layout; None if these kernels do not read it."""
    if layout.kind != STRUCTURED_BINARY or layout.group != WHOLE_ROW:
        return None
    kept, of, word_groups, regions = layout.numbers
    if of != GROUP_COLUMNS or not 0 < kept < of:
        return None
    shortest = word_groups * (5 // gcd(5, kept * word_groups))
    groups = shortest * max(1, round(UNIT_GROUPS / shortest))
    if groups > LONGEST_UNIT:
        return None
    words, fives = groups // word_groups, groups * kept // 5
    plane = groups * kept
    bits = (words * layout.bits * 8, plane, {1: 0, 2: plane, 3: 8 * fives}[regions])
    index, signs, marks = (((size * 4 + 14) // 8 + 30) // 16 | 1 if size else 0 for size in bits)
    return Unit(groups, words, fives, (index, signs, marks))


def _largest_digit(word_bytes: int, patterns: int, word_groups: int) -> int:
    """The highest last digit that the bytes of a word can hold, valid or not."""
    return int((256**word_bytes - 1) // patterns ** (word_groups - 1))


def _parting(word_bytes: int, patterns: int, word_groups: int) -> tuple[int, int, int, int]:
    """How a word above 32 bits becomes two numbers: digits of the lower, that power, factor and shift of the quotient.

    With V the word, v its highest 32 bits and s = 8 bytes - 32: floor(v factor / 2^32) >> shift, factor =
    floor(2^(32 + t) / power) and shift = t - s, is at most 2^(s - t + 1) < 1 below V / power, so one too small at most.
    """
    digits = next(n for n in range(word_groups - 1, 0, -1) if patterns**n < 2**31)
    power = patterns**digits
    t = power.bit_length() - 1
    if power == 1 << t:
        t -= 1
    factor, shift = (1 << 32 + t) // power, t - (8 * word_bytes - 32)
    if shift < 2 or 256**word_bytes // power >= 1 << 32:
        raise ValueError(f"{word_groups} digits below {patterns} in {word_bytes} bytes cannot be parted in two")
    return digits, power, factor, shift


def tables_of(layout: Layout) -> str:
    """Constants and tables.

    Of a pattern: for each column the place of its weight, 7 for none, and for each weight its column. Of five codes:
    twice the trits of a byte, then five bits, each in a nibble.
    """
    kept, of, word_groups, _ = layout.numbers
    patterns = comb(of, kept)
    entries = []
    for places in combinations(range(of), kept):
        nibbles = [places.index(column) if column in places else 7 for column in range(of)]
        first = sum(nibble << 4 * column for column, nibble in enumerate(nibbles))
        second = sum(column << 4 * place for place, column in enumerate(places))
        entries += [first, second if kept > 4 else second << 16 | first >> 16]
    values = {"PATTERNS": patterns, "PATTERN_TABLE": _largest_digit(layout.bits, patterns, word_groups) + 1}
    if layout.bits > 4:
        names = ("LOW_DIGITS", "LOW_POWER", "HIGH_FACTOR", "HIGH_SHIFT")
        values |= dict(zip(names, _parting(layout.bits, patterns, word_groups), strict=True))
    defines = "".join(f"#define {name} {value}u\n" for name, value in values.items())
    fives = [sum(byte // 3**i % (3 if i < 4 else 4) << 4 * i + 1 for i in range(5)) for byte in range(256)]
    fives += [sum((bits >> i & 1) << 4 * i for i in range(5)) for bits in range(32)]
    return defines + _array("places_of_pattern", entries) + _array("codes_of_five", fives)


def _array(name: str, entries: list[int]) -> str:
    values = ", ".join(f"{entry}u" for entry in entries)
    return f"__device__ const __align__(8) u32 {name}[] = {{{values}}};\n"


def table_bytes(layout: Layout) -> int:
    """Bytes of the tables in shared memory, an entry 32 times."""
    kept, of, word_groups, regions = layout.numbers
    patterns = _largest_digit(layout.bits, comb(of, kept), word_groups) + 1
    return 128 * (2 * patterns + (256 if regions == 3 else 0) + 32)


@lru_cache(maxsize=64)
def structured_source(layout: Layout, name: str) -> str:
    """The CUDA C++ of `structured_product`."""
    return source_of("common.cuh", "clusters.cuh") + tables_of(layout) + source_of("structured.cu", f"{name}.cu")


def structured_options(
    layout: Layout, unit: Unit, threads: int, tokens: int, bfloat: bool, early: bool, splits: int = 1
) -> tuple[str, ...]:
    """Preprocessor options of both; `tokens`: 1, 8 or 16 vectors."""
    facts = (option for option in layout.defines() if not option.startswith("-DALIGN"))  # which rows differ in
    values = {
        "BF16": bfloat,
        "EARLY": early,
        "THREADS": threads,
        "TOKENS": tokens,
        "UNIT": unit.groups,
        "ALIGN": 1,
        "SPLITS": splits,
    }
    return (*facts, *(f"-D{key}={int(value)}" for key, value in values.items()))


@dataclass(frozen=True)
class StructuredLaunch:
    """`grid` blocks of `threads`, clusters of `splits`, `parts` items across a row, `tiles` row tiles a round, `shared`
    bytes, for up to `tokens` vectors."""

    grid: int
    threads: int
    parts: int
    tiles: int
    shared: int
    tokens: int
    splits: int = 1


def structured_launch(
    layout: Layout,
    rows: int,
    columns: int,
    vectors: int,
    memory: int,
    clusters_at_once: Mapping[int, int],
    most_warps: int = MOST_WARPS,
    split: bool | None = None,
) -> StructuredLaunch | None:
    """The launch of `structured_product`; None if it cannot take the call.

    Args:
        layout: of the weight.
        rows: outputs.
        columns: inputs.
        vectors: of x.
        memory: bytes of shared memory that a block may have.
        clusters_at_once: as for `codebook_plan.place_codebook`.
        most_warps: of a block.
        split: whether the columns are split over a cluster; if not given, where x leaves no room for enough warps.
    """
    unit = unit_of(layout)
    if unit is None or columns % GROUP_COLUMNS or not 1 <= vectors <= MOST_VECTORS:
        return None
    tokens = 1 if vectors == 1 else 8 if vectors <= 8 else 16
    tiles, parts = -(-rows // ROWS), unit.parts(columns)
    found = None
    for splits in (1, parts) if split is None else (parts,) if split else (1,):
        room = clusters_at_once.get(splits, 0)
        if room == 0:
            continue
        blocks, here = min(tiles, room), parts // splits
        pitch = here * 4 * unit.pitch
        if tokens > 1:
            pitch += 96 - pitch % 64
        marks = here * (4 * 8 * (unit.groups | 1) + 16) if layout.numbers[3] > 1 else 0
        fixed = table_bytes(layout) + tokens * pitch * 2 + marks + 16
        per_tile = here * ROWS * tokens * 4
        needed = -(-tiles // blocks)
        useful = min(most_warps, 16 if tokens > 1 else most_warps, -(-needed * here // 2) * 2)
        warps = min(useful, (memory - fixed - per_tile) // unit.item_bytes // 2 * 2)
        in_one_round = (memory - fixed - needed * per_tile) // unit.item_bytes // 2 * 2
        if ENOUGH_WARPS <= in_one_round < warps:
            warps = in_one_round
        while warps > 2 and min(needed, (memory - fixed - warps * unit.item_bytes) // per_tile) * here < warps:
            warps -= 2  # a round must hold an item for every warp
        if warps < 2:
            continue
        rounds = -(-needed // min(needed, (memory - fixed - warps * unit.item_bytes) // per_tile))
        per_round = -(-needed // rounds)
        shared = fixed + warps * unit.item_bytes + per_round * per_tile
        found = StructuredLaunch(blocks * splits, 32 * warps, parts, per_round, shared, tokens, splits)
        if warps >= min(useful, ENOUGH_WARPS):
            break
    return found
