"""One token times 8- or 4-bit weights: the only launch.

Rounding must give the numbers of the plain meaning: divisions are rounded correctly, and the kernels that round are
compiled without fused multiply-adds.
"""

# mypy: ignore-errors
# ruff: noqa: PLR0915
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from whit.kernels.triton.small_numbers import (
    INT8,
    UNROUNDED,
    dot4,
    limited,
    nearest,
    scale_of,
    sums_of_bytes,
    sums_of_nibbles,
    whole,
)


@triton.jit
def one_token(
    x,
    words,  # codes, four or eight to an int32
    scales,
    input_scale,
    bias,
    out,
    rows,
    width,  # int32 words of a row
    scale_step,
    groups,
    maximum,
    factor,
    INPUTS: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    UNIT: tl.constexpr,
    STATIC: tl.constexpr,
    BIAS: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,  # words that share a scale, 0 for the row
    ROWS: tl.constexpr,
    LOOP: tl.constexpr,
    EARLY: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """y of one token. A program takes ROWS rows at a time and asks for them before it looks at x.

    MANTISSA: bits of the significand of the weight's numbers, -1 for integers.
    """
    EACH: tl.constexpr = 32 // BITS
    first = tl.program_id(0)
    blocks = tl.cdiv(rows, ROWS)
    word = tl.arange(0, WORDS)
    lane = tl.arange(0, ROWS)
    inside = word < width
    row = first * ROWS + lane
    weights = tl.load(
        words + row.to(tl.int64)[:, None] * width + word[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0
    )
    if EARLY:  # nothing above depends on the kernel before
        gdc_launch_dependents()
        gdc_wait()
    column = word[:, None] * EACH + tl.arange(0, EACH)[None, :]
    values = tl.load(x + column, mask=inside[:, None], other=0.0).to(tl.float32)
    scale = 1.0
    if INPUTS != UNROUNDED:
        if STATIC:
            scale = tl.load(input_scale)
        else:
            bits = tl.abs(values).to(tl.int32, bitcast=True)
            scale = scale_of(tl.max(tl.max(bits, axis=1), axis=0).to(tl.float32, bitcast=True), maximum, HARDWARE)
        values = limited(values, scale, maximum)
    if INPUTS == INT8:
        packed = tl.sum((whole(values) & 255) << (tl.arange(0, 4) * 8)[None, :], axis=1)
    elif INPUTS != UNROUNDED:
        values = nearest(values, INPUTS)
    for block in range(first, blocks, tl.num_programs(0)):
        row = block * ROWS + lane
        here = row < rows
        if LOOP:
            following = row + tl.num_programs(0) * ROWS
            ahead = tl.load(
                words + following.to(tl.int64)[:, None] * width + word[None, :],
                mask=(following < rows)[:, None] & inside[None, :],
                other=0,
            )
        if GROUP == 0:
            by_row = tl.load(scales + row * scale_step, mask=here, other=0.0).to(tl.float32)
        else:
            group = tl.arange(0, WORDS // GROUP)
            by_group = tl.load(
                scales + row[:, None] * groups + group[None, :],
                mask=here[:, None] & (group < groups)[None, :],
                other=0.0,
            ).to(tl.float32)
        if INPUTS == INT8:
            sums = dot4(weights, packed[None, :], HARDWARE)
        elif BITS == 8:
            sums = sums_of_bytes(weights, values, MANTISSA, UNIT, WORDS)
        else:
            sums = sums_of_nibbles(weights, values, MANTISSA, WORDS)
        if GROUP == 0:
            total = tl.sum(sums, axis=1).to(tl.float32) * by_row
        else:
            total = tl.sum(tl.sum(tl.reshape(sums, (ROWS, WORDS // GROUP, GROUP)), axis=2) * by_group, axis=1)
        total = total * (scale * factor)
        if BIAS:
            total += tl.load(bias + row, mask=here, other=0.0).to(tl.float32)
        tl.store(out + row, total.to(out.dtype.element_ty), mask=here)
        if LOOP:
            weights = ahead
