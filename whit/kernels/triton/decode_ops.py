"""The Triton kernels of `whit.kernels.decode_ops`, apart because Triton is not installed everywhere.

With EARLY a kernel is started while the one before it ends (programmatic dependent launch, Hopper), and waits for it
before it reads what that may have written.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def add_rms_norm(
    states, update, weight, total, normal, columns, epsilon, ADD: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < columns
    scale = tl.load(weight + column, mask=here, other=0.0).to(tl.float32)
    if EARLY == 2:
        gdc_launch_dependents()
    if EARLY:
        gdc_wait()
    if EARLY == 1:
        gdc_launch_dependents()
    value = tl.load(states + row * columns + column, mask=here, other=0.0)
    kind = value.dtype
    if ADD:
        added = tl.load(update + row * columns + column, mask=here, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(kind)
        tl.store(total + row * columns + column, value, mask=here)
    wide = value.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, axis=0) / columns + epsilon)
    rounded = (wide * factor).to(kind).to(tl.float32)
    tl.store(normal + row * columns + column, (scale * rounded).to(kind), mask=here)


@triton.jit
def gated(gate, up, out, columns, gate_stride, up_stride, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < columns
    if EARLY == 2:
        gdc_launch_dependents()
    if EARLY:
        gdc_wait()
    if EARLY == 1:
        gdc_launch_dependents()
    value = tl.load(gate + row * gate_stride + column, mask=here, other=0.0)
    factor = tl.load(up + row * up_stride + column, mask=here, other=0.0).to(tl.float32)
    wide = value.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(value.dtype).to(tl.float32)
    tl.store(out + row * columns + column, (active * factor).to(value.dtype), mask=here)


@triton.jit
def _rotated(vector, cosine, sine, column, here, SIZE: tl.constexpr):
    half = SIZE // 2
    other = tl.where(column < half, column + half, column - half)
    value = tl.load(vector + column, mask=here, other=0.0)
    kind = value.dtype
    turned = tl.load(vector + other, mask=here, other=0.0).to(tl.float32)
    turned = tl.where(column < half, -turned, turned)
    straight = (value.to(tl.float32) * cosine).to(kind).to(tl.float32)
    return (straight + (turned * sine).to(kind).to(tl.float32)).to(kind)


@triton.jit
def rotate_and_attend(  # noqa: PLR0915
    query,
    key,
    value,
    cosine,
    sine,
    keys,
    values,
    position,
    start,
    out,
    partial,
    arrived,
    query_stride,
    key_stride,
    value_stride,
    length,
    scaling,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,  # the least power of two that is no smaller
    LOOP: tl.constexpr,  # whether a part may be longer than KEYS
    EARLY: tl.constexpr,
):
    """One program: one head of one sequence, a part of the keys. The last part to arrive adds all parts, in order."""
    head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = head // HEADS
    own = head % HEADS
    shared = own // GROUP
    # Nothing up to the wait was written by the kernel before this one.
    at = tl.load(position).to(tl.int32)
    first = tl.load(start + sequence).to(tl.int32)
    column = tl.arange(0, WIDE)
    here = column < SIZE
    turn = (at - first) * SIZE + column
    cos = tl.load(cosine + turn, mask=here, other=0.0).to(tl.float32)
    sin = tl.load(sine + turn, mask=here, other=0.0).to(tl.float32)
    cache = (sequence * (HEADS // GROUP) + shared).to(tl.int64) * length * SIZE
    share = tl.cdiv(tl.cdiv(at - first, SPLITS), KEYS) * KEYS
    begin = first + split * share
    end = tl.minimum(begin + share, at)
    row = begin + tl.arange(0, KEYS)
    inside = (row < end)[:, None] & here[None, :]
    offset = row[:, None] * SIZE + column[None, :]
    known = tl.load(keys + cache + offset, mask=inside, other=0.0)
    held = tl.load(values + cache + offset, mask=inside, other=0.0)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    asked = _rotated(query + sequence * query_stride + own * SIZE, cos, sin, column, here, SIZE).to(tl.float32)
    asked = asked * scaling

    largest = -1e30
    weight = 0.0
    total = tl.zeros((WIDE,), dtype=tl.float32)
    for index in range(begin, end, KEYS):
        row = index + tl.arange(0, KEYS)
        score = tl.where(row < end, tl.sum(known.to(tl.float32) * asked[None, :], axis=1), -1e30)
        top = tl.maximum(largest, tl.max(score, axis=0))
        kept = tl.exp(largest - top)
        share_of = tl.where(row < end, tl.exp(score - top), 0.0)
        weight = weight * kept + tl.sum(share_of, axis=0)
        total = total * kept + tl.sum(share_of[:, None] * held.to(tl.float32), axis=0)
        largest = top
        if LOOP:
            row += KEYS
            inside = (row < end)[:, None] & here[None, :]
            offset = row[:, None] * SIZE + column[None, :]
            known = tl.load(keys + cache + offset, mask=inside, other=0.0)
            held = tl.load(values + cache + offset, mask=inside, other=0.0)
    if split == SPLITS - 1:
        fresh = _rotated(key + sequence * key_stride + shared * SIZE, cos, sin, column, here, SIZE)
        given = tl.load(value + sequence * value_stride + shared * SIZE + column, mask=here, other=0.0)
        if own % GROUP == 0:
            tl.store(keys + cache + at * SIZE + column, fresh, mask=here)
            tl.store(values + cache + at * SIZE + column, given, mask=here)
        score_here = tl.sum(fresh.to(tl.float32) * asked, axis=0)
        top_here = tl.maximum(largest, score_here)
        kept_here = tl.exp(largest - top_here)
        own_share = tl.exp(score_here - top_here)
        weight = weight * kept_here + own_share
        total = total * kept_here + own_share * given.to(tl.float32)
        largest = top_here
    answer = out + head * SIZE + column
    if SPLITS == 1:
        tl.store(answer, (total / weight).to(out.dtype.element_ty), mask=here)
    else:
        room = partial + (head * SPLITS + split) * (SIZE + 2)
        tl.store(room + column, total, mask=here)
        tl.store(room + SIZE, largest)
        tl.store(room + SIZE + 1, weight)
        tl.debug_barrier()
        ticket = tl.atomic_add(arrived + head, 1, sem="acq_rel")
        if ticket == SPLITS - 1:
            part = tl.arange(0, PARTS)
            theirs = partial + (head * SPLITS + part) * (SIZE + 2)
            known_part = part < SPLITS
            tops = tl.load(theirs + SIZE, mask=known_part, other=-1e30, cache_modifier=".cg")
            weights = tl.load(theirs + SIZE + 1, mask=known_part, other=0.0, cache_modifier=".cg")
            totals = tl.load(
                theirs[:, None] + column[None, :],
                mask=known_part[:, None] & here[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            factor = tl.exp(tops - tl.max(tops, axis=0))
            sum_of = tl.sum(factor * weights, axis=0)
            both = tl.sum(factor[:, None] * totals, axis=0)
            tl.store(answer, (both / sum_of).to(out.dtype.element_ty), mask=here)
            tl.store(arrived + head, 0)


@triton.jit
def rotate_and_store(
    query,
    key,
    value,
    cosine,
    sine,
    keys,
    values,
    start,
    out,
    tokens,
    query_stride,
    key_stride,
    value_stride,
    length,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    SHARED: tl.constexpr,
):
    """One program: one token. QUERIES and SHARED are powers of two, not below the number of heads and key heads."""
    item = tl.program_id(0).to(tl.int64)
    sequence = item // tokens
    at = item % tokens
    column = tl.arange(0, WIDE)[None, :]
    half = SIZE // 2
    other = tl.where(column < half, column + half, column - half)
    turn = tl.maximum(at - tl.load(start + sequence), 0) * SIZE + column
    cos = tl.load(cosine + turn, mask=column < SIZE, other=0.0).to(tl.float32)
    sin = tl.load(sine + turn, mask=column < SIZE, other=0.0).to(tl.float32)

    head = tl.arange(0, QUERIES)[:, None]
    here = (head < HEADS) & (column < SIZE)
    straight = tl.load(query + item * query_stride + head * SIZE + column, mask=here, other=0.0)
    turned = tl.load(query + item * query_stride + head * SIZE + other, mask=here, other=0.0).to(tl.float32)
    turned = tl.where(column < half, -turned, turned)
    kind = straight.dtype
    first = (straight.to(tl.float32) * cos).to(kind).to(tl.float32)
    tl.store(
        out + (item * HEADS + head) * SIZE + column,
        (first + (turned * sin).to(kind).to(tl.float32)).to(kind),
        mask=here,
    )

    head = tl.arange(0, SHARED)[:, None]
    here = (head < HEADS // GROUP) & (column < SIZE)
    straight = tl.load(key + item * key_stride + head * SIZE + column, mask=here, other=0.0)
    turned = tl.load(key + item * key_stride + head * SIZE + other, mask=here, other=0.0).to(tl.float32)
    turned = tl.where(column < half, -turned, turned)
    given = tl.load(value + item * value_stride + head * SIZE + column, mask=here, other=0.0)
    room = ((sequence * (HEADS // GROUP) + head) * length + at) * SIZE + column
    first = (straight.to(tl.float32) * cos).to(kind).to(tl.float32)
    tl.store(keys + room, (first + (turned * sin).to(kind).to(tl.float32)).to(kind), mask=here)
    tl.store(values + room, given, mask=here)


@triton.jit
def choose(
    logits,
    ids,
    tokens,
    count,
    ended,
    stops,
    position,
    logits_stride,
    vocabulary,
    room,
    pad,
    STOPS: tl.constexpr,
    MOVE: tl.constexpr,  # whether the position moves on
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one sequence."""
    sequence = tl.program_id(0)
    taken = tl.load(count + sequence)
    over = tl.load(ended + sequence)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    best = float("-inf")
    chosen = 0
    for begin in range(0, vocabulary, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        value = tl.load(
            logits + sequence.to(tl.int64) * logits_stride + column, mask=column < vocabulary, other=float("-inf")
        ).to(tl.float32)
        top = tl.max(value, axis=0)
        place = tl.argmax(value, axis=0) + begin
        chosen = tl.where(top > best, place, chosen)
        best = tl.maximum(top, best)
    chosen = tl.where(over != 0, pad, chosen).to(tl.int64)
    for index in tl.static_range(STOPS):
        over = tl.where(chosen == tl.load(stops + index), 1, over)
    tl.store(tokens + sequence * room + taken, chosen)
    tl.store(ids + sequence, chosen)
    tl.store(count + sequence, taken + 1)
    tl.store(ended + sequence, over)
    if MOVE and sequence == 0:
        tl.store(position, tl.load(position) + 1)
