"""What a decoder block does between its products, for one token of one sequence (`whit.kernels.decode_ops`).

Arguments are `whit.kernels.cpu.words`; tensors are addresses of contiguous float32 unless named otherwise.
"""

# mypy: ignore-errors
from __future__ import annotations

import math

from numba import njit

from whit.kernels.cpu.decode import CHUNK, INLINE
from whit.kernels.cpu.vectors import (
    all_equal,
    exponential,
    load_float,
    load_floats,
    minus,
    multiply_add,
    over,
    plus,
    store_float,
    store_floats,
    sum_of,
    times,
)
from whit.kernels.cpu.words import real, word

BYTES = 4
FOUR = 4 * CHUNK


@njit(**INLINE)
def _exp(value):
    return sum_of(exponential(all_equal(value)), all_equal(0.0)) / CHUNK


@njit(**INLINE)
def _dot(left, right, size):
    total = all_equal(0.0)
    whole = size // CHUNK * CHUNK
    for index in range(0, whole, CHUNK):
        total = multiply_add(load_floats(left + BYTES * index), load_floats(right + BYTES * index), total)
    out = sum_of(total, all_equal(0.0))
    for index in range(whole, size):
        out += load_float(left + BYTES * index) * load_float(right + BYTES * index)
    return out


def normalise(at, start, stop):
    """states += update (address 0: none); out = weight * states / sqrt(mean of squares + epsilon).

    states, update, weight, out, columns, epsilon.
    """
    states, update, weight, out, columns, epsilon = (
        word(at, 0),
        word(at, 1),
        word(at, 2),
        word(at, 3),
        word(at, 4),
        real(at, 5),
    )
    if update:
        for index in range(columns):
            store_float(states + BYTES * index, load_float(states + BYTES * index) + load_float(update + BYTES * index))
    mean = _dot(states, states, columns) / columns
    factor = 1 / math.sqrt(mean + epsilon)
    for index in range(columns):
        value = load_float(states + BYTES * index) * factor
        store_float(out + BYTES * index, load_float(weight + BYTES * index) * value)


def gate(at, start, stop):
    """out = gate / (1 + e^-gate) * up for `columns` numbers: gate, up, out, columns."""
    left, right, out, columns = word(at, 0), word(at, 1), word(at, 2), word(at, 3)
    whole = columns // CHUNK * CHUNK
    one, zero = all_equal(1.0), all_equal(0.0)
    for index in range(0, whole, CHUNK):
        value = load_floats(left + BYTES * index)
        part = over(value, plus(one, exponential(minus(zero, value))))
        store_floats(out + BYTES * index, times(part, load_floats(right + BYTES * index)))
    for index in range(whole, columns):
        value = load_float(left + BYTES * index)
        store_float(out + BYTES * index, value / (1 + _exp(-value)) * load_float(right + BYTES * index))


@njit(**INLINE)
def _rotate(vector, cosine, sine, out, size):
    half = size // 2
    for index in range(half):
        first, second = load_float(vector + BYTES * index), load_float(vector + BYTES * (index + half))
        low, high = BYTES * index, BYTES * (index + half)
        store_float(out + low, first * load_float(cosine + low) - second * load_float(sine + low))
        store_float(out + high, second * load_float(cosine + high) + first * load_float(sine + high))


@njit(**INLINE)
def _four(share, vector, one, two, three, four):
    """Four registers of sums, each with its part of share * vector added."""
    one = multiply_add(share, load_floats(vector), one)
    two = multiply_add(share, load_floats(vector + BYTES * CHUNK), two)
    three = multiply_add(share, load_floats(vector + 2 * BYTES * CHUNK), three)
    four = multiply_add(share, load_floats(vector + 3 * BYTES * CHUNK), four)
    return one, two, three, four


