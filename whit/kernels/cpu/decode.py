"""Packed weights times a few vectors on a CPU, one row at a time, decoded in registers.

A row of a group of columns is a table of at most sixteen levels in one register and sixteen codes at a time in another:
a permutation gives sixteen weights, a fused multiply and add their products. Nothing is written but the sums. Groups
and rows are whole chunks of sixteen columns, so nothing is read beyond the tensors.

Every step computes rows `start` to `stop` of y = W x + b for `count` vectors: x float32 (count, columns), y float32
(count, rows), b float32 (rows,) or address 0, each contiguous. Its arguments are `whit.kernels.cpu.words`: x, count,
columns, y, rows, b, then what its own text names; tensors are addresses. Layouts are those of `whit.formats`.
"""

# mypy: ignore-errors
from __future__ import annotations

from numba import njit

from whit.kernels.cpu.codes import code_loader, interleave, table_loader
from whit.kernels.cpu.vectors import (
    all_equal,
    counter,
    load_byte,
    load_bytes,
    load_float,
    load_floats,
    load_half,
    look_up,
    minus,
    multiply_add,
    prefetch,
    store_float,
    sum_of,
    times,
)
from whit.kernels.cpu.words import word

CHUNK = 16
PAIR = 2 * CHUNK
LINE = 64
AHEAD = 4096
INLINE = {"forceinline": True, "error_model": "numpy"}
OWN = 6  # place of the first argument of its own


@njit(**INLINE)
def common(at):
    """The arguments that all products have."""
    return word(at, 0), word(at, 1), word(at, 2), word(at, 3), word(at, 4), word(at, 5)


@njit(**INLINE)
def finish(total, y, rows, bias, vector, row):
    """Store one output."""
    if bias:
        total += load_float(bias + 4 * row)
    store_float(y + 4 * (rows * vector + row), total)


def _group_loop(bits):
    """A loop over one group of columns: pairs of chunks, and one chunk if `single_left`."""
    single, low, high = code_loader(bits, 0), code_loader(bits, 0), code_loader(bits, 1)
    size = 2 * bits

    @njit(**INLINE)
    def group(x, codes, pairs, single_left, table, even, odd):
        for _ in range(pairs):
            even = multiply_add(look_up(table, low(codes)), load_floats(x), even)
            odd = multiply_add(look_up(table, high(codes)), load_floats(x + 4 * CHUNK), odd)
            codes += 2 * size
            x += 8 * CHUNK
        if single_left:
            even = multiply_add(look_up(table, single(codes)), load_floats(x), even)
        return even, odd

    return group


group_1, group_2, group_3, group_4 = (_group_loop(bits) for bits in (1, 2, 3, 4))
table_1, table_2, table_3, table_4 = (table_loader(bits) for bits in (1, 2, 3, 4))
counting_1, counting_2, counting_3, counting_4 = (counter(bits) for bits in (1, 2, 3, 4))


@njit(**INLINE)
def _group(bits, x, codes, pairs, single_left, table, even, odd):
    if bits == 1:
        return group_1(x, codes, pairs, single_left, table, even, odd)
    if bits == 2:
        return group_2(x, codes, pairs, single_left, table, even, odd)
    if bits == 3:
        return group_3(x, codes, pairs, single_left, table, even, odd)
    return group_4(x, codes, pairs, single_left, table, even, odd)


@njit(**INLINE)
def _table(bits, address):
    if bits == 1:
        return table_1(address)
    if bits == 2:
        return table_2(address)
    if bits == 3:
        return table_3(address)
    return table_4(address)


@njit(**INLINE)
def _counting(bits):
    if bits == 1:
        return counting_1()
    if bits == 2:
        return counting_2()
    if bits == 3:
        return counting_3()
    return counting_4()


@njit(**INLINE)
def packed_code(address, bits, index):
    """Code `index` of those packed from an address on."""
    place = index * bits
    value = load_byte(address + (place >> 3)) >> (place & 7)
    if (place & 7) + bits > 8:
        value |= load_byte(address + (place >> 3) + 1) << (8 - (place & 7))
    return value & ((1 << bits) - 1)


@njit(**INLINE)
def ask_for(address, size):
    """Ask for what is decoded soon: the hardware's own foresight ends at each page of memory."""
    for line in range(0, size, LINE):
        prefetch(address + AHEAD + line)


def interleave_inputs(at, start, stop):
    """Inputs in the order of codes of four bits: x, count, columns, (not read), where to."""
    x, count, columns, out = word(at, 0), word(at, 1), word(at, 2), word(at, 4)
    for index in range(0, 4 * count * columns, 4 * CHUNK):
        interleave(x + index, out + index)


