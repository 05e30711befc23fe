"""Products with weights that are codewords of a codebook (`whit.formats.vector_codebook`), for few vectors.

The product of a group of columns with a codeword is the same in every row: all of them are worked out once, and a row
looks its own up and adds: one load for `width` weights.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from whit.kernels.cpu.decode import CHUNK, INLINE, OWN, ask_for, common, finish, packed_code
from whit.kernels.cpu.vectors import (
    all_equal,
    load_byte,
    load_float,
    load_floats,
    load_half,
    minus,
    multiply_add,
    store_float,
    store_floats,
)
from whit.kernels.cpu.words import word

ZERO = np.float32(0)
STEPS = 128
TRITS = 5
SPARE = 2 * CHUNK  # numbers behind the tables that whole registers write to


@njit(**INLINE)
def _entry(codebook, number, place, width, ternary):
    if not ternary:
        value = load_byte(codebook + number * width + place)
        return float(value - 256 if value > 127 else value) / STEPS
    value = load_byte(codebook + number * ((width + TRITS - 1) // TRITS) + place // TRITS)
    for _ in range(place % TRITS):
        value //= 3
    return float(value % 3 - 1)


def spread_codewords(at, start, stop):
    """The stored half of the codewords as float32 (width, half, filled up to whole registers).

    codebook, codes, width, ternary, where to.
    """
    codebook, codes, width, ternary, out = word(at, 0), word(at, 1), word(at, 2), word(at, 3), word(at, 4)
    half = codes // 2
    for place in range(width):
        for number in range((half + CHUNK - 1) // CHUNK * CHUNK):
            value = _entry(codebook, number, place, width, ternary) if number < half else 0.0
            store_float(out, value)
            out += 4


def tables(at, start, stop):
    """Products of every group of inputs with every codeword, float32 (count, groups * codes + SPARE).

    x, count, columns, codes, width, what `spread_codewords` wrote, where to.
    """
    x, count, columns, codes = word(at, 0), word(at, 1), word(at, 2), word(at, 3)
    width, words, out = word(at, 4), word(at, 5), word(at, 6)
    half = codes // 2
    line = 4 * ((half + CHUNK - 1) // CHUNK * CHUNK)
    groups = -(-columns // width)
    for vector in range(count):
        table = out + 4 * (groups * codes + SPARE) * vector
        for group in range(groups):
            first = group * width
            size = min(width, columns - first)
            # What a register writes beyond a table is written over: by the negative half, then by the next group.
            for number in range(0, half, CHUNK):
                total = all_equal(0.0)
                for place in range(size):
                    value = all_equal(load_float(x + 4 * (columns * vector + first + place)))
                    total = multiply_add(load_floats(words + line * place + 4 * number), value, total)
                store_floats(table + 4 * number, total)
            for number in range(0, half, CHUNK):
                negative = minus(all_equal(0.0), load_floats(table + 4 * number))
                store_floats(table + 4 * (half + number), negative)
            table += 4 * codes


@njit(**INLINE)
def _look_up_row(table, packed, number, bits, groups):
    first = second = third = fourth = ZERO
    line = 4 * number
    for group in range(0, groups - 3, 4):
        first += load_float(table + 4 * packed_code(packed, bits, group))
        second += load_float(table + line + 4 * packed_code(packed, bits, group + 1))
        third += load_float(table + 2 * line + 4 * packed_code(packed, bits, group + 2))
        fourth += load_float(table + 3 * line + 4 * packed_code(packed, bits, group + 3))
        table += 4 * line
    for group in range(groups // 4 * 4, groups):
        first += load_float(table + 4 * packed_code(packed, bits, group))
        table += line
    return (first + second) + (third + fourth)


def codebook_rows(at, start, stop):
    """`VectorCodebook`: codes, scales, number of codes, width, bits of a code; x is what `tables` wrote."""
    x, count, columns, y, rows, bias = common(at)
    codes, scales, number = word(at, OWN), word(at, OWN + 1), word(at, OWN + 3)
    width, bits = word(at, OWN + 4), word(at, OWN + 5)
    groups = -(-columns // width)
    row_bytes = (groups + 7) // 8 * bits
    for row in range(start, stop):
        packed = codes + row_bytes * row
        ask_for(packed, row_bytes)
        scale = load_half(scales + 2 * row)
        for vector in range(count):
            table = x + 4 * (groups * number + SPARE) * vector
            if bits == 8:
                total = _look_up_row(table, packed, number, 8, groups)
            else:
                total = _look_up_row(table, packed, number, bits, groups)
            finish(total * scale, y, rows, bias, vector, row)
