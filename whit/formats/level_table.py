"""Codes that index a small table of float16 levels, one table per row and column block: scalar quantisation, free form.

    w[i, j] = levels[i, j // block_size, codes[i, j]]

Levels are arbitrary and need not be sorted, so any scalar quantiser with at most 2**bits values per row-block fits.
Stored bits per weight for block b: bits + 16 * 2**bits / b, plus padding of each row to eight codes.
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
class LevelTable(Format):
    """`bits`-bit codes into 2**bits levels; `block_size` columns share a table (0: the whole row)."""

    name: ClassVar[str] = "level-table"
    bits: int
    block_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")
        if self.block_size < 0:
            raise ValueError(f"block_size must be 0 (whole row) or positive, got {self.block_size}")

    def blocks(self, columns: int) -> int:
        """Number of column blocks; the last one may be partial."""
        return -(-columns // (self.block_size or columns))

    def specs(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """codes uint8 (rows, packed), levels float16 (rows, blocks, 2**bits)."""
        return {
            "codes": TensorSpec((rows, packed_width(columns, self.bits)), torch.uint8),
            "levels": TensorSpec((rows, self.blocks(columns), 2**self.bits), torch.float16),
        }

    def pack(self, codes: Tensor, levels: Tensor) -> Packed:
        """Store integer codes (rows, columns) in [0, 2**bits) and float16-rounded levels (rows, blocks, 2**bits)."""
        rows, columns = codes.shape
        tensors = {"codes": pack_codes(codes, self.bits), "levels": levels.to(torch.float16).contiguous()}
        return Packed(self, rows, columns, tensors)

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """float32 (rows, columns) by the equation at the top of this file."""
        codes = unpack_codes(tensors["codes"], self.bits, columns, torch.int64)
        levels = tensors["levels"].float()
        block = torch.arange(columns, device=codes.device) // (self.block_size or columns)
        return levels.flatten(1).gather(1, codes + block * 2**self.bits)

    def unpack_rows(self, tensors: Mapping[str, Tensor], rows: int, columns: int, index: Tensor) -> Tensor:
        """Only the asked rows are decoded."""
        part = {name: tensor[index] for name, tensor in tensors.items()}
        return self.unpack(part, len(index), columns)
