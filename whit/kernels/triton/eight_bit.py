"""The Triton kernels of `whit.kernels.eight_bit`, apart because Triton is not installed everywhere.

As in `outlier_int8.py`, rounding must give the numbers of the plain meaning: divisions are rounded correctly, and the
kernels that round are compiled without fused multiply-adds.
"""

# mypy: ignore-errors
# ruff: noqa: PLR0124, PLR0915, SIM108
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from whit.kernels.triton.outlier_int8 import _dot4, _operand

ROUNDER = tl.constexpr(12582912.0)  # adding and taking away 1.5 * 2**23 rounds to nearest, ties to even

UNROUNDED = tl.constexpr(0)
INT8 = tl.constexpr(1)
E4M3 = tl.constexpr(2)
E5M2 = tl.constexpr(3)


@triton.jit
def _scale(largest, maximum, RECIPROCAL: tl.constexpr):
    """largest / maximum, 1 where that is 0; torch on a GPU multiplies by the reciprocal of a number."""
    if RECIPROCAL:
        scale = largest * tl.div_rn(1.0, maximum)
    else:
        scale = tl.div_rn(largest, maximum)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def _limited(values, scale, maximum):
    """values / scale within +-maximum; NaN stays."""
    ratio = tl.div_rn(values, scale)
    return tl.where(ratio > maximum, maximum, tl.where(ratio < -maximum, -maximum, ratio))


@triton.jit
def _whole(values):
    """Nearest whole numbers, ties to even, int32."""
    return ((values + ROUNDER) - ROUNDER).to(tl.int32)


@triton.jit
def _nearest(values, KIND: tl.constexpr):
    """Nearest numbers of e4m3 or e5m2, float32: whole multiples of the spacing of their binade."""
    MANTISSA: tl.constexpr = 3 if KIND == E4M3 else 2
    LOWEST: tl.constexpr = -6 if KIND == E4M3 else -14
    exponent = tl.maximum(((values.to(tl.int32, bitcast=True) >> 23) & 255) - 127, LOWEST) - MANTISSA
    spacing = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    nearest = ((values * inverse + ROUNDER) - ROUNDER) * spacing
    return tl.where(values == values, nearest, values)


@triton.jit
def _rounded(values, KIND: tl.constexpr):
    """Values in the 8-bit type of the inputs."""
    if KIND == INT8:
        return _whole(values).to(tl.int8)
    elif KIND == E4M3:
        return _nearest(values, KIND).to(tl.float8e4nv)
    else:
        return _nearest(values, KIND).to(tl.float8e5)


