"""N:M sparse binary weights: an index of the kept weights, then a sign and one of few magnitudes for each of them.

N of every M neighbouring columns are kept (`whit.formats.nm_index`), the others are zero. A kept weight has a sign and
one of `regions` regions. On ordinary columns the region (dense, intermediate, sparse) names a magnitude; on marked
("salient") columns it is the sign of a residual plane. With s = 2 * bit - 1, per row and block of columns:

    ordinary, region r:  w = [mean_r +] scale_r * s1
    marked, region t:    w = [mean   +] scale_1 * s1 + scale_2 * s2     s2 = 2 t - 1, t = 0, 1

Three regions are stored as trits (`whit.formats.trits`), two as bits; with one there are no marks either. Stored bits
per weight for n rows, block b and a kept share k: index + k (1 + r) + 16 s / b + 1 / n with r = 1.6 and s = 5 scalars
for three regions (9 when means are kept), r = 1 and s = 4 for two; index + k + 16 / b for one. The index takes at least
log2 C(M, N) / M bits, so no N:M with log2 C(M, N) / M + N / M >= 1 fits in one bit per weight whatever the rest costs:
4:8 takes at least 1.27.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.formats.base import Format, Packed, TensorSpec, register_format
from whit.formats.bits import pack_codes, packed_width, unpack_codes
from whit.formats.nm_index import decode_mask, encode_mask, index_bytes, kept_columns, kept_in_row
from whit.formats.trits import pack_trits, trit_bytes, unpack_trits

REGIONS = 3


@register_format
@dataclass(frozen=True)
class StructuredBinary(Format):
    """`n` weights KEPT of each `m` columns; `block_size` columns share scalars (0: the row); `means` keeps the offsets.

    n = m stores every weight and no index. Order of the scalars: scale_r of each region, then scale_1 and scale_2 of
    the marked columns; with means (three regions only) mean_r, scale_r of each region, then mean, scale_1, scale_2.
    """

    name: ClassVar[str] = "structured-binary"
    n: int
    m: int
    block_size: int
    regions: int = 3
    means: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(f"N:M keeps N of each M columns, 1 <= N <= M, got {self.n!r}:{self.m!r}")
        if self.regions not in (1, 2, 3) or (self.means and self.regions != REGIONS):
            raise ValueError(f"regions must be 1, 2 or 3, and 3 with means, got {self.regions!r}")
        if self.block_size < 0:
            raise ValueError(f"block_size must be 0 (whole row) or positive, got {self.block_size}")

    @property
    def scalars(self) -> int:
        """Scalars per row and block."""
        if self.means:
            return 2 * self.regions + 3
        return 1 if self.regions == 1 else self.regions + 2

    def blocks(self, columns: int) -> int:
        """Number of column blocks; the last one may be partial."""
        return -(-columns // (self.block_size or columns))

    def specs(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """index, signs, regions uint8 (rows, bytes), salient uint8 (bytes,), scalars float16 (rows, blocks, k)."""
        kept = kept_in_row(columns, self.n, self.m)
        out = {
            "index": TensorSpec((rows, index_bytes(columns, self.n, self.m)), torch.uint8),
            "signs": TensorSpec((rows, packed_width(kept, 1)), torch.uint8),
            "scalars": TensorSpec((rows, self.blocks(columns), self.scalars), torch.float16),
        }
        if self.regions > 1:
            width = packed_width(kept, 1) if self.regions == 2 else trit_bytes(kept)
            out["regions"] = TensorSpec((rows, width), torch.uint8)
            out["salient"] = TensorSpec((packed_width(columns, 1),), torch.uint8)
        return out

    def pack(self, kept: Tensor, signs: Tensor, regions: Tensor, salient: Tensor, scalars: Tensor) -> Packed:
        """Store a weight.

        Args:
            kept: bool (rows, columns), n of each m columns.
            signs: bool (rows, columns), True for +1; read where kept.
            regions: integers (rows, columns) below `regions`, on marked columns 0 or 1; read where kept.
            salient: marks, bool (columns,); none with one region.
            scalars: (rows, blocks, k).

        Raises:
            ValueError: the mask keeps another number.
        """
        rows, columns = kept.shape
        places = kept_columns(kept)
        tensors = {
            "index": encode_mask(kept, self.n, self.m),
            "signs": pack_codes(signs.gather(1, places), 1),
            "scalars": scalars.to(torch.float16).contiguous(),
        }
        if self.regions > 1:
            chosen = regions.gather(1, places)
            tensors["regions"] = pack_codes(chosen, 1) if self.regions == 2 else pack_trits(chosen)
            tensors["salient"] = pack_codes(salient, 1)
        return Packed(self, rows, columns, tensors)

    def levels(self, scalars: Tensor) -> Tensor:
        """The value of every (mark, region, first bit), three regions each: float32 (rows, blocks, 12)."""
        values = scalars.float()
        zero = torch.zeros_like(values[..., 0])
        if self.regions == 1:
            return torch.stack([-values[..., 0], values[..., 0], *[zero] * 10], -1)
        if self.means:
            *pairs, mean, scale_1, scale_2 = values.unbind(-1)
            means, scales = pairs[0::2], pairs[1::2]
        else:
            *scales, scale_1, scale_2 = values.unbind(-1)
            scales += [zero] * (REGIONS - self.regions)
            means, mean = [zero] * REGIONS, zero
        ordinary = [means[r] + s * scales[r] for r in range(REGIONS) for s in (-1, 1)]
        marked = [mean + first * scale_1 + last * scale_2 for last in (-1, 1) for first in (-1, 1)]
        return torch.stack([*ordinary, *marked, zero, zero], -1)

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """float32 (rows, columns) by the equations at the top of this file, zero where not kept."""
        mask = decode_mask(tensors["index"], columns, self.n, self.m)
        places = kept_columns(mask)
        count = places.shape[1]
        code = unpack_codes(tensors["signs"], 1, count, torch.int64)
        if self.regions > 1:
            plane = tensors["regions"]
            region = unpack_codes(plane, 1, count, torch.int64) if self.regions == 2 else unpack_trits(plane, count)
            code = code + 2 * region + 2 * REGIONS * unpack_codes(tensors["salient"], 1, columns, torch.int64)[places]
        levels = self.levels(tensors["scalars"])
        code = code + levels.shape[2] * (places // (self.block_size or columns))
        values = levels.flatten(1).gather(1, code)
        return torch.zeros(rows, columns, device=values.device).scatter_(1, places, values)

    def unpack_rows(self, tensors: Mapping[str, Tensor], rows: int, columns: int, index: Tensor) -> Tensor:
        """Only the asked rows are decoded."""
        part = {name: tensor if name == "salient" else tensor[index] for name, tensor in tensors.items()}
        return self.unpack(part, len(index), columns)
