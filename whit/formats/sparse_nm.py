"""N:M sparsity: of every aligned group of M columns the N kept weights, and which ones they are.

N counts the weights KEPT, M the group, as in "2:4" of NVIDIA's sparse tensor cores. The index is that of
`whit.formats.nm_index`, a row in as few bytes as an exact code needs: 0.667 bits per weight for 2:4, where a bitmap or
two 2-bit places per group take 1. The kept values lie side by side, (rows, columns N / M), in any other format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.formats.base import Format, Packed, TensorSpec, nested_specs, nested_tensors, register_format
from whit.formats.nm_index import decode_mask, encode_mask, index_bytes, kept_in_row


@register_format
@dataclass(frozen=True)
class SparseNM(Format):
    """`n` weights kept of each `m` neighbouring columns, stored in the format `values`.

    A last group of r < m columns keeps ceil(r n / m) of them.
    """

    name: ClassVar[str] = "sparse-nm"
    n: int
    m: int
    values: Format

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"N:M keeps N of each M columns, 1 <= N < M, got {self.n!r}:{self.m!r}")

    def kept(self, columns: int) -> int:
        """Weights kept in each row."""
        return kept_in_row(columns, self.n, self.m)

    def specs(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """index uint8 (rows, bytes), and values_* for (rows, kept)."""
        return {
            "index": TensorSpec((rows, index_bytes(columns, self.n, self.m)), torch.uint8),
            **nested_specs("values", self.values, rows, self.kept(columns)),
        }

    def pack(self, kept: Tensor, values: Packed) -> Packed:
        """Store a mask.

        Args:
            kept: bool (rows, columns), n in each group.
            values: the kept weights in order of columns, packed (rows, kept) in the format `values`.

        Raises:
            ValueError: a group keeps another number of columns.
        """
        stored = {f"values_{name}": tensor for name, tensor in values.tensors.items()}
        return Packed(self, kept.shape[0], kept.shape[1], {"index": encode_mask(kept, self.n, self.m), **stored})

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """float32 (rows, columns): the values in their places, zero elsewhere."""
        inner = nested_tensors("values", self.values, tensors, rows, self.kept(columns)).unpack()
        return scatter(decode_mask(tensors["index"], columns, self.n, self.m), inner)

    def unpack_rows(self, tensors: Mapping[str, Tensor], rows: int, columns: int, index: Tensor) -> Tensor:
        """Only the asked rows are decoded."""
        inner = nested_tensors("values", self.values, tensors, rows, self.kept(columns))
        values = self.values.unpack_rows(inner.tensors, rows, inner.columns, index)
        return scatter(decode_mask(tensors["index"][index], columns, self.n, self.m), values)


def scatter(kept: Tensor, values: Tensor) -> Tensor:
    """Values in order of rows and columns put where a mask (rows, columns) is true: float32, zero elsewhere."""
    return torch.zeros(kept.shape, device=kept.device).masked_scatter_(kept, values)
