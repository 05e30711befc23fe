"""Weights that the tensor copy engine brings to the kernel of one vector (`cuda/bulk.cuh`): what it needs to be told.

A warp's item, 16 rows x some columns, comes as boxes: its codes in boxes of at most 128 bytes a row, swizzled, the
scalars of its groups in one more. Rows of both tensors must be multiples of 16 bytes, and so must what an item has of
them: the engine takes nothing else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from whit.kernels.cuda_layout import WHOLE_ROW, Layout
from whit.kernels.driver import TensorMap, tensor_map

BOX_ROWS = 16
WIDEST_BOX = 128
"""Bytes of a row of a box: no swizzle is wider."""


class Maps(ctypes.Structure):
    """The argument of that name in `cuda/bulk.cuh`."""

    _fields_ = (("codes", TensorMap * 3), ("scalars", TensorMap))


def _pitch(layout: Layout, item: int) -> int:
    """Bytes of a row of a box of codes (ROW_PITCH)."""
    return min(WIDEST_BOX, item * layout.bits // 8)


def _item_scalars(layout: Layout, item: int) -> int:
    """16-bit scalars of a row of a box."""
    return layout.item_groups(item) * layout.scalars


def bulk_stage_bytes(layout: Layout, rows: int, item: int) -> int | None:
    """Bytes of shared memory of an item of `item` columns with its barrier; None if the engine cannot bring it.

    Args:
        layout: of the weight.
        rows: outputs.
        item: columns.
    """
    if not layout.bitwise or layout.bits > 2 or layout.asymmetric or layout.width % 16:
        return None
    codes = layout.planes * BOX_ROWS * item * layout.bits // 8
    row = 2 * _item_scalars(layout, item)
    if layout.group == WHOLE_ROW:  # the scalars of 16 rows are one run of bytes
        if rows % BOX_ROWS or layout.piece(item) == 2:
            return None
    elif row % 16 or 2 * layout.groups * layout.scalars % 16 or item % layout.group:
        return None
    return codes + -(-BOX_ROWS * row // 128) * 128 + 8


def maps_of(layout: Layout, codes: Sequence[int], scalars: int, rows: int, item: int) -> Maps:
    """Maps of a weight that `bulk_stage_bytes` accepts.

    Args:
        layout: of the weight.
        codes: addresses of the packed codes, one to three tensors.
        scalars: address of the scalars.
        rows: outputs.
        item: columns of an item.

    Raises:
        CompilationError: the driver refuses them.
    """
    maps = Maps()
    for number, address in enumerate(codes):
        pitch = _pitch(layout, item)
        maps.codes[number] = tensor_map(address, rows, layout.width // 2, BOX_ROWS, pitch // 2)
    if layout.group != WHOLE_ROW:
        across = _item_scalars(layout, item)
        maps.scalars = tensor_map(scalars, rows, layout.groups * layout.scalars, BOX_ROWS, across, swizzled=False)
    return maps
