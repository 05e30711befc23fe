"""Packed weights times a few vectors on a CPU, one row at a time, decoded in registers.

A row of a group of columns is a table of at most sixteen levels in one register and sixteen codes at a time in another:
a permutation gives sixteen weights, a fused multiply and add their products. Nothing is written but the sums. Groups
and rows are whole chunks of sixteen columns, so nothing is read beyond the tensors.

Every function adds rows `first` to `last` of y = W x for `count` vectors: x float32 (count, columns), y float32
(count, rows), each contiguous; arguments that are tensors are addresses. Layouts are those of `whit.formats`.
"""

# mypy: ignore-errors
from __future__ import annotations

from numba import njit

from whit.kernels.cpu.compiling import compiled
from whit.kernels.cpu.vectors import (
    all_equal,
    code_loader,
    counter,
    level_loader,
    load_byte,
    load_bytes,
    load_floats,
    load_half,
    look_up,
    minus,
    multiply_add,
    plane_loader,
    store_float,
    sum_of,
    table_loader,
    times,
)

CHUNK = 16
INLINE = {"forceinline": True, "error_model": "numpy"}


def _group_loop(bits):
    """A loop over `chunks` chunks of one group of columns."""
    single, low, high = code_loader(bits, 0), code_loader(bits, 0), code_loader(bits, 1)
    size = 2 * bits

    @njit(**INLINE)
    def group(x, codes, chunks, table, even, odd):
        for _ in range(chunks // 2):
            even = multiply_add(look_up(table, low(codes)), load_floats(x), even)
            odd = multiply_add(look_up(table, high(codes)), load_floats(x + 4 * CHUNK), odd)
            codes += 2 * size
            x += 8 * CHUNK
        if chunks % 2:
            even = multiply_add(look_up(table, single(codes)), load_floats(x), even)
        return even, odd

    return group


group_1, group_2, group_3, group_4 = (_group_loop(bits) for bits in (1, 2, 3, 4))
table_1, table_2, table_3, table_4 = (table_loader(bits) for bits in (1, 2, 3, 4))
counting_1, counting_2, counting_3, counting_4 = (counter(bits) for bits in (1, 2, 3, 4))


@njit(**INLINE)
def _group(bits, x, codes, chunks, table, even, odd):
    if bits == 1:
        return group_1(x, codes, chunks, table, even, odd)
    if bits == 2:
        return group_2(x, codes, chunks, table, even, odd)
    if bits == 3:
        return group_3(x, codes, chunks, table, even, odd)
    return group_4(x, codes, chunks, table, even, odd)


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
def _code(address, bits, index):
    place = index * bits
    value = load_byte(address + place // 8) >> (place % 8)
    if place % 8 + bits > 8:
        value |= load_byte(address + place // 8 + 1) << (8 - place % 8)
    return value & ((1 << bits) - 1)


@compiled
def level_rows(x, count, columns, codes, levels, bits, size, y, rows, first, last):
    """`LevelTable`: `levels` of groups of `size` columns."""
    groups = -(-columns // size)
    row_bytes = columns // 8 * bits
    for row in range(first, last):
        for vector in range(count):
            even = all_equal(0.0)
            odd = all_equal(0.0)
            inputs = x + 4 * columns * vector
            packed = codes + row_bytes * row
            for group in range(groups):
                start = group * size
                chunks = min(size, columns - start) // CHUNK
                table = _table(bits, levels + ((row * groups + group) << bits) * 2)
                even, odd = _group(bits, inputs + 4 * start, packed + start // 8 * bits, chunks, table, even, odd)
            store_float(y + 4 * (rows * vector + row), sum_of(even, odd))


@compiled
def integer_rows(x, count, columns, codes, scales, zeros, bits, size, y, rows, first, last):
    """`GroupedInteger` of at most 4 bits; `zeros` is 0 if symmetric."""
    groups = -(-columns // size)
    row_bytes = columns // 8 * bits
    for row in range(first, last):
        for vector in range(count):
            even = all_equal(0.0)
            odd = all_equal(0.0)
            inputs = x + 4 * columns * vector
            packed = codes + row_bytes * row
            for group in range(groups):
                start = group * size
                chunks = min(size, columns - start) // CHUNK
                number = row * groups + group
                scale = load_half(scales + 2 * number)
                zero = 0.5
                if zeros:
                    zero = float(_code(zeros, bits, number))
                elif bits > 1:
                    zero = float(1 << (bits - 1))
                else:
                    scale *= 2
                table = times(minus(_counting(bits), all_equal(zero)), all_equal(scale))
                even, odd = _group(bits, inputs + 4 * start, packed + start // 8 * bits, chunks, table, even, odd)
            store_float(y + 4 * (rows * vector + row), sum_of(even, odd))


@compiled
def byte_rows(x, count, columns, codes, scales, zeros, size, y, rows, first, last):
    """`GroupedInteger` of 8 bits; `zeros` is 0 if symmetric."""
    groups = -(-columns // size)
    for row in range(first, last):
        for vector in range(count):
            even = all_equal(0.0)
            odd = all_equal(0.0)
            for group in range(groups):
                number = row * groups + group
                zero = all_equal(128.0)
                if zeros:
                    zero = all_equal(float(load_byte(zeros + number)))
                scale = all_equal(load_half(scales + 2 * number))
                start = group * size
                chunks = min(size, columns - start) // CHUNK
                place = x + 4 * (columns * vector + start)
                packed = codes + columns * row + start
                low = all_equal(0.0)
                high = all_equal(0.0)
                for _ in range(chunks // 2):
                    low = multiply_add(minus(load_bytes(packed), zero), load_floats(place), low)
                    high = multiply_add(minus(load_bytes(packed + CHUNK), zero), load_floats(place + 4 * CHUNK), high)
                    packed += 2 * CHUNK
                    place += 8 * CHUNK
                if chunks % 2:
                    low = multiply_add(minus(load_bytes(packed), zero), load_floats(place), low)
                even = multiply_add(low, scale, even)
                odd = multiply_add(high, scale, odd)
            store_float(y + 4 * (rows * vector + row), sum_of(even, odd))


planes_single, planes_low, planes_high = plane_loader(0), plane_loader(0), plane_loader(1)
levels_plain, levels_means = level_loader(False), level_loader(True)


@compiled
def plane_rows(x, count, columns, signs, second, salient, scalars, means, size, y, rows, first, last):
    """`BinaryResidual`, with or without `means`."""
    groups = -(-columns // size)
    row_bytes = columns // 8
    scalar_bytes = 14 if means else 8
    for row in range(first, last):
        for vector in range(count):
            even = all_equal(0.0)
            odd = all_equal(0.0)
            for group in range(groups):
                start = group * size
                chunks = min(size, columns - start) // CHUNK
                address = scalars + scalar_bytes * (row * groups + group)
                table = levels_means(address) if means else levels_plain(address)
                place = x + 4 * (columns * vector + start)
                one = signs + row_bytes * row + start // 8
                two = second + row_bytes * row + start // 8
                mark = salient + start // 8
                for _ in range(chunks // 2):
                    low = look_up(table, planes_low(one, two, mark))
                    even = multiply_add(low, load_floats(place), even)
                    high = look_up(table, planes_high(one, two, mark))
                    odd = multiply_add(high, load_floats(place + 4 * CHUNK), odd)
                    one += 4
                    two += 4
                    mark += 4
                    place += 8 * CHUNK
                if chunks % 2:
                    weights = look_up(table, planes_single(one, two, mark))
                    even = multiply_add(weights, load_floats(place), even)
            store_float(y + 4 * (rows * vector + row), sum_of(even, odd))
