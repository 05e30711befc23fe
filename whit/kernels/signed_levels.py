"""N:M sparse binary weights held as signed levels (`whit.formats.signed_levels`) on Hopper, for `gemv` and `wide`.

The kernels that read what is stored have an instruction or more per weight to find it in: masks are digits of words of
seven bytes. Three bit planes take 3 bits per weight instead of 2.1, and one column more for every marked one, but are
operands of tensor cores as they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from whit.formats.base import Packed
from whit.formats.signed_levels import SignedLevels, convertible, marked_columns, ordinary_columns, signed_levels
from whit.kernels.cuda_layout import WIDEST
from whit.kernels.cuda_linear import works
from whit.kernels.cuda_ops import has_warpgroups
from whit.kernels.cuda_wide import BOX
from whit.kernels.linear import Preparation, register_preparation


def _supports(packed: Packed, dtype: torch.dtype) -> bool:
    device = packed.tensors["scalars"].device
    if dtype not in (torch.float16, torch.bfloat16):  # no kernel takes others: they would unpack three planes for two
        return False
    if device.type != "cuda" or packed.rows == 0 or packed.columns % BOX or not convertible(packed):
        return False
    return 2 * ordinary_columns(packed.columns) <= WIDEST and has_warpgroups(device.index) and works(device.index)


def _prepare(weights: Sequence[Packed]) -> list[Packed]:
    marked = max(marked_columns(packed) for packed in weights)
    return [signed_levels(packed, marked) for packed in weights]


def _bits(packed: Packed) -> float:
    return 8 * SignedLevels(0).bytes(packed.rows, packed.columns) / (packed.rows * packed.columns)


register_preparation("structured-binary", Preparation("signed levels", _supports, _prepare, _bits))
