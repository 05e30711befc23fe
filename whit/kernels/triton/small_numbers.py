"""Numbers of 8 and 4 bits in Triton kernels: rounding to them, and products with them as they are stored."""

# mypy: ignore-errors
# ruff: noqa: PLR0124, SIM108
from __future__ import annotations

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12582912.0)  # adding and taking away 1.5 * 2**23 rounds to nearest, ties to even

UNROUNDED = tl.constexpr(0)
INT8 = tl.constexpr(1)
E4M3 = tl.constexpr(2)
E5M2 = tl.constexpr(3)


@triton.jit
def scale_of(largest, maximum, RECIPROCAL: tl.constexpr):
    """largest / maximum, 1 where that is 0; torch on a GPU multiplies by the reciprocal of a number."""
    if RECIPROCAL:
        scale = largest * tl.div_rn(1.0, maximum)
    else:
        scale = tl.div_rn(largest, maximum)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def limited(values, scale, maximum):
    """values / scale within +-maximum; NaN stays."""
    ratio = tl.div_rn(values, scale)
    return tl.where(ratio > maximum, maximum, tl.where(ratio < -maximum, -maximum, ratio))


@triton.jit
def whole(values):
    """Nearest whole numbers, ties to even, int32."""
    return ((values + ROUNDER) - ROUNDER).to(tl.int32)


@triton.jit
def nearest(values, KIND: tl.constexpr):
    """Nearest numbers of e4m3 or e5m2, float32: whole multiples of the spacing of their binade."""
    MANTISSA: tl.constexpr = 3 if KIND == E4M3 else 2
    LOWEST: tl.constexpr = -6 if KIND == E4M3 else -14
    exponent = tl.maximum(((values.to(tl.int32, bitcast=True) >> 23) & 255) - 127, LOWEST) - MANTISSA
    spacing = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    nearest = ((values * inverse + ROUNDER) - ROUNDER) * spacing
    return tl.where(values == values, nearest, values)


@triton.jit
def dot4(left, right, HARDWARE: tl.constexpr):
    """Sum of the four products of signed bytes of two int32."""
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [left, right], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        total = ((left << 24) >> 24) * ((right << 24) >> 24)
        total += ((left << 16) >> 24) * ((right << 16) >> 24)
        total += ((left << 8) >> 24) * ((right << 8) >> 24)
        return total + (left >> 24) * (right >> 24)


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
def _from_int8(words):
    """The four signed bytes of an int32, float32: with 128 added in the significand of 2^23, then less 2^23 + 128."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t, p;
        xor.b32 t, $4, 0x80808080;
        prmt.b32 p, t, 0x4B000000, 0x7540;
        sub.rn.f32 $0, p, 0f4B000080;
        prmt.b32 p, t, 0x4B000000, 0x7541;
        sub.rn.f32 $1, p, 0f4B000080;
        prmt.b32 p, t, 0x4B000000, 0x7542;
        sub.rn.f32 $2, p, 0f4B000080;
        prmt.b32 p, t, 0x4B000000, 0x7543;
        sub.rn.f32 $3, p, 0f4B000080;
        }""",
        "=f,=f,=f,=f,r",
        [words],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _quarters(values, WORDS: tl.constexpr):
    """(WORDS, 4) -> its four columns."""
    even, odd = tl.split(tl.reshape(values, (WORDS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def sums_of_bytes(words, values, MANTISSA: tl.constexpr, UNIT: tl.constexpr, WORDS: tl.constexpr):
    """sum of number times input over each int32 of four codes: (rows, WORDS); values (WORDS, 4).

    UNIT: use instructions that only some GPUs have, for e4m3, or that the interpreter lacks, for int8.
    """
    one, two, three, four = _quarters(values, WORDS)
    if UNIT and MANTISSA < 0:
        first, second, third, fourth = _from_int8(words)
    elif UNIT:
        first, second, third, fourth = _from_e4m3(words)
    else:
        first, third = _pairs(words, 0, 8, MANTISSA)
        second, fourth = _pairs(words, 8, 8, MANTISSA)
    sums = tl.fma(second, two[None, :], first * one[None, :])
    return tl.fma(fourth, four[None, :], tl.fma(third, three[None, :], sums))


@triton.jit
def sums_of_nibbles(words, values, MANTISSA: tl.constexpr, WORDS: tl.constexpr):
    """As `sums_of_bytes` for eight codes; values (WORDS, 8)."""
    low, high = tl.split(tl.permute(tl.reshape(values, (WORDS, 2, 4)), (0, 2, 1)))
    one, two, three, four = _quarters(low, WORDS)
    five, six, seven, eight = _quarters(high, WORDS)
    first, fifth = _pairs(words, 0, 4, MANTISSA)
    second, sixth = _pairs(words, 4, 4, MANTISSA)
    third, seventh = _pairs(words, 8, 4, MANTISSA)
    fourth, eighth = _pairs(words, 12, 4, MANTISSA)
    sums = tl.fma(fifth, five[None, :], first * one[None, :])
    sums = tl.fma(sixth, six[None, :], tl.fma(second, two[None, :], sums))
    sums = tl.fma(seventh, seven[None, :], tl.fma(third, three[None, :], sums))
    return tl.fma(eighth, eight[None, :], tl.fma(fourth, four[None, :], sums))


@triton.jit
def number_of(code, BITS: tl.constexpr, MANTISSA: tl.constexpr):
    """The number of a code as float32, but for the factor 2^(15 - bias) of small floats."""
    if MANTISSA < 0:
        return ((code << (32 - BITS)) >> (32 - BITS)).to(tl.float32)
    else:
        SIGN: tl.constexpr = 1 << (BITS - 1)
        found = ((code & SIGN) << (16 - BITS)) | ((code & (SIGN - 1)) << (10 - MANTISSA))
        return found.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
