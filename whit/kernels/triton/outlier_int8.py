"""The Triton kernels of `whit.kernels.outlier_int8`, apart because Triton is not installed everywhere.

Codes of a token are those of `whit.formats.outlier_int8.quantise`, bit for bit: divisions are rounded correctly, and
these kernels must be compiled without fused multiply-adds (`enable_fp_fusion=False`), which would round once where the
plain meaning rounds twice. Largest magnitudes are found as integers: the order of non-negative floats is that of their
bits, and NaN, above infinity, spreads.
"""

# mypy: ignore-errors
# ruff: noqa: PLR0915, SIM102, SIM108
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

LEVELS = tl.constexpr(127.0)
SMALLEST = tl.constexpr(2.0**-100)
ROUNDER = tl.constexpr(12582912.0)  # adding and taking away 1.5 * 2**23 rounds to nearest, ties to even

NO_OUTLIERS = tl.constexpr(0)
STORED = tl.constexpr(1)
ALL_TOKENS = tl.constexpr(2)
FLAGS = tl.constexpr(3)

DIVIDED = tl.constexpr(1024)  # most tiles that are divided


def described(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    """A matrix as the copy engine takes it, in blocks (rows, columns)."""
    return TensorDescriptor.from_tensor(matrix, block)


@triton.jit
def _codes(values, largest):
    """rint(127 values / largest) as int32; 0 where largest is 0. torch's 127 / largest is 127 (1 / largest)."""
    factor = tl.div_rn(1.0, tl.maximum(largest, SMALLEST)) * LEVELS
    scaled = tl.minimum(tl.maximum(values * factor, -LEVELS), LEVELS)
    return ((scaled + ROUNDER) - ROUNDER).to(tl.int32)


@triton.jit
def _dot4(left, right, HARDWARE: tl.constexpr):
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
    LOOP: tl.constexpr,
    EARLY: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """y of one token. A program takes ROWS rows at a time and asks for them before it looks at x.

    Outlier columns without a 16-bit weight are picked one after the other, ITEMS at a time, by integer reductions.
    """
    first = tl.program_id(0)
    blocks = tl.cdiv(rows, ROWS)
    word = tl.arange(0, WORDS)
    lane = tl.arange(0, ROWS)
    item = tl.arange(0, ITEMS)
    inside = word < width
    row = first * ROWS + lane
    weights = tl.load(
        words + row.to(tl.int64)[:, None] * width + word[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0
    )
    column = word[:, None] * 4 + tl.arange(0, 4)[None, :]
    if LISTED:
        spot = tl.load(place + column, mask=inside[:, None], other=-1)
        listed = tl.load(index + item, mask=item < stored, other=0)
    if EARLY:  # nothing above depends on the kernel before
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(x + column, mask=inside[:, None], other=0.0).to(tl.float32)
    magnitude = tl.abs(values)
    if LISTED:
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
    largest = tl.max(tl.max(bits, axis=1), axis=0).to(tl.float32, bitcast=True)
    code = tl.where(crossing, 0, _codes(tl.where(crossing, 0.0, values), largest))
    packed = tl.sum((code & 255) << (tl.arange(0, 4) * 8)[None, :], axis=1)

    if DYNAMIC:
        loose = crossing
        if LISTED:
            loose = loose & (spot < 0)
        keys = tl.where(loose, column, columns)
        chosen = tl.full((ITEMS,), columns, dtype=tl.int32)
        latest = tl.min(tl.min(keys, axis=1), axis=0)
        taken = 0
        while (latest < columns) & (taken < ITEMS):
            chosen = tl.where(item == taken, latest, chosen)
            taken += 1
            latest = tl.min(tl.min(tl.where(keys > latest, keys, columns), axis=1), axis=0)
        large = tl.load(x + chosen, mask=chosen < columns, other=0.0).to(tl.float32)

    for block in range(first, blocks, tl.num_programs(0)):
        row = block * ROWS + lane
        here = row < rows
        start = row.to(tl.int64)
        if LOOP:
            following = row + tl.num_programs(0) * ROWS
            ahead = tl.load(
                words + following.to(tl.int64)[:, None] * width + word[None, :],
                mask=(following < rows)[:, None] & inside[None, :],
                other=0,
            )
        steps = tl.load(absmax + row * absmax_step, mask=here, other=0.0) / LEVELS
        if WIDE:
            known = here[:, None] & (item < stored)[None, :]
            beside_weight = tl.load(wide + start[:, None] * stored + item[None, :], mask=known, other=0.0)
        elif LISTED:
            known = here[:, None] & (item < stored)[None, :]
            beside_code = tl.load(codes + start[:, None] * columns + listed[None, :], mask=known, other=0)
        if DYNAMIC:
            known = here[:, None] & (chosen < columns)[None, :]
            decoded = tl.load(codes + start[:, None] * columns + chosen[None, :], mask=known, other=0)
        total = tl.sum(_dot4(weights, packed[None, :], HARDWARE), axis=1).to(tl.float32) * (largest / LEVELS)
        if DYNAMIC:
            total += tl.sum(decoded.to(tl.float32) * large[None, :], axis=1)
            rest = latest
            while rest < columns:  # more outliers than are picked at once: slow, and right
                single = tl.load(codes + start * columns + rest, mask=here, other=0)
                total += single.to(tl.float32) * tl.load(x + rest).to(tl.float32)
                rest = tl.min(tl.min(tl.where(keys > rest, keys, columns), axis=1), axis=0)
        if LISTED and not WIDE:
            total += tl.sum(beside_code.to(tl.float32) * beside[None, :], axis=1)
            for more in range(ITEMS, stored):
                where = tl.load(index + more)
                single = tl.load(codes + start * columns + where, mask=here, other=0)
                total += single.to(tl.float32) * tl.load(x + where).to(tl.float32)
        total = total * steps
        if WIDE:
            total += tl.sum(beside_weight.to(tl.float32) * beside[None, :], axis=1)
            for more in range(ITEMS, stored):
                other = tl.load(x + tl.load(index + more)).to(tl.float32)
                if DYNAMIC:
                    other = tl.where(tl.abs(other) >= threshold, other, 0.0)
                total += tl.load(wide + start * stored + more, mask=here, other=0.0).to(tl.float32) * other
        if BIAS:
            given = tl.load(bias + row, mask=here, other=0.0)
            total += given.to(out.dtype.element_ty).to(tl.float32)
        tl.store(out + row, total.to(out.dtype.element_ty), mask=here)
        if LOOP:
            weights = ahead


@triton.jit
def column_flags(
    x, flags, tokens, columns, share, threshold, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr
):
    """flags (shares, bytes) uint8: bit j of byte i says whether column 8 i + j reaches the threshold in a share of
    the tokens."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
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
    x, place, flags, tokens, columns, threshold, SHARES: tl.constexpr, FROM: tl.constexpr, BYTES: tl.constexpr
):
    """Whether a column is an outlier: (BYTES, 8)."""
    byte = tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    column = byte[:, None] * 8 + bit[None, :]
    inside = column < columns
    if FROM == ALL_TOKENS:
        most = tl.zeros((BYTES, 8), dtype=tl.float32)
        for batch in range(0, tokens, 8):
            for more in tl.static_range(8):
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
    BYTES: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Codes and largest magnitudes of some tokens per program, and what the product needs for outlier columns.

    loose and placed (columns,) int32 get the outlier columns without and with a 16-bit weight, ascending, spots where
    the latter are stored, and counts how many there are: any number fits. Of the first ITEMS of each, the inputs go to
    loose_inputs and placed_inputs (tokens, ITEMS), and codes to loose_codes (rows, ITEMS).
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    # Programs that gather come first: their chain of loads is the longest.
    program = tl.program_id(0) - gathering - 1
    column = tl.arange(0, BYTES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = column < columns
    following = tl.load(x + program * share * columns + column, mask=inside & (program >= 0), other=0.0)
    crossing = _crossing(x, place, flags, tokens, columns, threshold, SHARES, FROM, BYTES)
    without, beside = crossing, crossing
    if PLACES:
        spot = tl.load(place + column, mask=inside, other=-1).to(tl.int32)
        beside = crossing & (spot >= 0)
        without = crossing & (spot < 0)
    if LOOSE:
        if FROM == STORED:
            rank = tl.load(place + column, mask=inside, other=-1).to(tl.int32)
        else:
            rank = _ranks(without)
    if program >= 0:
        if PLACES:
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
            tl.store(codes + start + column, _codes(values, largest).to(tl.int8), mask=inside)
            tl.store(absmax + token, largest)
            if LOOSE:
                tl.store(loose_inputs + token * ITEMS + rank, given, mask=without & (rank < ITEMS))
            if PLACES:
                tl.store(placed_inputs + token * ITEMS + rank_beside, given, mask=beside & (rank_beside < ITEMS))
    elif program == -1:
        if FROM >= ALL_TOKENS:
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
            tl.store(scratch + block * ITEMS + rank, column, mask=without & (rank < ITEMS))
            tl.debug_barrier()
            chosen = tl.load(scratch + block * ITEMS + item, mask=item < count, other=0)
        row = block * ROWS + tl.arange(0, ROWS)
        known = (row < rows)[:, None] & (item < count)[None, :]
        found = tl.load(weight_codes + row.to(tl.int64)[:, None] * columns + chosen[None, :], mask=known, other=0)
        tl.store(loose_codes + row[:, None] * ITEMS + item[None, :], found, mask=(row < rows)[:, None])


@triton.jit
def _operand(
    source, first, start, limit, columns, R: tl.constexpr, C: tl.constexpr, DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr
):
    """A tile (R, C) of a matrix (limit, columns), zeros beyond its ends."""
    if DESCRIPTOR:
        return source.load([first, start])
    else:
        row = first + tl.arange(0, R)
        column = start + tl.arange(0, C)
        pointers = source + row.to(tl.int64)[:, None] * columns + column[None, :]
        if EVEN:
            return tl.load(pointers, mask=(row < limit)[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=(row < limit)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def _add_product(inputs, weight, total, HALF: tl.constexpr):
    """total + inputs weight^T in float32; HALF: in the 16-bit type of the inputs, which holds the weight too."""
    if HALF:
        return tl.dot(inputs, tl.trans(weight.to(inputs.dtype)), total)
    else:  # both 16-bit types, and codes, are exact in tf32
        return tl.dot(inputs.to(tl.float32), tl.trans(weight.to(tl.float32)), total, input_precision="tf32")


@triton.jit
def split_product(
    left,  # (tokens, columns) int8: pointer or descriptor
    right,  # (rows, columns) int8: pointer or descriptor
    x,
    codes,
    input_absmax,
    absmax,
    loose,
    placed,
    spots,
    counts,
    loose_inputs,
    placed_inputs,
    loose_codes,
    wide,
    bias,
    out,
    parts,
    arrived,
    tokens,
    rows,
    columns,
    stored,
    absmax_step,
    whole,  # tiles that are not divided
    share,  # columns of a part of the others
    LOOSE: tl.constexpr,
    PLACED: tl.constexpr,
    COUNTED: tl.constexpr,
    HALF: tl.constexpr,  # whether x and wide are of one type
    EXACT: tl.constexpr,  # whether products of 16-bit numbers can be asked for
    BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ITEMS: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One tile (M, N) of y: the integer product, then the outlier columns in 16 bit, then scales and bias.

    Tiles from `whole` on are divided along the columns among PARTS programs each, so that the last tiles occupy all
    multiprocessors. The last program to arrive adds the others' sums, which are integers: in any order the same.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    from_column, to_column = 0, columns
    part, divided = 0, 0
    if PARTS > 1:
        if program >= whole:
            divided = program - whole
            part = divided % PARTS
            divided = divided // PARTS
            from_column = part * share
            to_column = tl.minimum(from_column + share, columns)
    tile = tl.minimum(program, whole + divided)
    down, across = tl.cdiv(tokens, M), tl.cdiv(rows, N)
    band = tile // (GROUP * across)
    height = tl.minimum(down - band * GROUP, GROUP)
    inner = tile % (GROUP * across)
    first = (band * GROUP + inner % height) * M
    second = (inner // height) * N

    token = first + tl.arange(0, M)
    row = second + tl.arange(0, N)
    known, here = token < tokens, row < rows
    from_token = token.to(tl.int64)[:, None] * columns
    from_row = row.to(tl.int64)[:, None]
    item = tl.arange(0, ITEMS)
    kind = x.dtype.element_ty
    # What the end of the tile needs is asked for now: it arrives while the tensor cores work.
    by_token = tl.load(input_absmax + token, mask=known, other=0.0) / LEVELS
    by_row = tl.load(absmax + row * absmax_step, mask=here, other=0.0) / LEVELS
    if LOOSE:
        loose_count = tl.load(counts) if COUNTED else stored
        some = (item < loose_count)[None, :]
        inputs = tl.load(loose_inputs + token[:, None] * ITEMS + item[None, :], mask=known[:, None] & some, other=0.0)
        decoded = tl.load(loose_codes + row[:, None] * ITEMS + item[None, :], mask=here[:, None] & some, other=0)
    if PLACED:
        placed_count = tl.load(counts + 1) if COUNTED else stored
        some = (item < placed_count)[None, :]
        where = tl.load(spots + item, mask=item < placed_count, other=0) if COUNTED else item
        large = tl.load(placed_inputs + token[:, None] * ITEMS + item[None, :], mask=known[:, None] & some, other=0.0)
        weight = tl.load(wide + from_row * stored + where[None, :], mask=here[:, None] & some, other=0.0)

    sums = tl.zeros((M, N), dtype=tl.int32)
    for start in tl.range(from_column, to_column, K, num_stages=STAGES):
        one = _operand(left, first, start, tokens, columns, M, K, DESCRIPTOR, EVEN)
        other = _operand(right, second, start, rows, columns, N, K, DESCRIPTOR, EVEN)
        sums = tl.dot(one, tl.trans(other), sums, out_dtype=tl.int32)

    if PARTS > 1:
        if program >= whole:
            cell = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
            tl.store(parts + (divided * PARTS + part) * (M * N) + cell, sums)
            tl.debug_barrier()
            if tl.atomic_add(arrived + divided, 1) < PARTS - 1:
                return
            sums = tl.load(parts + divided * PARTS * (M * N) + cell, cache_modifier=".cg")
            for other_part in tl.static_range(1, PARTS):
                sums += tl.load(parts + (divided * PARTS + other_part) * (M * N) + cell, cache_modifier=".cg")

    total = sums.to(tl.float32) * by_token[:, None]
    if LOOSE:
        total = _add_product(inputs, decoded, total, EXACT)
        for start in tl.range(ITEMS, loose_count, ITEMS, num_stages=1):  # more than most models have
            column = tl.load(loose + start + item, mask=start + item < loose_count, other=0)
            some = (start + item < loose_count)[None, :]
            inputs = tl.load(x + from_token + column[None, :], mask=known[:, None] & some, other=0.0)
            decoded = tl.load(codes + from_row * columns + column[None, :], mask=here[:, None] & some, other=0)
            total = _add_product(inputs, decoded, total, EXACT)
    total = total * by_row[None, :]
    if PLACED:
        total = _add_product(large, weight, total, HALF)
        for start in tl.range(ITEMS, placed_count, ITEMS, num_stages=1):
            listed = start + item
            column = tl.load(placed + listed, mask=listed < placed_count, other=0)
            where = tl.load(spots + listed, mask=listed < placed_count, other=0) if COUNTED else listed
            some = (listed < placed_count)[None, :]
            large = tl.load(x + from_token + column[None, :], mask=known[:, None] & some, other=0.0)
            weight = tl.load(wide + from_row * stored + where[None, :], mask=here[:, None] & some, other=0.0)
            total = _add_product(large, weight, total, HALF)
    if BIAS:
        total += tl.load(bias + row, mask=here, other=0.0).to(kind).to(tl.float32)[None, :]
    tl.store(
        out + token.to(tl.int64)[:, None] * rows + row[None, :], total.to(kind), mask=known[:, None] & here[None, :]
    )
