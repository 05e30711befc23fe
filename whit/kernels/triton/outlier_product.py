"""LLM.int8() for many tokens: the product."""

# mypy: ignore-errors
# ruff: noqa: PLR0915, SIM102
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from whit.kernels.triton.outlier_codes import LEVELS
from whit.kernels.triton.tiles import operand, tile_start


@triton.jit
def _add_product(inputs, weight, total, HALF: tl.constexpr):
    """total + inputs weight^T in float32; HALF: in the 16-bit type of the inputs, which holds the weight too."""
    if HALF:
        return tl.dot(inputs, tl.trans(weight.to(inputs.dtype)), total)
    else:  # both 16-bit types, and codes, are exact in tf32
        return tl.dot(inputs.to(tl.float32), tl.trans(weight.to(tl.float32)), total, input_precision="tf32")


@triton.jit
def _integer_sums(
    left,
    right,
    first,
    second,
    begin,
    end,
    tokens,
    rows,
    columns,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The product of codes over the columns from begin to end: (M, N) int32."""
    sums = tl.zeros((M, N), dtype=tl.int32)
    for start in tl.range(begin, end, K, num_stages=STAGES):
        one = operand(left, first, start, tokens, columns, M, K, DESCRIPTOR, EVEN)
        other = operand(right, second, start, rows, columns, N, K, DESCRIPTOR, EVEN)
        sums = tl.dot(one, tl.trans(other), sums, out_dtype=tl.int32)
    return sums


@triton.jit
def _add_listed(
    x,
    weight,
    listed,
    places,
    total,
    begin,
    count,
    token,
    row,
    tokens,
    rows,
    columns,
    width,  # of a row of the weight
    ITEMS: tl.constexpr,
    PLACES: tl.constexpr,  # whether places says where the weight of a column is
    HALF: tl.constexpr,
):
    """total plus the products of the listed columns from number `begin` on, ITEMS at a time."""
    item = tl.arange(0, ITEMS)
    known, here = (token < tokens)[:, None], (row < rows)[:, None]
    for start in tl.range(begin, count, ITEMS, num_stages=1):
        number = start + item
        column = tl.load(listed + number, mask=number < count, other=0)
        where = tl.load(places + number, mask=number < count, other=0) if PLACES else number
        some = (number < count)[None, :]
        inputs = tl.load(x + token.to(tl.int64)[:, None] * columns + column[None, :], mask=known & some, other=0.0)
        other = tl.load(weight + row.to(tl.int64)[:, None] * width + where[None, :], mask=here & some, other=0)
        total = _add_product(inputs, other, total, HALF)
    return total


@triton.jit
def _finish(total, bias, out, token, row, tokens, rows, kind: tl.constexpr, BIAS: tl.constexpr):
    """Bias, rounding and the store of a tile."""
    known, here = token < tokens, row < rows
    if BIAS:
        total += tl.load(bias + row, mask=here, other=0.0).to(kind).to(tl.float32)[None, :]
    tl.store(
        out + token.to(tl.int64)[:, None] * rows + row[None, :], total.to(kind), mask=known[:, None] & here[None, :]
    )


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
    marks,
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
    most,  # loose columns that are fetched one by one
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
    LATE: tl.constexpr,  # whether inputs of outlier columns are fetched from x
    GATHERED: tl.constexpr,  # whether their codes have been gathered
    DENSE: tl.constexpr,  # whether many loose columns are multiplied as whole rows
    ONE_PASS: tl.constexpr,  # whether that is done in one loop with the integers
    CHUNK: tl.constexpr,  # columns at a time where there are more loose ones
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
    first, second = tile_start(tile, tokens, rows, M, N, GROUP)
    token = first + tl.arange(0, M)
    row = second + tl.arange(0, N)
    known, here = token < tokens, row < rows
    from_token = token.to(tl.int64)[:, None] * columns
    from_row = row.to(tl.int64)[:, None]
    item = tl.arange(0, ITEMS)
    kind = x.dtype.element_ty
    # What the end of the tile needs is asked for now: it arrives while the tensor cores work.
    by_row = tl.load(absmax + row * absmax_step, mask=here, other=0.0) / LEVELS
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    by_token = tl.load(input_absmax + token, mask=known, other=0.0) / LEVELS
    if LOOSE:
        loose_count = tl.load(counts) if COUNTED else stored
        few = loose_count
        if DENSE:  # so many that whole rows cost less
            few = tl.where(loose_count <= most, loose_count, 0)
        some = (item < few)[None, :]
        column = tl.load(loose + item, mask=item < few, other=0)
        if LATE:
            inputs = tl.load(x + from_token + column[None, :], mask=known[:, None] & some, other=0.0)
        else:
            inputs = tl.load(
                loose_inputs + token[:, None] * ITEMS + item[None, :], mask=known[:, None] & some, other=0.0
            )
        if GATHERED:
            decoded = tl.load(loose_codes + row[:, None] * ITEMS + item[None, :], mask=here[:, None] & some, other=0)
        else:
            decoded = tl.load(codes + from_row * columns + column[None, :], mask=here[:, None] & some, other=0)
    if PLACED:
        placed_count = tl.load(counts + 1) if COUNTED else stored
        some = (item < placed_count)[None, :]
        where = tl.load(spots + item, mask=item < placed_count, other=0) if COUNTED else item
        if LATE:
            column = tl.load(placed + item, mask=item < placed_count, other=0)
            large = tl.load(x + from_token + column[None, :], mask=known[:, None] & some, other=0.0)
        else:
            large = tl.load(
                placed_inputs + token[:, None] * ITEMS + item[None, :], mask=known[:, None] & some, other=0.0
            )
        weight = tl.load(wide + from_row * stored + where[None, :], mask=here[:, None] & some, other=0.0)

    if ONE_PASS:  # many loose columns are met in a loop of its own, which takes the others along
        to_column = tl.where(loose_count <= most, to_column, 0)
    sums = _integer_sums(
        left, right, first, second, from_column, to_column, tokens, rows, columns, M, N, K, DESCRIPTOR, EVEN, STAGES
    )
    if ONE_PASS:
        beyond = tl.zeros((M, N), dtype=tl.float32)
        for start in tl.range(0, tl.where(loose_count <= most, 0, columns), K, num_stages=STAGES):
            wanted = start + tl.arange(0, K)
            marked = tl.load(marks + wanted, mask=wanted < columns, other=0) != 0
            many = operand(x, first, start, tokens, columns, M, K, False, EVEN)
            one = operand(left, first, start, tokens, columns, M, K, DESCRIPTOR, EVEN)
            both = operand(right, second, start, rows, columns, N, K, DESCRIPTOR, EVEN)
            sums = tl.dot(one, tl.trans(both), sums, out_dtype=tl.int32)
            beyond = _add_product(tl.where(marked[None, :], many, 0.0).to(kind), both, beyond, EXACT)
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
        total = _add_listed(
            x, codes, loose, loose, total, ITEMS, few, token, row, tokens, rows, columns, columns,
            ITEMS, True, EXACT,
        )  # fmt: skip
        if ONE_PASS:
            total += beyond
        elif DENSE:  # all columns, with zeros for those that are not loose
            for start in tl.range(0, tl.where(loose_count <= most, 0, columns), CHUNK, num_stages=3):
                wanted = start + tl.arange(0, CHUNK)
                marked = tl.load(marks + wanted, mask=wanted < columns, other=0) != 0
                many = operand(x, first, start, tokens, columns, M, CHUNK, False, EVEN)
                rows_of_codes = operand(codes, second, start, rows, columns, N, CHUNK, False, EVEN)
                total = _add_product(tl.where(marked[None, :], many, 0.0).to(kind), rows_of_codes, total, EXACT)
    total = total * by_row[None, :]
    if PLACED:
        total = _add_product(large, weight, total, HALF)
        total = _add_listed(
            x, wide, placed, spots, total, ITEMS, placed_count, token, row, tokens, rows, columns, stored,
            ITEMS, COUNTED, HALF,
        )  # fmt: skip
    _finish(total, bias, out, token, row, tokens, rows, kind, BIAS)
