"""One token times an LLM.int8() weight: the only launch."""

# mypy: ignore-errors
# ruff: noqa: PLR0915, SIM102
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from whit.kernels.triton.outlier_codes import LEVELS, codes_of
from whit.kernels.triton.small_numbers import dot4, sums_of_bytes


@triton.jit
def _largest_and_count(one, some, other, more):
    """The larger number, and the sum of the counts."""
    return tl.maximum(one, other), some + more


@triton.jit
def _both(one, other, two, more):
    """Sums of pairs."""
    return one + two, other + more


@triton.jit
def _rows_of(words, row, rows, width, word, inside):
    """Whole rows of codes, four to an int32."""
    pointers = words + row.to(tl.int64)[:, None] * width + word[None, :]
    return tl.load(pointers, mask=(row < rows)[:, None] & inside[None, :], other=0)


@triton.jit
def _finish(
    total,
    x,
    index,
    wide,
    bias,
    out,
    beside,
    row,
    rows,
    stored,
    threshold,
    DYNAMIC: tl.constexpr,
    WIDE: tl.constexpr,
    BIAS: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Stored columns in 16 bit, of which `beside` are the first inputs; bias; the store."""
    here = row < rows
    if WIDE:
        item = tl.arange(0, ITEMS)
        start = row.to(tl.int64)[:, None] * stored
        weight = tl.load(wide + start + item[None, :], mask=here[:, None] & (item < stored)[None, :], other=0.0)
        total += tl.sum(weight.to(tl.float32) * beside[None, :], axis=1)
        for begin in range(ITEMS, stored, ITEMS):
            some = begin + item < stored
            other = tl.load(x + tl.load(index + begin + item, mask=some, other=0), mask=some, other=0.0)
            other = other.to(tl.float32)
            if DYNAMIC:
                other = tl.where(tl.abs(other) >= threshold, other, 0.0)
            weight = tl.load(wide + start + begin + item[None, :], mask=here[:, None] & some[None, :], other=0.0)
            total += tl.sum(weight.to(tl.float32) * other[None, :], axis=1)
    if BIAS:
        given = tl.load(bias + row, mask=here, other=0.0)
        total += given.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=here)


@triton.jit
def one_token(
    x,
    words,  # codes, four to an int32
    codes,
    absmax,
    place,
    index,
    wide,
    bias,
    out,
    rows,
    width,  # int32 words of a row
    columns,
    stored,
    absmax_step,
    threshold,
    DYNAMIC: tl.constexpr,
    WIDE: tl.constexpr,
    LISTED: tl.constexpr,
    BIAS: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
    PICKED: tl.constexpr,
    LOOP: tl.constexpr,
    EARLY: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """y of one token. A program takes ROWS rows at a time and asks for them before it looks at x.

    Up to PICKED outliers without a 16-bit weight are picked one after the other by integer reductions, and their codes
    fetched. More are multiplied as a whole row, zeros elsewhere, with the codes that are there already: any number of
    them costs the same.
    """
    LOOSE: tl.constexpr = DYNAMIC or (LISTED and not WIDE)
    first = tl.program_id(0)
    blocks = tl.cdiv(rows, ROWS)
    word = tl.arange(0, WORDS)
    lane = tl.arange(0, ROWS)
    item = tl.arange(0, ITEMS)
    inside = word < width
    row = first * ROWS + lane
    weights = _rows_of(words, row, rows, width, word, inside)
    column = word[:, None] * 4 + tl.arange(0, 4)[None, :]
    if LISTED:
        spot = tl.load(place + column, mask=inside[:, None], other=-1)
    if WIDE:
        listed = tl.load(index + item, mask=item < stored, other=0)
    if EARLY:  # nothing above depends on the kernel before
        gdc_launch_dependents()
        gdc_wait()
    given = tl.load(x + column, mask=inside[:, None], other=0.0)
    values = given.to(tl.float32)
    magnitude = tl.abs(values)
    beside = 0.0
    if WIDE:
        beside = tl.load(x + listed, mask=item < stored, other=0.0).to(tl.float32)
        if DYNAMIC:
            beside = tl.where(tl.abs(beside) >= threshold, beside, 0.0)
    if DYNAMIC:
        crossing = magnitude >= threshold
    elif LISTED:
        crossing = spot >= 0
    else:
        crossing = column < 0
    bits = tl.where(crossing, 0.0, magnitude).to(tl.int32, bitcast=True)
    if LOOSE:
        loose = crossing
        if WIDE:
            loose = loose & (spot < 0)
        large = tl.where(loose, given, 0.0).to(given.dtype)
        of_word, in_word = tl.reduce((bits, loose.to(tl.int32)), 1, _largest_and_count)
        bits, count = tl.reduce((of_word, in_word), 0, _largest_and_count)
        many = count > PICKED
    else:
        bits = tl.max(tl.max(bits, axis=1), axis=0)
    largest = bits.to(tl.float32, bitcast=True)
    code = tl.where(crossing, 0, codes_of(tl.where(crossing, 0.0, values), largest))
    packed = tl.sum((code & 255) << (tl.arange(0, 4) * 8)[None, :], axis=1)

    if LOOSE:
        if many:
            for block in range(first, blocks, tl.num_programs(0)):
                row = block * ROWS + lane
                if LOOP:
                    ahead = _rows_of(words, row + tl.num_programs(0) * ROWS, rows, width, word, inside)
                steps = tl.load(absmax + row * absmax_step, mask=row < rows, other=0.0) / LEVELS
                beyond = sums_of_bytes(weights, large.to(tl.float32), -1, HARDWARE, WORDS)
                whole, outer = tl.reduce((dot4(weights, packed[None, :], HARDWARE), beyond), 1, _both)
                total = (whole.to(tl.float32) * (largest / LEVELS) + outer) * steps
                _finish(
                    total, x, index, wide, bias, out, beside, row, rows, stored, threshold, DYNAMIC, WIDE, BIAS, ITEMS
                )
                if LOOP:
                    weights = ahead
            return
    if LOOSE and PICKED > 0:
        place_of_item = tl.arange(0, PICKED)
        chosen = tl.full((PICKED,), columns, dtype=tl.int32)
        keys = tl.where(loose, column, columns)
        latest = -1
        for taken in range(count):
            later = tl.where(keys > latest, keys, columns)
            latest = tl.min(tl.min(later, axis=1), axis=0)
            chosen = tl.where(place_of_item == taken, latest, chosen)
        picked = tl.load(x + chosen, mask=chosen < columns, other=0.0).to(tl.float32)

    for block in range(first, blocks, tl.num_programs(0)):
        row = block * ROWS + lane
        here = row < rows
        if LOOP:
            ahead = _rows_of(words, row + tl.num_programs(0) * ROWS, rows, width, word, inside)
        steps = tl.load(absmax + row * absmax_step, mask=here, other=0.0) / LEVELS
        if LOOSE and PICKED > 0:
            known = here[:, None] & (chosen < columns)[None, :]
            decoded = tl.load(codes + row.to(tl.int64)[:, None] * columns + chosen[None, :], mask=known, other=0)
        total = tl.sum(dot4(weights, packed[None, :], HARDWARE), axis=1).to(tl.float32) * (largest / LEVELS)
        if LOOSE and PICKED > 0:
            total += tl.sum(decoded.to(tl.float32) * picked[None, :], axis=1)
        total = total * steps
        _finish(total, x, index, wide, bias, out, beside, row, rows, stored, threshold, DYNAMIC, WIDE, BIAS, ITEMS)
        if LOOP:
            weights = ahead
