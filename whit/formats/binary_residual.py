"""Two sign planes and a column mark: the layout of BiLLM and its relatives, every stored bit counted.

Each weight has two bits. On ordinary columns the first is its sign and the second says which of two groups
(concentrated or sparse) its magnitude belongs to; on marked ("salient") columns both are signs, of the first
and of the residual binarisation. With s = 2 * bit - 1, per row and column block:

    ordinary, second bit 0:  w = [mean_c +] scale_c * s1
    ordinary, second bit 1:  w = [mean_s +] scale_s * s1
    marked:                  w = [mean   +] scale_1 * s1 + scale_2 * s2

Stored bits per weight for n rows and block b: 2 + 16 * k / b + 1 / n with k = 4 scalars, or 7 when means are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.formats.base import Format, Packed, TensorSpec, register_format
from whit.formats.bits import pack_codes, packed_width, unpack_codes
from whit.kernels.cpu.compiling import runs_compiled, shared_out


@register_format
@dataclass(frozen=True)
class BinaryResidual(Format):
    """`block_size` columns share scalars (0: the whole row); `means` keeps the three offsets.

    Order of the scalars: scale_c, scale_s, scale_1, scale_2, or with means
    mean_c, scale_c, mean_s, scale_s, mean, scale_1, scale_2.
    """

    name: ClassVar[str] = "binary-residual"
    block_size: int
    means: bool

    def __post_init__(self) -> None:
        if self.block_size < 0:
            raise ValueError(f"block_size must be 0 (whole row) or positive, got {self.block_size}")

    def blocks(self, columns: int) -> int:
        """Number of column blocks; the last one may be partial."""
        return -(-columns // (self.block_size or columns))

    def specs(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """signs and second uint8 (rows, packed), salient uint8 (packed,), scalars float16 (rows, blocks, 4 or 7)."""
        width = packed_width(columns, 1)
        return {
            "signs": TensorSpec((rows, width), torch.uint8),
            "second": TensorSpec((rows, width), torch.uint8),
            "salient": TensorSpec((width,), torch.uint8),
            "scalars": TensorSpec((rows, self.blocks(columns), 7 if self.means else 4), torch.float16),
        }

    def pack(self, signs: Tensor, second: Tensor, salient: Tensor, scalars: Tensor) -> Packed:
        """Store bool planes (rows, columns), bool marks (columns,) and scalars (rows, blocks, k) as float16."""
        rows, columns = signs.shape
        tensors = {
            "signs": pack_codes(signs, 1),
            "second": pack_codes(second, 1),
            "salient": pack_codes(salient, 1),
            "scalars": scalars.to(torch.float16).contiguous(),
        }
        return Packed(self, rows, columns, tensors)

    def levels(self, scalars: Tensor) -> Tensor:
        """The value of every (mark, second, first bit), in this order: float32 (rows, blocks, 8)."""
        values = scalars.float()
        zero = torch.zeros_like(values[..., 0])
        if self.means:
            mean_c, scale_c, mean_s, scale_s, mean, scale_1, scale_2 = values.unbind(-1)
        else:
            scale_c, scale_s, scale_1, scale_2 = values.unbind(-1)
            mean_c = mean_s = mean = zero
        ordinary = [mean_c - scale_c, mean_c + scale_c, mean_s - scale_s, mean_s + scale_s]
        marked = [mean + first * scale_1 + last * scale_2 for last in (-1, 1) for first in (-1, 1)]
        return torch.stack(ordinary + marked, -1)

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """float32 (rows, columns) by the equations at the top of this file."""
        size = self.block_size or columns
        levels = self.levels(tensors["scalars"])
        if runs_compiled(levels):
            return _compiled_unpack(tensors, levels, rows, columns, size)
        index = unpack_codes(tensors["signs"], 1, columns) + 2 * unpack_codes(tensors["second"], 1, columns)
        index = index + 4 * unpack_codes(tensors["salient"], 1, columns)
        block = torch.arange(columns, device=index.device) // size
        return levels.reshape(rows, -1).gather(1, index.long() + 8 * block)

    def unpack_rows(self, tensors: Mapping[str, Tensor], rows: int, columns: int, index: Tensor) -> Tensor:
        """Only the asked rows are decoded."""
        part = {name: tensor if name == "salient" else tensor[index] for name, tensor in tensors.items()}
        return self.unpack(part, len(index), columns)


def _compiled_unpack(tensors: Mapping[str, Tensor], levels: Tensor, rows: int, columns: int, block_size: int) -> Tensor:
    """The same values in one pass over the packed bytes."""
    from whit.kernels.cpu.planes import plane_rows

    values = torch.empty(rows, columns)
    planes = [tensors[name].contiguous().numpy() for name in ("signs", "second", "salient")]
    arrays = [*planes, levels.contiguous().numpy(), values.numpy()]
    shared_out(lambda first, last: plane_rows(*arrays, block_size, first, last), rows, 64)
    return values
