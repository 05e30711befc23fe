"""Scalar quantisers of columns as values: levels, or an integer grid, per row and column group.

Being values and not just functions, they can be handed to a kernel that rounds a whole block of columns at a time
(`whit.kernels.columns`); called, they round one column, which is the plain meaning.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from whit.kernels import columns


@dataclass(frozen=True, eq=False)
class BlockRounder(ABC):
    """Rounds columns by tables.

    Attributes:
        table: float32 (books, entries, rows).
        book: int32 (columns,), which table a column uses; None: all use the first.
    """

    table: Tensor
    book: Tensor | None = None

    @abstractmethod
    def __call__(self, column: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and the values they stand for, (rows,) each, of one column with values (rows,)."""

    @abstractmethod
    def round_block(
        self, first: int, values: Tensor, inner: Tensor, codes: Tensor, errors: Tensor, halves: Tensor | None = None
    ) -> None:
        """Round columns `first`, ... with feedback on the device; arguments as in `whit.kernels.columns`."""

    def fast(self, weight: Tensor) -> bool:
        """Whether `round_block` can be used for this weight."""
        return columns.available(weight.device, masked=self.masked) and weight.dtype == torch.float32

    @property
    def masked(self) -> bool:
        """Whether some weights become zero whatever their value."""
        return False

    def books(self, first: int, count: int) -> Tensor:
        """Numbers of the tables of `count` columns, int32."""
        if self.book is None:
            return torch.zeros(count, dtype=torch.int32, device=self.table.device)
        return self.book[first : first + count].contiguous()

    @cached_property
    def numbers(self) -> list[int] | None:
        """`book` on the host."""
        return None if self.book is None else self.book.tolist()

    def number(self, column: int) -> int:
        """Number of the table of one column."""
        return 0 if self.numbers is None else self.numbers[column]


@dataclass(frozen=True, eq=False)
class LevelRounder(BlockRounder):
    """Nearest of ascending levels, the upper one in the middle; codes are their indices.

    Attributes:
        kept: bool (columns, rows), or None for all: a weight that is not kept becomes zero, its code means nothing.
    """

    kept: Tensor | None = None

    def __call__(self, column: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """One column."""
        number = self.number(column)
        codes = (values >= self.middles[number]).sum(0)
        rounded = self.table[number].gather(0, codes.unsqueeze(0)).squeeze(0)
        return codes, rounded if self.kept is None else rounded * self.kept[column]

    @property
    def masked(self) -> bool:
        """Whether there is a mask."""
        return self.kept is not None

    def _kept(self, first: int, count: int) -> Tensor | None:
        return None if self.kept is None else self.kept[first : first + count]

    @cached_property
    def middles(self) -> Tensor:
        """Halfway between neighbouring levels, (books, levels - 1, rows)."""
        return (self.table[:, 1:] + self.table[:, :-1]) * 0.5

    def round_block(
        self, first: int, values: Tensor, inner: Tensor, codes: Tensor, errors: Tensor, halves: Tensor | None = None
    ) -> None:
        """A block of columns on the device."""
        kept = self._kept(first, len(values))
        columns.feedback_levels(values, inner, self.table, self.books(first, len(values)), codes, errors, kept, halves)

    def descend_block(
        self,
        first: int,
        values: Tensor,
        gradient: Tensor,
        inner: Tensor,
        codes: Tensor,
        change: Tensor,
        halves: Tensor | None = None,
    ) -> None:
        """Coordinate descent over columns `first`, ... on the device; arguments as in `whit.kernels.columns`."""
        kept, books = self._kept(first, len(values)), self.books(first, len(values))
        columns.descend_levels(values, gradient, inner, self.table, books, codes, change, kept, halves)


@dataclass(frozen=True, eq=False)
class GridRounder(BlockRounder):
    """Integer grids: table[:, 0] holds scales, table[:, 1] whole zero points; w = scale * (code - zero).

    Attributes:
        bits: of the codes, 0 <= code < 2**bits.
    """

    bits: int = 8

    def __call__(self, column: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """One column."""
        number = self.number(column)
        scale, zero = self.table[number]
        codes = (values / self.divisors[number]).round_().add_(zero).clamp_(0, 2**self.bits - 1)
        return codes, (codes - zero).mul_(scale)

    @cached_property
    def divisors(self) -> Tensor:
        """The scales, or 1 where a scale is 0: every code there means zero; (books, rows)."""
        scale = self.table[:, 0]
        return torch.where(scale == 0, torch.ones_like(scale), scale)

    def round_block(
        self, first: int, values: Tensor, inner: Tensor, codes: Tensor, errors: Tensor, halves: Tensor | None = None
    ) -> None:
        """A block of columns on the device."""
        books = self.books(first, len(values))
        columns.feedback_grid(values, inner, self.table, books, self.bits, codes, errors, halves)


def join_rounders(
    rounders: Sequence[Callable[[int, Tensor], tuple[Tensor, Tensor]]], step: int, order: Tensor
) -> BlockRounder | None:
    """One rounder for columns taken in `order`, from one per group of `step` neighbours; None if they do not allow it.

    Args:
        rounders: each made for its group alone, or a single one for all columns by their natural number.
    """
    first = rounders[0]
    if not isinstance(first, BlockRounder):
        return None
    if len(rounders) == 1:
        return first if first.book is None else dataclasses.replace(first, book=first.book[order])
    same = [item for item in rounders if isinstance(item, BlockRounder) and type(item) is type(first)]
    if len(same) < len(rounders) or any(item.book is not None or len(item.table) > 1 for item in same):
        return None
    table = torch.cat([item.table for item in same])
    return dataclasses.replace(first, table=table, book=(order // step).to(torch.int32))
