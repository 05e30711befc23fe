"""Unstructured sparsity: one bit per weight says whether it was kept; the kept values lie side by side.

    bit[i, j] = 1:  w[i, j] = the next value in order of rows and columns;      bit[i, j] = 0:  w[i, j] = 0

Stored bits per weight at density d with values of v bits: 1 + d v, plus the padding of each row of bits to whole
bytes. One bit is what the mask costs an ideal coder at d = 1/2; at other densities -d log2 d - (1-d) log2 (1-d) would
do (0.72 bits at d = 1/5), which only a sequential decoder could use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.formats.base import Format, Packed, TensorSpec, nested_specs, nested_tensors, register_format
from whit.formats.bits import pack_codes, packed_width, unpack_codes
from whit.formats.sparse_nm import scatter


@register_format
@dataclass(frozen=True)
class SparseBitmask(Format):
    """`kept` weights of each row (`by_row`), or of the whole matrix when rows differ, in the format `values`.

    The values are a (rows, kept) matrix by row, else a (1, kept) one.
    """

    name: ClassVar[str] = "sparse-bitmask"
    kept: int
    by_row: bool
    values: Format

    def __post_init__(self) -> None:
        if self.kept < 1:
            raise ValueError(f"a sparse matrix keeps at least one weight, got {self.kept!r}")

    def values_shape(self, rows: int) -> tuple[int, int]:
        """Shape of the matrix of kept values."""
        return (rows if self.by_row else 1, self.kept)

    def specs(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """mask uint8 (rows, ceil(columns / 8)), and values_*."""
        return {
            "mask": TensorSpec((rows, packed_width(columns, 1)), torch.uint8),
            **nested_specs("values", self.values, *self.values_shape(rows)),
        }

    def pack(self, kept: Tensor, values: Packed) -> Packed:
        """Store a mask.

        Args:
            kept: bool (rows, columns), `self.kept` in each row or in all.
            values: the kept weights in order, packed in the format and shape of `values`.
        """
        counts = kept.sum(1) if self.by_row else kept.sum().reshape(1)
        if not bool((counts == self.kept).all()):
            raise ValueError(f"the mask does not keep {self.kept} weights{' of each row' if self.by_row else ''}")
        stored = {f"values_{name}": tensor for name, tensor in values.tensors.items()}
        return Packed(self, kept.shape[0], kept.shape[1], {"mask": pack_codes(kept, 1), **stored})

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """float32 (rows, columns): the values in their places, zero elsewhere."""
        inner = nested_tensors("values", self.values, tensors, *self.values_shape(rows)).unpack()
        return scatter(unpack_codes(tensors["mask"], 1, columns, torch.bool), inner)

    def unpack_rows(self, tensors: Mapping[str, Tensor], rows: int, columns: int, index: Tensor) -> Tensor:
        """Only the asked rows are decoded; when rows differ, the others' bits are counted to find the values."""
        kept = unpack_codes(tensors["mask"][index], 1, columns, torch.bool)
        inner = nested_tensors("values", self.values, tensors, *self.values_shape(rows))
        if self.by_row:
            return scatter(kept, self.values.unpack_rows(inner.tensors, rows, self.kept, index))
        counts = unpack_codes(tensors["mask"], 1, columns, torch.bool).sum(1)
        before = (counts.cumsum(0) - counts)[index]
        place = before.unsqueeze(1) + kept.cumsum(1) - 1
        return inner.unpack().reshape(-1)[place.clamp(0, self.kept - 1)] * kept
