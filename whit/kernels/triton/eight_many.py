"""Many tokens times 8-bit weights: tokens rounded, codes multiplied."""

# mypy: ignore-errors
# ruff: noqa: SIM108
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from whit.kernels.triton.small_numbers import E4M3, INT8, limited, nearest, scale_of, whole
from whit.kernels.triton.tiles import operand, tile_start


@triton.jit
def _rounded(values, KIND: tl.constexpr):
    """Values in the 8-bit type of the inputs."""
    if KIND == INT8:
        return whole(values).to(tl.int8)
    elif KIND == E4M3:
        return nearest(values, KIND).to(tl.float8e4nv)
    else:
        return nearest(values, KIND).to(tl.float8e5)


@triton.jit
def round_tokens(
    x,
    codes,
    scales,
    input_scale,
    weight_scales,
    by_row,
    tokens,
    rows,
    columns,
    scale_step,
    maximum,
    KIND: tl.constexpr,
    STATIC: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Codes and scale of one token per program, or codes alone where the scale is stored.

    Programs beyond the tokens write scales of ROWS rows of the weight as float32 to by_row.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    if token < tokens:
        column = tl.arange(0, COLUMNS)
        inside = column < columns
        start = token.to(tl.int64) * columns
        values = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
        if STATIC:
            scale = tl.load(input_scale)
        else:
            largest = tl.max(tl.abs(values).to(tl.int32, bitcast=True), axis=0).to(tl.float32, bitcast=True)
            scale = scale_of(largest, maximum, RECIPROCAL)
        tl.store(codes + start + column, _rounded(limited(values, scale, maximum), KIND), mask=inside)
        tl.store(scales + token, scale)
    else:
        row = (token - tokens) * ROWS + tl.arange(0, ROWS)
        found = tl.load(weight_scales + row * scale_step, mask=row < rows, other=0.0)
        tl.store(by_row + row, found.to(tl.float32), mask=row < rows)


@triton.jit
def scaled_product(
    left,  # (tokens, columns), 8 or 16 bits: pointer or descriptor
    right,  # (rows, columns), 8 bits: pointer or descriptor
    input_scales,
    scales,
    bias,
    out,
    tokens,
    rows,
    columns,
    scale_step,
    factor,
    INTEGER: tl.constexpr,
    WIDEN: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PART: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One tile (M, N) of y: the product of codes, or (WIDEN) of 16-bit inputs with codes, then scales and bias."""
    first, second = tile_start(tl.program_id(0), tokens, rows, M, N, GROUP)
    token = first + tl.arange(0, M)
    row = second + tl.arange(0, N)
    known, here = token < tokens, row < rows
    by_row = tl.load(scales + row * scale_step, mask=here, other=0.0).to(tl.float32) * factor
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    if INTEGER:
        sums = tl.zeros((M, N), dtype=tl.int32)
    else:
        sums = tl.zeros((M, N), dtype=tl.float32)
    for start in tl.range(0, columns, K, num_stages=STAGES):
        one = operand(left, first, start, tokens, columns, M, K, DESCRIPTOR, EVEN)
        other = operand(right, second, start, rows, columns, N, K, DESCRIPTOR, EVEN)
        if INTEGER:
            sums = tl.dot(one, tl.trans(other), sums, out_dtype=tl.int32)
        elif WIDEN:
            sums = tl.dot(one, tl.trans(other.to(one.dtype)), sums)
        else:
            sums = tl.dot(one, tl.trans(other), sums, max_num_imprecise_acc=PART)
    total = sums.to(tl.float32)
    if SCALED:
        total = total * tl.load(input_scales + token, mask=known, other=0.0)[:, None]
    total = total * by_row[None, :]
    if BIAS:
        total += tl.load(bias + row, mask=here, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + token.to(tl.int64)[:, None] * rows + row[None, :],
        total.to(out.dtype.element_ty),
        mask=known[:, None] & here[None, :],
    )
