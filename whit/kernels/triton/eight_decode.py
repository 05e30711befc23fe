"""Weights of 8 or 4 bits decoded to 16 bit."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from whit.kernels.triton.small_numbers import number_of


@triton.jit
def decode(
    codes,
    scales,
    out,
    rows,
    columns,
    width,  # bytes of a row
    group,
    groups,
    scale_rows,  # 0 where one scale is for all rows
    factor,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale, 0 for the row, -1 if that is no divisor of COLUMNS
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The dense weight (rows, columns) in 16 bit from codes of 8 or 4 bits: scale times number, rounded once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = (row < rows)[:, None]
    known = here & (column < columns)[None, :]
    start = row.to(tl.int64)[:, None]
    if BITS == 8:
        code = tl.load(codes + start * width + column[None, :], mask=known, other=0).to(tl.int32)
        number = number_of(code, BITS, MANTISSA)
    else:
        byte = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        both = tl.load(codes + start * width + byte[None, :], mask=here & (byte < width)[None, :], other=0).to(tl.int32)
        low, high = number_of(both & 15, BITS, MANTISSA), number_of(both >> 4, BITS, MANTISSA)
        number = tl.reshape(tl.join(low, high), (ROWS, COLUMNS))
    number = number * factor
    if GROUP == 0:
        scale = tl.load(scales + start * scale_rows, mask=here, other=0.0).to(tl.float32)
        number = number * scale
    elif GROUP > 0:
        of_block = tl.program_id(1) * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
        scale = tl.load(
            scales + start * groups + of_block[None, :], mask=here & (of_block < groups)[None, :], other=0.0
        ).to(tl.float32)
        parted = tl.reshape(number, (ROWS, COLUMNS // GROUP, GROUP)) * scale[:, :, None]
        number = tl.reshape(parted, (ROWS, COLUMNS))
    else:
        scale = tl.load(scales + start * groups + (column // group)[None, :], mask=known, other=0.0)
        number = number * scale.to(tl.float32)
    tl.store(out + start * columns + column[None, :], number.to(out.dtype.element_ty), mask=known)
