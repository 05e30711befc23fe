"""Rows of packed integers looked up and decoded."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def look_up(
    ids,
    codes,
    scales,
    out,
    rows,
    columns,
    width,  # bytes of a row of codes
    groups,
    group,
    BITS: tl.constexpr,  # 2, 4 or 8
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: BLOCK columns of the row of one id, scale (code - 2^(BITS - 1)); NaN for an id that has no row."""
    EACH: tl.constexpr = 8 // BITS
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.load(ids + tl.program_id(0)).to(tl.int64)
    here = inside & (row >= 0) & (row < rows)
    code = tl.load(codes + row * width + column // EACH, mask=here, other=0).to(tl.int32)
    code = (code >> (column % EACH * BITS)) & ((1 << BITS) - 1)
    scale = tl.load(scales + row * groups + column // group, mask=here, other=float("nan")).to(tl.float32)
    value = (code - (1 << (BITS - 1))).to(tl.float32) * scale
    tl.store(out + tl.program_id(0).to(tl.int64) * columns + column, value.to(out.dtype.element_ty), mask=inside)