@triton.jit
def _halves(pairs, BITS: tl.constexpr, MANTISSA: tl.constexpr):
    """Two codes, in the low bits of each half of an int32, as two float32.

    The fields of a small float are those of a float16 with another bias: the caller multiplies by 2^(15 - bias). A
    whole number goes into the significand of 1024.
    """
    SIGN: tl.constexpr = (1 << (BITS - 1)) * 0x10001
    if MANTISSA < 0:
        found = (pairs ^ SIGN) | 0x64006400
        OFFSET: tl.constexpr = 1024.0 + (1 << (BITS - 1))
    else:
        found = ((pairs & SIGN) << (16 - BITS)) | ((pairs & (SIGN - 0x10001)) << (10 - MANTISSA))
        OFFSET: tl.constexpr = 0.0
    low = (found & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = ((found >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    if MANTISSA < 0:
        return low - OFFSET, high - OFFSET
    else:
        return low, high


@triton.jit
def _pairs(words, shift: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr):
    """The numbers of the codes at `shift` in the low and in the high half of words."""
    return _halves((words >> shift) & (((1 << BITS) - 1) * 0x10001), BITS, MANTISSA)


@triton.jit
def _from_e4m3(words):
    """The four numbers whose e4m3 codes lie in an int32, float32."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 l, h, a, b;
        .reg .b32 p, q;
        mov.b32 {l, h}, $4;
        cvt.rn.f16x2.e4m3x2 p, l;
        cvt.rn.f16x2.e4m3x2 q, h;
        mov.b32 {a, b}, p;
        cvt.f32.f16 $0, a;
        cvt.f32.f16 $1, b;
        mov.b32 {a, b}, q;
        cvt.f32.f16 $2, a;
        cvt.f32.f16 $3, b;
        }""",
        "=f,=f,=f,=f,r",
        [words],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _four(values, WORDS: tl.constexpr):
    """(WORDS, 4) -> its four columns."""
    even, odd = tl.split(tl.reshape(values, (WORDS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _sums_of_bytes(words, values, MANTISSA: tl.constexpr, E4M3_UNIT: tl.constexpr, WORDS: tl.constexpr):
    """sum of number times input over each int32 of four codes: (rows, WORDS); values (WORDS, 4)."""
    one, two, three, four = _four(values, WORDS)
    if E4M3_UNIT:
        first, second, third, fourth = _from_e4m3(words)
    else:
        first, third = _pairs(words, 0, 8, MANTISSA)
        second, fourth = _pairs(words, 8, 8, MANTISSA)
    sums = tl.fma(second, two[None, :], first * one[None, :])
    return tl.fma(fourth, four[None, :], tl.fma(third, three[None, :], sums))


@triton.jit
def _sums_of_nibbles(words, values, MANTISSA: tl.constexpr, WORDS: tl.constexpr):
    """As `_sums_of_bytes` for eight codes; values (WORDS, 8)."""
    low, high = tl.split(tl.permute(tl.reshape(values, (WORDS, 2, 4)), (0, 2, 1)))
    one, two, three, four = _four(low, WORDS)
    five, six, seven, eight = _four(high, WORDS)
    first, fifth = _pairs(words, 0, 4, MANTISSA)
    second, sixth = _pairs(words, 4, 4, MANTISSA)
    third, seventh = _pairs(words, 8, 4, MANTISSA)
    fourth, eighth = _pairs(words, 12, 4, MANTISSA)
    sums = tl.fma(fifth, five[None, :], first * one[None, :])
    sums = tl.fma(sixth, six[None, :], tl.fma(second, two[None, :], sums))
    sums = tl.fma(seventh, seven[None, :], tl.fma(third, three[None, :], sums))
    return tl.fma(eighth, eight[None, :], tl.fma(fourth, four[None, :], sums))


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
    E4M3_UNIT: tl.constexpr,
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
            scale = _scale(tl.max(tl.max(bits, axis=1), axis=0).to(tl.float32, bitcast=True), maximum, HARDWARE)
        values = _limited(values, scale, maximum)
    if INPUTS == INT8:
        packed = tl.sum((_whole(values) & 255) << (tl.arange(0, 4) * 8)[None, :], axis=1)
    elif INPUTS != UNROUNDED:
        values = _nearest(values, INPUTS)
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
            sums = _dot4(weights, packed[None, :], HARDWARE)
        elif BITS == 8:
            sums = _sums_of_bytes(weights, values, MANTISSA, E4M3_UNIT, WORDS)
        else:
            sums = _sums_of_nibbles(weights, values, MANTISSA, WORDS)
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
            scale = _scale(largest, maximum, RECIPROCAL)
        tl.store(codes + start + column, _rounded(_limited(values, scale, maximum), KIND), mask=inside)
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
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    down, across = tl.cdiv(tokens, M), tl.cdiv(rows, N)
    band = program // (GROUP * across)
    height = tl.minimum(down - band * GROUP, GROUP)
    inner = program % (GROUP * across)
    first = (band * GROUP + inner % height) * M
    second = (inner // height) * N
    token = first + tl.arange(0, M)
    row = second + tl.arange(0, N)
    known, here = token < tokens, row < rows
    by_row = tl.load(scales + row * scale_step, mask=here, other=0.0).to(tl.float32) * factor
    if INTEGER:
        sums = tl.zeros((M, N), dtype=tl.int32)
    else:
        sums = tl.zeros((M, N), dtype=tl.float32)
    for start in tl.range(0, columns, K, num_stages=STAGES):
        one = _operand(left, first, start, tokens, columns, M, K, DESCRIPTOR, EVEN)
        other = _operand(right, second, start, rows, columns, N, K, DESCRIPTOR, EVEN)
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


@triton.jit
def _number(code, BITS: tl.constexpr, MANTISSA: tl.constexpr):
    """The number of a code as float32, but for the factor 2^(15 - bias) of small floats."""
    if MANTISSA < 0:
        return ((code << (32 - BITS)) >> (32 - BITS)).to(tl.float32)
    else:
        SIGN: tl.constexpr = 1 << (BITS - 1)
        found = ((code & SIGN) << (16 - BITS)) | ((code & (SIGN - 1)) << (10 - MANTISSA))
        return found.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


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
        number = _number(code, BITS, MANTISSA)
    else:
        byte = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        both = tl.load(codes + start * width + byte[None, :], mask=here & (byte < width)[None, :], other=0).to(tl.int32)
        low, high = _number(both & 15, BITS, MANTISSA), _number(both >> 4, BITS, MANTISSA)
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
