"""LLM.int8() for many tokens, before the product: outlier columns marked and listed, tokens rounded."""

# mypy: ignore-errors
# ruff: noqa: PLR0915, SIM108
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from whit.kernels.triton.outlier_codes import ALL_TOKENS, DIVIDED, FLAGS, STORED, codes_of


@triton.jit
def column_flags(
    x, flags, tokens, columns, share, threshold, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr
):
    """flags (shares, bytes) uint8: bit j of byte i says whether column 8 i + j reaches the threshold in a share of
    the tokens."""
    if EARLY:  # the next kernel starts only now: it reads x, and waits for nothing but the flags
        gdc_wait()
        gdc_launch_dependents()
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tokens)
    largest = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        values = tl.load(
            x + token.to(tl.int64)[:, None] * columns + column[None, :],
            mask=(token < last)[:, None] & inside[None, :],
            other=0.0,
        )
        largest = tl.maximum(largest, tl.abs(values.to(tl.float32)))
    found = (tl.max(largest, axis=0) >= threshold).to(tl.int32)
    bits = tl.sum(tl.reshape(found, (COLUMNS // 8, 8)) << tl.arange(0, 8)[None, :], axis=1)
    byte = tl.program_id(0) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    width = tl.cdiv(columns, 8)
    tl.store(flags + tl.program_id(1) * width + byte, bits.to(tl.uint8), mask=byte < width)


@triton.jit
def _crossing(
    x,
    place,
    flags,
    tokens,
    columns,
    threshold,
    SHARES: tl.constexpr,
    FROM: tl.constexpr,
    BYTES: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Whether a column is an outlier: (BYTES, 8)."""
    byte = tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    column = byte[:, None] * 8 + bit[None, :]
    inside = column < columns
    if FROM == ALL_TOKENS:
        most = tl.zeros((BYTES, 8), dtype=tl.float32)
        for batch in range(0, tokens, BATCH):
            for more in tl.static_range(BATCH):
                token = batch + more
                values = tl.load(x + token * columns + column, mask=inside & (token < tokens), other=0.0)
                most = tl.maximum(most, tl.abs(values.to(tl.float32)))
        return most >= threshold
    elif FROM == FLAGS:
        width = tl.cdiv(columns, 8)
        found = tl.zeros((BYTES,), dtype=tl.int32)
        for share in tl.static_range(SHARES):
            found |= tl.load(flags + share * width + byte, mask=byte < width, other=0).to(tl.int32)
        return ((found[:, None] >> bit[None, :]) & 1) != 0
    elif FROM == STORED:
        return tl.load(place + column, mask=inside, other=-1) >= 0
    else:
        return column < 0


@triton.jit
def _ranks(chosen):
    """How many of (bytes, 8) are chosen before each, row by row."""
    bits = chosen.to(tl.int32)
    of_byte = tl.sum(bits, axis=1)
    before = tl.cumsum(of_byte, axis=0) - of_byte
    return before[:, None] + tl.cumsum(bits, axis=1) - bits


@triton.jit
def split_tokens(
    x,
    codes,
    absmax,
    place,
    index,
    flags,
    loose,
    placed,
    spots,
    counts,
    marks,
    loose_inputs,
    placed_inputs,
    weight_codes,
    loose_codes,
    scratch,
    arrived,
    tokens,
    rows,
    columns,
    stored,
    share,  # tokens of a program
    gathering,  # programs that gather codes
    threshold,
    SHARES: tl.constexpr,
    FROM: tl.constexpr,
    PLACES: tl.constexpr,
    LOOSE: tl.constexpr,
    LATE: tl.constexpr,
    BYTES: tl.constexpr,
    BATCH: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Codes and largest magnitudes of some tokens per program, and what the product needs for outlier columns.

    loose and placed (columns,) int32 get the outlier columns without and with a 16-bit weight, ascending, spots where
    the latter are stored, counts how many there are, and marks (columns,) int8 which columns are loose. Of the first
    ITEMS of each, unless LATE, the inputs go to loose_inputs and placed_inputs (tokens, ITEMS), and if `gathering` the
    codes to loose_codes (rows, ITEMS); otherwise the product fetches them for itself.
    """
    # Programs that gather come first: their chain of loads is the longest.
    program = tl.program_id(0) - gathering - 1
    column = tl.arange(0, BYTES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = column < columns
    if EARLY:
        gdc_launch_dependents()
    if EARLY and FROM != FLAGS:
        gdc_wait()
    following = tl.load(x + program * share * columns + column, mask=inside & (program >= 0), other=0.0)
    if EARLY and FROM == FLAGS:
        gdc_wait()
    crossing = _crossing(x, place, flags, tokens, columns, threshold, SHARES, FROM, BYTES, BATCH)
    without, beside = crossing, crossing
    if PLACES:
        spot = tl.load(place + column, mask=inside, other=-1).to(tl.int32)
        beside = crossing & (spot >= 0)
        without = crossing & (spot < 0)
    if LOOSE and not LATE:
        if FROM == STORED:
            rank = tl.load(place + column, mask=inside, other=-1).to(tl.int32)
        else:
            rank = _ranks(without)
    if program >= 0:
        if PLACES and not LATE:
            rank_beside = spot if FROM == STORED else _ranks(beside)
        if program == 0:
            tl.store(arrived + tl.arange(0, DIVIDED), tl.zeros((DIVIDED,), dtype=tl.int32))
        last = tl.minimum(program * share + share, tokens)
        for token in range(program * share, last):
            start = token * columns
            given = following
            following = tl.load(x + start + columns + column, mask=inside & (token + 1 < last), other=0.0)
            values = tl.where(crossing, 0.0, given.to(tl.float32))
            bits = tl.abs(values).to(tl.int32, bitcast=True)
            largest = tl.max(tl.max(bits, axis=1), axis=0).to(tl.float32, bitcast=True)
            tl.store(codes + start + column, codes_of(values, largest).to(tl.int8), mask=inside)
            tl.store(absmax + token, largest)
            if LOOSE and not LATE:
                tl.store(loose_inputs + token * ITEMS + rank, given, mask=without & (rank < ITEMS))
            if PLACES and not LATE:
                tl.store(placed_inputs + token * ITEMS + rank_beside, given, mask=beside & (rank_beside < ITEMS))
    elif program == -1:
        if LOOSE:
            tl.store(marks + column, without.to(tl.int8), mask=inside)
        if FROM >= ALL_TOKENS:
            if LATE:
                rank = _ranks(without)
            tl.store(loose + rank, column, mask=without)
            tl.store(counts, tl.sum(tl.sum(without.to(tl.int32), axis=1), axis=0))
            if PLACES:
                rank_beside = _ranks(beside)
                tl.store(placed + rank_beside, column, mask=beside)
                tl.store(spots + rank_beside, spot, mask=beside)
                tl.store(counts + 1, tl.sum(tl.sum(beside.to(tl.int32), axis=1), axis=0))
    elif LOOSE:
        block = program + gathering + 1
        item = tl.arange(0, ITEMS)
        if FROM == STORED:
            count = stored
            chosen = tl.load(index + item, mask=item < count, other=0)
        else:
            count = tl.sum(tl.sum(without.to(tl.int32), axis=1), axis=0)
            if LATE:
                rank = _ranks(without)
            tl.store(scratch + block * ITEMS + rank, column, mask=without & (rank < ITEMS))
            tl.debug_barrier()
            chosen = tl.load(scratch + block * ITEMS + item, mask=item < count, other=0)
        row = block * ROWS + tl.arange(0, ROWS)
        known = (row < rows)[:, None] & (item < count)[None, :]
        found = tl.load(weight_codes + row.to(tl.int64)[:, None] * columns + chosen[None, :], mask=known, other=0)
        tl.store(loose_codes + row[:, None] * ITEMS + item[None, :], found, mask=(row < rows)[:, None])
