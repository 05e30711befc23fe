"""Signs and four magnitudes as three bit planes: the form in which N:M sparse binary weights are multiplied.

Nothing is stored in this form: `whit.formats.structured_binary` is, at 2.1 bits for 4:8, and its masks and regions are
digits of large numbers, which no product can read quickly. Here every weight, kept or not, has a sign bit s and a class
c = u + 2 v, and per row

    ordinary column:  w = +-(0, a1, a2, a3)[c]           marked column:  w = +-(0, a - b, a + b, 0)[c]

with a minus for s = 1. Kept are the planes s, s xor u and s xor v, since with one vector the sums D of x over class c,
plus minus minus, follow from those over these planes and over all three xored: Walsh's transform of four numbers,

    2 D1 = S3 - S0 + S1 - S2,   2 D2 = S3 - S0 - S1 + S2,   2 D3 = S1 + S2 - S0 - S3.

Marked columns stand in the planes twice: in their place, for products with many vectors, and together behind all
others, where one vector meets them as columns of their own. `index` says which they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.formats.base import Format, Packed, TensorSpec
from whit.formats.bits import pack_codes, unpack_codes
from whit.formats.nm_index import decode_mask, kept_in_row
from whit.formats.structured_binary import StructuredBinary
from whit.formats.trits import unpack_trits

PAIR, BLOCK = 256, 128
"""Columns in multiples of which the marked ones begin, and in which they come."""
MAGNITUDES = 8
"""Scalars of a row: a1, a2, a3, 0, a, b, 0, 0."""
_WEIGHTS = 1 << 23
"""Weights converted at a time: some twenty bytes of each are held meanwhile."""


@dataclass(frozen=True)
class SignedLevels(Format):
    """`panel` columns, a multiple of 128, hold the marked ones once more."""

    name: ClassVar[str] = "signed-levels"
    panel: int

    def specs(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """Planes uint8 (rows, bytes), salient uint8: marks and then 16-bit numbers of columns, scalars float16."""
        own = ordinary_columns(columns)
        plane = TensorSpec((rows, (own + self.panel) // 8), torch.uint8)
        return {
            "signs": plane,
            "low": plane,
            "high": plane,
            "salient": TensorSpec((own // 8 + 2 * ordinary_columns(self.panel),), torch.uint8),
            "scalars": TensorSpec((rows, 1, MAGNITUDES), torch.float16),
        }

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """float32 (rows, columns) by the equations at the top of this file, from the planes in their places."""
        sign, low, high = (unpack_codes(tensors[name], 1, columns) for name in ("signs", "low", "high"))
        marks = unpack_codes(tensors["salient"][: ordinary_columns(columns) // 8], 1, columns)
        number = (sign ^ low) + 2 * (sign ^ high) + 4 * marks
        values = magnitudes(tensors["scalars"]).gather(1, number.long())
        return torch.where(sign.bool(), -values, values)


def ordinary_columns(columns: int) -> int:
    """Columns up to where those begin that hold the marked ones once more."""
    return -(-columns // PAIR) * PAIR


def panel_columns(marked: int) -> int:
    """Columns in which so many marked ones stand once more."""
    return -(-marked // BLOCK) * BLOCK


def magnitudes(scalars: Tensor) -> Tensor:
    """What a sign is put before: (rows, 1, 8) scalars -> float32 (rows, 8), by class, then by class if marked."""
    a1, a2, a3, zero, first, second, _, _ = scalars.float()[:, 0].unbind(-1)
    return torch.stack([zero, a1, a2, a3, zero, first - second, first + second, zero], -1)


def convertible(packed: Packed) -> bool:
    """Whether a weight has this form: N:M sparse binary, without means, scalars of the whole row."""
    form = packed.format
    if not isinstance(form, StructuredBinary) or form.means:
        return False
    return form.blocks(packed.columns) == 1 and packed.columns < 1 << 16


def marked_columns(packed: Packed) -> int:
    """How many columns are marked."""
    if "salient" not in packed.tensors:
        return 0
    return int(unpack_codes(packed.tensors["salient"], 1, packed.columns).sum())


def signed_levels(packed: Packed, marked: int | None = None) -> Packed:
    """The same weight in this form, on its device, value for value.

    Args:
        packed: for which `convertible` is true.
        marked: columns to leave room for, if more than those that are marked.
    """
    rows, columns = packed.rows, packed.columns
    form, device = packed.format, packed.tensors["scalars"].device
    assert isinstance(form, StructuredBinary)
    own = ordinary_columns(columns)
    marks = torch.zeros(own, dtype=torch.bool, device=device)
    if form.regions > 1:
        marks[:columns] = unpack_codes(packed.tensors["salient"], 1, columns).bool()
    places = torch.nonzero(marks)[:, 0]
    layout = SignedLevels(panel_columns(max(len(places), marked or 0)))
    index = torch.full((ordinary_columns(layout.panel),), columns, dtype=torch.int32, device=device)  # none
    index[: len(places)] = places.int()
    halves = torch.stack([index & 255, index >> 8], -1).to(torch.uint8).flatten()
    tensors: dict[str, list[Tensor]] = {name: [] for name in ("signs", "low", "high")}
    size = max(1, _WEIGHTS // columns)
    for first in range(0, rows, size):
        part = {n: t if n == "salient" else t[first : first + size] for n, t in packed.tensors.items()}
        sign, number = _codes(form, part, marks[:columns])
        wide = torch.zeros(2, len(sign), own + layout.panel, dtype=torch.uint8, device=device)
        for whole, codes in zip(wide, (sign, number), strict=True):
            whole[:, :columns] = codes
            whole[:, own : own + len(places)] = codes[:, places]
        tensors["signs"].append(pack_codes(wide[0], 1))
        tensors["low"].append(pack_codes(wide[0] ^ (wide[1] & 1), 1))
        tensors["high"].append(pack_codes(wide[0] ^ (wide[1] >> 1), 1))
    planes = {name: torch.cat(parts) for name, parts in tensors.items()}
    salient = torch.cat([pack_codes(marks, 1), halves])
    return Packed(layout, rows, columns, {**planes, "salient": salient, "scalars": _scalars(form, packed)})


def _codes(form: StructuredBinary, tensors: Mapping[str, Tensor], marks: Tensor) -> tuple[Tensor, Tensor]:
    """Sign bits and classes of some rows, uint8 (rows, columns) each, by marks bool (columns,)."""
    columns = len(marks)
    mask = decode_mask(tensors["index"], columns, form.n, form.m)
    count = kept_in_row(columns, form.n, form.m)
    codes = unpack_codes(tensors["signs"], 1, count)
    if form.regions > 1:
        plane = tensors["regions"]
        region = unpack_codes(plane, 1, count) if form.regions == 2 else unpack_trits(plane, count).to(torch.uint8)
        codes = codes | region << 1
    codes = codes.gather(1, (mask.cumsum(1) - 1).clamp_(min=0))  # of a kept weight: its how manieth of the row it is
    positive, region = codes & 1, codes >> 1
    agree = 1 + (region == positive).to(torch.uint8)  # of signs: then the scales add up
    number = torch.where(marks, torch.where(region > 1, 3, agree), region + 1)
    return (1 - positive) * mask, number * mask


def _scalars(form: StructuredBinary, packed: Packed) -> Tensor:
    given = packed.tensors["scalars"]
    out = torch.zeros(packed.rows, 1, MAGNITUDES, dtype=torch.float16, device=given.device)
    out[..., : form.regions] = given[..., : form.regions]
    if form.regions > 1:
        out[..., 4:6] = given[..., form.regions :]
    return out
