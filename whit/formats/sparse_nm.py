"""N:M sparsity: of every aligned group of M columns the N kept weights, and which ones they are.

N counts the weights KEPT, M the group, as in "2:4" of NVIDIA's sparse tensor cores. There are C = binomial(M, N)
patterns; a group's pattern is stored as its rank in the combinatorial number system,

    rank = sum_i binomial(p_i, i),      p_1 < ... < p_N the kept places (from 0) of the group,

and the ranks of g neighbouring groups as one number of b = ceil(g log2 C) bits, rank_1 + C rank_2 + C^2 rank_3 + ...
(g and b are chosen by `coding`). For 2:4 that is a byte for three groups, 2/3 bit per weight, where a bitmap or two
2-bit places per group take 1 bit, and no code can take less than log2(6) / 4 = 0.646. Each row is padded to whole codes
and bytes. The kept values lie side by side, (rows, columns N / M), in any other format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from whit.formats.base import Format, Packed, TensorSpec, nested_specs, nested_tensors, register_format
from whit.formats.bits import pack_codes, packed_width, unpack_codes

LARGEST_GROUP = 32
_LONGEST_CODE = 16  # bits; codes up to this length are decoded by a table
_WORTH_LONGER_CODES = 1.03


@register_format
@dataclass(frozen=True)
class SparseNM(Format):
    """`n` weights kept of each `m` neighbouring columns, stored in the format `values`."""

    name: ClassVar[str] = "sparse-nm"
    n: int
    m: int
    values: Format

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m <= LARGEST_GROUP:
            raise ValueError(f"N:M keeps N of each M columns, 1 <= N < M <= {LARGEST_GROUP}, got {self.n!r}:{self.m!r}")

    def kept(self, columns: int) -> int:
        """Weights kept in each row.

        Raises:
            ValueError: the columns are not divisible into groups.
        """
        if columns % self.m:
            raise ValueError(f"{columns} columns cannot be divided into groups of {self.m}")
        return columns // self.m * self.n

    def specs(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """index uint8 (rows, bytes), and values_* for (rows, columns n / m)."""
        groups, bits = coding(self.n, self.m)
        codes = -(-columns // (self.m * groups))
        return {
            "index": TensorSpec((rows, packed_bytes(codes * bits)), torch.uint8),
            **nested_specs("values", self.values, rows, self.kept(columns)),
        }

    def pack(self, kept: Tensor, values: Packed) -> Packed:
        """Store a mask.

        Args:
            kept: bool (rows, columns), n in each group.
            values: the kept weights in order of columns, packed (rows, columns n / m) in the format `values`.
        """
        rows, columns = kept.shape
        grouped = kept.reshape(rows, -1, self.m)
        if not bool((grouped.sum(-1) == self.n).all()):
            raise ValueError(f"the mask does not keep {self.n} of each {self.m} columns")
        stored = {f"values_{name}": tensor for name, tensor in values.tensors.items()}
        return Packed(self, rows, columns, {"index": self._encode(grouped), **stored})

    def mask(self, index: Tensor, columns: int) -> Tensor:
        """The mask that an index (rows, bytes) stands for: bool (rows, columns)."""
        groups, bits = coding(self.n, self.m)
        rows, length = index.shape[0], columns // self.m
        count = -(-length // groups)
        if bits == 8:
            codes = index.int()
        else:
            places = unpack_codes(index, 1, count * bits, torch.int32).reshape(rows, count, bits)
            codes = (places << torch.arange(bits, dtype=torch.int32, device=index.device)).sum(-1, dtype=torch.int32)
        if bits > _LONGEST_CODE:
            return places_of(codes, self.n, self.m).reshape(rows, columns)
        table = _pattern_table(self.n, self.m, index.device)
        return table.index_select(0, codes.reshape(-1)).reshape(rows, -1)[:, :columns]

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """float32 (rows, columns): the values in their places, zero elsewhere."""
        inner = nested_tensors("values", self.values, tensors, rows, self.kept(columns)).unpack()
        kept = self.mask(tensors["index"], columns)
        return torch.zeros(rows, columns, device=kept.device).masked_scatter_(kept, inner)

    def unpack_rows(self, tensors: Mapping[str, Tensor], rows: int, columns: int, index: Tensor) -> Tensor:
        """Only the asked rows are decoded."""
        inner = nested_tensors("values", self.values, tensors, rows, self.kept(columns))
        values = self.values.unpack_rows(inner.tensors, rows, inner.columns, index)
        kept = self.mask(tensors["index"][index], columns)
        return torch.zeros(len(index), columns, device=kept.device).masked_scatter_(kept, values)

    def _encode(self, grouped: Tensor) -> Tensor:
        """Index of a mask (rows, groups, m): uint8 (rows, bytes)."""
        groups, bits = coding(self.n, self.m)
        ranks = ranks_of(grouped)
        ranks = torch.nn.functional.pad(ranks, (0, -ranks.shape[1] % groups)).reshape(ranks.shape[0], -1, groups)
        codes = torch.zeros_like(ranks[..., 0])
        for digit in range(groups - 1, -1, -1):
            codes = codes * math.comb(self.m, self.n) + ranks[..., digit]
        places = codes.unsqueeze(-1) >> torch.arange(bits, device=codes.device) & 1
        return pack_codes(places.flatten(1), 1)[:, : packed_bytes(places.shape[1] * bits)]


def packed_bytes(bits: int) -> int:
    """Bytes that `bits` bits take."""
    return packed_width(bits, 1)


@lru_cache(maxsize=64)
def coding(n: int, m: int) -> tuple[int, int]:
    """(groups per code, bits per code) of the index.

    The fewest bits per group among codes of at most 16 bits, and among those within 3 % of it the shortest: bytes are
    decoded fastest. Patterns too many for 16 bits have a code for each group.
    """
    patterns = math.comb(m, n)
    choices = [(groups, (patterns**groups - 1).bit_length()) for groups in range(1, _LONGEST_CODE + 1)]
    short = [(groups, bits) for groups, bits in choices if bits <= _LONGEST_CODE]
    if not short:
        return choices[0]
    fewest = min(bits / groups for groups, bits in short)
    return min(
        ((groups, bits) for groups, bits in short if bits / groups <= _WORTH_LONGER_CODES * fewest),
        key=lambda choice: (choice[1], -choice[0]),
    )


def ranks_of(kept: Tensor) -> Tensor:
    """Rank of each pattern: bool (..., m) -> int64 (...), by the equation at the top of this file."""
    size = kept.shape[-1]
    ordinal = kept.cumsum(-1, dtype=torch.int32)
    place = torch.arange(size, device=kept.device) * (size + 1)
    return (_binomials(size, kept.device)[ordinal + place] * kept).sum(-1)


def places_of(ranks: Tensor, n: int, m: int) -> Tensor:
    """Inverse of `ranks_of`: integer (...) -> bool (..., m) with n places kept."""
    binomials = _binomials(m, ranks.device)
    rest, left = ranks.long(), torch.full_like(ranks, n, dtype=torch.int64)
    out = torch.zeros(*ranks.shape, m, dtype=torch.bool, device=ranks.device)
    for place in range(m - 1, -1, -1):
        step = binomials[left + place * (m + 1)]
        taken = (left > 0) & (rest >= step)
        out[..., place] = taken
        rest, left = rest - step * taken, left - taken.long()
    return out


@lru_cache(maxsize=64)
def _binomials(size: int, device: torch.device) -> Tensor:
    """binomial(place, ordinal) at [place * (size + 1) + ordinal], int64."""
    table = [[math.comb(place, ordinal) for ordinal in range(size + 1)] for place in range(size)]
    return torch.tensor(table, device=device).reshape(-1)


@lru_cache(maxsize=64)
def _pattern_table(n: int, m: int, device: torch.device) -> Tensor:
    """The masks of all codes: bool (2**bits, groups m). Codes that are never written stand for the last digits."""
    groups, bits = coding(n, m)
    codes = torch.arange(2**bits, device=device)
    digits = [codes // math.comb(m, n) ** digit % math.comb(m, n) for digit in range(groups)]
    return torch.cat([places_of(digit, n, m) for digit in digits], 1)
