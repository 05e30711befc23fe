"""What the CUDA kernels need to know of a packed weight, read off its format: one description for all formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from whit.formats.base import Format
from whit.formats.binary_residual import BinaryResidual
from whit.formats.bits import packed_width
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.formats.nm_index import WIDEST_RANKED, index_bytes, word_of_groups
from whit.formats.signed_levels import MAGNITUDES, SignedLevels
from whit.formats.structured_binary import StructuredBinary
from whit.formats.vector_codebook import VectorCodebook

WIDEST = 1 << 16
"""Columns above which the partial sums of a row would not fit the shared memory of every device."""
WHOLE_ROW = 1 << 30
"""`group` when one group spans the row."""
WIDEST_CODEBOOK = 1 << 15
"""Bytes of a decoded codebook that a kernel keeps in shared memory."""
BINARY_RESIDUAL = 0
GROUPED_INTEGER = 2
VECTOR_CODEBOOK = 3
STRUCTURED_BINARY = 4
SIGNED_LEVELS = 5
NUMBERS = {VECTOR_CODEBOOK: ("CODES", "WIDTH", "TERNARY"), STRUCTURED_BINARY: ("KEPT", "OF", "WORD_GROUPS", "REGIONS")}
"""Names of `Layout.numbers` in the sources, by kind."""


@dataclass(frozen=True)
class Layout:
    """Compile-time facts of a kernel.

    `kind` numbers the format, `bits` is per code, `scalars` the 16-bit scalars per group, `group` the columns that
    share them, `width` the bytes of a packed row, `groups` the groups per row; `names` are the stored tensors in the
    order codes, second codes, salient, scalars, zeros ("" where there is none; `zeros` also serves for a codebook or
    regions). `numbers` are further constants of the kind.
    """

    kind: int
    bits: int
    scalars: int
    asymmetric: bool
    group: int
    width: int
    groups: int
    names: tuple[str, str, str, str, str]
    numbers: tuple[int, ...] = ()

    @property
    def aligned(self) -> int:
        """The largest of 16, 4 and 1 that divides the bytes of a packed row."""
        return 16 if self.width % 16 == 0 else 4 if self.width % 4 == 0 else 1

    @property
    def multiplies(self) -> bool:
        """Whether `gemv` and `small` multiply it."""
        supported_bits = {0: (1,), 1: (1, 2), 2: (1, 2, 3, 4, 8), 5: (1,)}.get(self.kind, ())
        narrow = self.width <= packed_width(WIDEST, self.bits)
        return self.bits in supported_bits and self.group % 64 == 0 and narrow

    @property
    def planes(self) -> int:
        """Stored tensors that hold codes (PLANES)."""
        return {BINARY_RESIDUAL: 2, SIGNED_LEVELS: 3}.get(self.kind, 1)

    @property
    def expands(self) -> bool:
        """Whether `small` multiplies it."""
        return self.multiplies and self.kind != SIGNED_LEVELS

    @property
    def decodes(self) -> bool:
        """Whether `decode` reads it: the planes of signed levels are codes that it does not know."""
        return self.kind != SIGNED_LEVELS

    def span(self, columns: int) -> int:
        """Columns that one vector meets: signed levels have marked ones once more."""
        return 8 * self.width if self.kind == SIGNED_LEVELS else columns

    @property
    def bitwise(self) -> bool:
        """Whether one vector is multiplied as bit planes (`bits.cuh`), not as limbs (`limbs.cuh`)."""
        return self.bits <= 4 and self.group % (128 if self.kind == BINARY_RESIDUAL else 64) == 0

    @property
    def raw_pairs(self) -> bool:
        """Whether codes of two bits meet one vector unparted: integers in groups of 64."""
        return self.kind == GROUPED_INTEGER and self.bits == 2 and self.group % 128 != 0

    @property
    def crowded(self) -> bool:
        """Whether two sets of blocks at once need more registers than 256 threads have in half a multiprocessor."""
        return self.raw_pairs or (self.kind == BINARY_RESIDUAL and self.group % 256 != 0)

    @property
    def operand_bytes(self) -> int:
        """Bytes that 128 columns of one vector take as bit planes (X_WORDS)."""
        if self.kind == GROUPED_INTEGER and (self.bits > 2 or self.raw_pairs):
            return 1216 if self.bits == 3 and self.group % 128 == 0 else 832 if self.bits == 2 else 1680
        return 512 if self.kind == BINARY_RESIDUAL else 256

    def item_groups(self, item: int) -> int:
        """Groups that an item of `item` columns can touch (GROUPS_IN_ITEM in the sources)."""
        group = self.group
        return 1 if group % item == 0 else item // group if item % group == 0 else item // group + 2

    def piece(self, item: int) -> int:
        """Bytes in which the scalars of a row of an item can be copied (PIECE)."""
        size = 2 * self.scalars
        if self.group % item and item % self.group:
            return 2
        fits = (p for p in (16, 8, 4) if self.groups * size % p == 0 and self.item_groups(item) * size % p == 0)
        return next(fits, 2)

    def stage_bytes(self, item: int) -> int:
        """Bytes of one item with its scalars in shared memory (STAGE_BYTES)."""
        row = item * self.bits // 8 + (16 if self.bits == 3 else 0)
        halves = self.item_groups(item) * self.scalars
        scalar_words = halves // 2 if self.piece(item) > 2 else (halves + (2 if self.scalars % 2 else 1)) // 2
        zero_words = (self.item_groups(item) * self.bits + 62) // 32 + 1 if self.asymmetric else 0
        return -(-(self.planes * 16 * row + 64 * (scalar_words + zero_words)) // 16) * 16

    def defines(self) -> tuple[str, ...]:
        """Preprocessor options."""
        values = {
            "KIND": self.kind,
            "BITS": self.bits,
            "NS": self.scalars,
            "ASYM": int(self.asymmetric),
            "GROUP": self.group,
            "ALIGN": self.aligned,
            **dict(zip(NUMBERS.get(self.kind, ()), self.numbers, strict=True)),
        }
        return tuple(f"-D{name}={value}" for name, value in values.items())


def _group(size: int, columns: int) -> tuple[int, int]:
    return (size, -(-columns // size)) if 0 < size < columns else (WHOLE_ROW, 1)


def _binary_residual(form: BinaryResidual, columns: int) -> Layout:
    group, groups = _group(form.block_size, columns)
    names = ("signs", "second", "salient", "scalars", "")
    return Layout(0, 1, 7 if form.means else 4, False, group, packed_width(columns, 1), groups, names)


def _level_table(form: LevelTable, columns: int) -> Layout:
    group, groups = _group(form.block_size, columns)
    names = ("codes", "", "", "levels", "")
    return Layout(1, form.bits, 2**form.bits, False, group, packed_width(columns, form.bits), groups, names)


def _grouped_integer(form: GroupedInteger, columns: int) -> Layout:
    group, groups = _group(form.group_size, columns)
    names = ("codes", "", "", "scales", "" if form.symmetric else "zeros")
    return Layout(2, form.bits, 1, not form.symmetric, group, packed_width(columns, form.bits), groups, names)


def _vector_codebook(form: VectorCodebook, columns: int) -> Layout:
    names = ("codes", "", "", "scales", "codebook")
    bits, groups = form.code_bits, form.groups(columns)
    numbers = (form.codes, form.width, int(form.ternary))
    return Layout(VECTOR_CODEBOOK, bits, 1, False, WHOLE_ROW, packed_width(groups, bits), groups, names, numbers)


def _structured_binary(form: StructuredBinary, columns: int) -> Layout | None:
    if form.m > WIDEST_RANKED:
        return None
    group, groups = _group(form.block_size, columns)
    names = (
        ("index", "signs", "salient", "scalars", "regions")
        if form.regions > 1
        else ("index", "signs", "", "scalars", "")
    )
    per_word, word_bytes = word_of_groups(columns, form.n, form.m) if form.n < form.m else (1, 1)
    width = index_bytes(columns, form.n, form.m)
    numbers = (form.n, form.m, per_word, form.regions)
    return Layout(STRUCTURED_BINARY, word_bytes, form.scalars, False, group, width, groups, names, numbers)


def _signed_levels(form: SignedLevels, columns: int) -> Layout:
    names = ("signs", "low", "salient", "scalars", "high")
    width = form.specs(1, columns)["signs"].shape[1]
    return Layout(SIGNED_LEVELS, 1, MAGNITUDES, False, WHOLE_ROW, width, 1, names)


_READERS: dict[type[Format], Callable[[Any, int], Layout | None]] = {
    BinaryResidual: _binary_residual,
    LevelTable: _level_table,
    GroupedInteger: _grouped_integer,
    VectorCodebook: _vector_codebook,
    StructuredBinary: _structured_binary,
    SignedLevels: _signed_levels,
}


def layout_of(form: Format, columns: int) -> Layout | None:
    """The description of a weight of `columns` columns; None if no kernel reads the format or groups of this size."""
    reader = _READERS.get(type(form))
    layout = None if reader is None else reader(form, columns)
    if layout is None or (layout.kind < VECTOR_CODEBOOK and layout.group % 8):
        return None
    return layout
