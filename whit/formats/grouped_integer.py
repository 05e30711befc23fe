"""Integer codes with one float16 scale (and, when asymmetric, one integer zero point) per row and column group.

    asymmetric:            w = scale * (code - zero)            code, zero in [0, 2**bits)
    symmetric, bits > 1:   w = scale * (code - 2**(bits - 1))
    symmetric, bits = 1:   w = scale * (2 * code - 1)

Stored bits per weight for group g: bits + (16 [+ bits])/g, plus padding of each row to eight codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.formats.base import Format, Packed, TensorSpec, register_format
from whit.formats.bits import pack_codes, packed_width, unpack_codes


@register_format
@dataclass(frozen=True)
class GroupedInteger(Format):
    """`bits`-bit codes; `group_size` columns share a scale (0: the whole row)."""

    name: ClassVar[str] = "grouped-integer"
    bits: int
    group_size: int
    symmetric: bool

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")
        if self.group_size < 0:
            raise ValueError(f"group_size must be 0 (whole row) or positive, got {self.group_size}")

    def groups(self, columns: int) -> int:
        """Number of column groups; the last one may be partial."""
        return -(-columns // (self.group_size or columns))

    def specs(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """codes uint8 (rows, packed), scales float16 (rows, groups); if asymmetric, zeros uint8, packed flat."""
        groups = self.groups(columns)
        out = {
            "codes": TensorSpec((rows, packed_width(columns, self.bits)), torch.uint8),
            "scales": TensorSpec((rows, groups), torch.float16),
        }
        if not self.symmetric:
            out["zeros"] = TensorSpec((-(-rows * groups // 8) * self.bits,), torch.uint8)
        return out

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Packed:
        """Store integer codes (rows, columns), float16 scales (rows, groups) and integer zeros (rows, groups)."""
        rows, columns = codes.shape
        tensors = {"codes": pack_codes(codes, self.bits), "scales": scales.to(torch.float16).contiguous()}
        if not self.symmetric:
            if zeros is None:
                raise ValueError("an asymmetric format needs zero points")
            tensors["zeros"] = pack_codes(zeros.reshape(-1), self.bits)
        return Packed(self, rows, columns, tensors)

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """float32 (rows, columns) by the equation at the top of this file; every operation is exact."""
        out = unpack_codes(tensors["codes"], self.bits, columns, torch.float32)
        groups = self.groups(columns)
        scale = tensors["scales"].float()
        if not self.symmetric:
            zeros = unpack_codes(tensors["zeros"], self.bits, rows * groups, torch.float32).reshape(rows, groups)
        elif self.bits > 1:
            zeros = torch.full_like(scale, 2 ** (self.bits - 1))
        else:
            scale, zeros = 2 * scale, torch.full_like(scale, 0.5)
        size = self.group_size or columns
        whole = columns // size
        for part, first, last in ((out[:, : whole * size], 0, whole), (out[:, whole * size :], whole, groups)):
            if last > first:
                grouped = part.view(rows, last - first, min(size, part.shape[1]))
                grouped.sub_(zeros[:, first:last, None]).mul_(scale[:, first:last, None])
        return out

    def unpack_rows(self, tensors: Mapping[str, Tensor], rows: int, columns: int, index: Tensor) -> Tensor:
        """Only the asked rows are decoded (zero points, packed across rows, are decoded whole)."""
        part = {"codes": tensors["codes"][index], "scales": tensors["scales"][index]}
        if not self.symmetric:
            groups = self.groups(columns)
            zeros = unpack_codes(tensors["zeros"], self.bits, rows * groups).reshape(rows, groups)[index]
            part["zeros"] = pack_codes(zeros.reshape(-1), self.bits)
        return self.unpack(part, len(index), columns)