def level_rows(at, start, stop):
    """`LevelTable`: codes, levels, bits, columns of a block."""
    x, count, columns, y, rows, bias = common(at)
    codes, levels, bits, size = word(at, OWN + 0), word(at, OWN + 1), word(at, OWN + 2), word(at, OWN + 3)
    groups = -(-columns // size)
    last = columns - (groups - 1) * size
    row_bytes = columns // 8 * bits
    group_bytes = size // 8 * bits
    for row in range(start, stop):
        ask_for(codes + row_bytes * row, row_bytes)
        for vector in range(count):
            even = all_equal(0.0)
            odd = all_equal(0.0)
            place = x + 4 * columns * vector
            packed = codes + row_bytes * row
            pairs, single_left = size // PAIR, size % PAIR
            for group in range(groups):
                if group == groups - 1:
                    pairs, single_left = last // PAIR, last % PAIR
                table = _table(bits, levels + ((row * groups + group) << bits) * 2)
                even, odd = _group(bits, place, packed, pairs, single_left, table, even, odd)
                place += 4 * size
                packed += group_bytes
            finish(sum_of(even, odd), y, rows, bias, vector, row)


def integer_rows(at, start, stop):
    """`GroupedInteger` of at most 4 bits: codes, scales, zeros (0 if symmetric), bits, columns of a group."""
    x, count, columns, y, rows, bias = common(at)
    codes, scales, zeros, bits = word(at, OWN + 0), word(at, OWN + 1), word(at, OWN + 2), word(at, OWN + 3)
    size = word(at, OWN + 4)
    groups = -(-columns // size)
    last = columns - (groups - 1) * size
    row_bytes = columns // 8 * bits
    group_bytes = size // 8 * bits
    for row in range(start, stop):
        ask_for(codes + row_bytes * row, row_bytes)
        for vector in range(count):
            even = all_equal(0.0)
            odd = all_equal(0.0)
            place = x + 4 * columns * vector
            packed = codes + row_bytes * row
            pairs, single_left = size // PAIR, size % PAIR
            for group in range(groups):
                if group == groups - 1:
                    pairs, single_left = last // PAIR, last % PAIR
                number = row * groups + group
                scale = load_half(scales + 2 * number)
                zero = 0.5
                if zeros:
                    zero = float(packed_code(zeros, bits, number))
                elif bits > 1:
                    zero = float(1 << (bits - 1))
                else:
                    scale *= 2
                table = times(minus(_counting(bits), all_equal(zero)), all_equal(scale))
                even, odd = _group(bits, place, packed, pairs, single_left, table, even, odd)
                place += 4 * size
                packed += group_bytes
            finish(sum_of(even, odd), y, rows, bias, vector, row)


def byte_rows(at, start, stop):
    """`GroupedInteger` of 8 bits: codes, scales, zeros (0 if symmetric), columns of a group."""
    x, count, columns, y, rows, bias = common(at)
    codes, scales, zeros, size = word(at, OWN + 0), word(at, OWN + 1), word(at, OWN + 2), word(at, OWN + 3)
    groups = -(-columns // size)
    last = columns - (groups - 1) * size
    for row in range(start, stop):
        ask_for(codes + columns * row, columns)
        for vector in range(count):
            even = all_equal(0.0)
            odd = all_equal(0.0)
            place = x + 4 * columns * vector
            packed = codes + columns * row
            pairs, single_left = size // PAIR, size % PAIR
            for group in range(groups):
                if group == groups - 1:
                    pairs, single_left = last // PAIR, last % PAIR
                number = row * groups + group
                zero = all_equal(128.0)
                if zeros:
                    zero = all_equal(float(load_byte(zeros + number)))
                scale = all_equal(load_half(scales + 2 * number))
                low = all_equal(0.0)
                high = all_equal(0.0)
                for _ in range(pairs):
                    low = multiply_add(minus(load_bytes(packed), zero), load_floats(place), low)
                    high = multiply_add(minus(load_bytes(packed + CHUNK), zero), load_floats(place + 4 * CHUNK), high)
                    packed += 2 * CHUNK
                    place += 8 * CHUNK
                if single_left:
                    low = multiply_add(minus(load_bytes(packed), zero), load_floats(place), low)
                    packed += CHUNK
                    place += 4 * CHUNK
                even = multiply_add(low, scale, even)
                odd = multiply_add(high, scale, odd)
            finish(sum_of(even, odd), y, rows, bias, vector, row)


def dense_rows(at, start, stop):
    """A weight of float32 as it is, for layers that nobody compressed: its address."""
    x, count, columns, y, rows, bias = common(at)
    weight = word(at, OWN)
    for row in range(start, stop):
        ask_for(weight + 4 * columns * row, 4 * columns)
        for vector in range(count):
            place = x + 4 * columns * vector
            stored = weight + 4 * columns * row
            even = all_equal(0.0)
            odd = all_equal(0.0)
            for _ in range(columns // PAIR):
                even = multiply_add(load_floats(stored), load_floats(place), even)
                odd = multiply_add(load_floats(stored + 4 * CHUNK), load_floats(place + 4 * CHUNK), odd)
                stored += 8 * CHUNK
                place += 8 * CHUNK
            total = sum_of(even, odd)
            for _ in range(columns % PAIR):
                total += load_float(stored) * load_float(place)
                stored += 4
                place += 4
            finish(total, y, rows, bias, vector, row)