@njit(**INLINE)
def _shares(scores, first, position, highest):
    """Scores of tokens `first` to `position` become e^(score - highest); their sum."""
    total, most = all_equal(0.0), all_equal(highest)
    whole = first + (position + 1 - first) // CHUNK * CHUNK
    for token in range(first, whole, CHUNK):
        share = exponential(minus(load_floats(scores + BYTES * token), most))
        store_floats(scores + BYTES * token, share)
        total = plus(total, share)
    out = sum_of(total, all_equal(0.0))
    for token in range(whole, position + 1):
        share = _exp(load_float(scores + BYTES * token) - highest)
        store_float(scores + BYTES * token, share)
        out += share
    return out


@njit(**INLINE)
def _mix(shares, first, position, held, own, sum_, out, size):
    """The values of tokens `first` to `position`, of which the last is `own`, by their shares of the sum."""
    last = load_float(shares + BYTES * position)
    divisor, zero = all_equal(sum_), all_equal(0.0)
    wide, whole = size // FOUR * FOUR, size // CHUNK * CHUNK
    for index in range(0, wide, FOUR):  # four sums at a time: one would wait for itself
        there = held + BYTES * index
        one, two, three, four = _four(all_equal(last), own + BYTES * index, zero, zero, zero, zero)
        for token in range(first, position):
            share = all_equal(load_float(shares + BYTES * token))
            one, two, three, four = _four(share, there + BYTES * size * token, one, two, three, four)
        there = out + BYTES * index
        store_floats(there, over(one, divisor))
        store_floats(there + BYTES * CHUNK, over(two, divisor))
        store_floats(there + 2 * BYTES * CHUNK, over(three, divisor))
        store_floats(there + 3 * BYTES * CHUNK, over(four, divisor))
    for index in range(wide, whole, CHUNK):
        mixed = times(all_equal(last), load_floats(own + BYTES * index))
        for token in range(first, position):
            share = all_equal(load_float(shares + BYTES * token))
            mixed = multiply_add(share, load_floats(held + BYTES * (size * token + index)), mixed)
        store_floats(out + BYTES * index, over(mixed, divisor))
    for index in range(whole, size):
        mixture = last * load_float(own + BYTES * index)
        for token in range(first, position):
            mixture += load_float(shares + BYTES * token) * load_float(held + BYTES * (size * token + index))
        store_float(out + BYTES * index, mixture / sum_)


def attend(at, start, stop):
    """Heads `start` to `stop` of `rotate_and_attend`, the new key and value written to the cache.

    query, key, value, keys and values of the cache, out, cosine, sine, place (int64: position, first that is no
    padding), room (per head: `length` numbers, and twice a head), heads for each key head, length, size, scaling.
    """
    query, key, value = word(at, 0), word(at, 1), word(at, 2)
    keys, values, out = word(at, 3), word(at, 4), word(at, 5)
    cosine, sine, place, room = word(at, 6), word(at, 7), word(at, 8), word(at, 9)
    sharing, length, size = word(at, 10), word(at, 11), word(at, 12)
    scaling = real(at, 13)
    position, first = word(place, 0), word(place, 1)
    turn = BYTES * size * (position - first)
    for head in range(start, stop):
        shared = head // sharing
        scores = room + BYTES * (length + 2 * size) * head
        turned = scores + BYTES * length
        new = turned + BYTES * size
        _rotate(query + BYTES * size * head, cosine + turn, sine + turn, turned, size)
        _rotate(key + BYTES * size * shared, cosine + turn, sine + turn, new, size)
        own = value + BYTES * size * shared
        cached, held = keys + BYTES * size * length * shared, values + BYTES * size * length * shared
        if head % sharing == 0:  # the others use what they have computed themselves
            for index in range(size):
                there = BYTES * (size * position + index)
                store_float(cached + there, load_float(new + BYTES * index))
                store_float(held + there, load_float(own + BYTES * index))
        highest = _dot(turned, new, size) * scaling
        store_float(scores + BYTES * position, highest)
        for token in range(first, position):
            score = _dot(turned, cached + BYTES * size * token, size) * scaling
            store_float(scores + BYTES * token, score)
            highest = max(highest, score)
        sum_ = _shares(scores, first, position, highest)
        _mix(scores, first, position, held, own, sum_, out + BYTES * size * head, size)
