"""Products with weights of two bit planes and column marks (`whit.formats.binary_residual`), for few vectors.

Sixty-four columns are taken at a time. Three bits of each, as a byte, are the place of its weight among the eight
levels of its row and block: the marks, the same for all rows, are laid out as bytes once, and the planes are added
under a mask, sixty-four columns in one operation each. The bytes of sixteen 32-bit lanes are then four registers of
places, moved down by 0, 8, 16 and 24 bits (only the four low bits of a place count), which asks for the inputs in
another order: column 4 i + b of the sixty-four in lane i of register b. Blocks are filled up with inputs of zero.
"""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.core.extending import intrinsic

from whit.kernels.cpu.codes import level_loader
from whit.kernels.cpu.decode import INLINE, OWN, ask_for, common, finish
from whit.kernels.cpu.vectors import (
    F32,
    FLOATS,
    I8,
    I64,
    INTEGERS,
    LANES,
    all_equal,
    integers,
    load,
    load_byte,
    load_float,
    load_floats,
    look_up,
    multiply_add,
    numbers,
    plus,
    shuffle,
    store_float,
    sum_of,
)
from whit.kernels.cpu.words import word

WIDTH = 64
BYTES = ir.VectorType(I8, WIDTH)
BITS = ir.VectorType(ir.IntType(1), WIDTH)


@intrinsic
def load_word(context, address):
    """Sixty-four bits at an address."""

    def build(context, builder, signature, arguments):
        return load(builder, arguments[0], I64)

    return types.int64(types.int64), build


@intrinsic
def places(context, first, second, marks):
    """mark + 2 * first + 4 * second for sixty-four columns: bits of two words, and bytes at an address."""

    def build(context, builder, signature, arguments):
        total = load(builder, arguments[2], BYTES)
        for bits, step in zip(arguments[:2], (2, 4), strict=True):
            more = builder.add(total, numbers([step] * WIDTH, BYTES))
            total = builder.select(builder.bitcast(bits, BITS), more, total)
        return builder.bitcast(total, INTEGERS)

    return integers(types.int64, types.int64, types.int64), build


def _moved(bits):
    @intrinsic
    def move(context, value):
        def build(context, builder, signature, arguments):
            return builder.lshr(arguments[0], numbers([bits] * LANES, INTEGERS))

        return integers(integers), build

    return move


down_8, down_16, down_24 = (_moved(bits) for bits in (8, 16, 24))
levels_plain, levels_means = level_loader(False), level_loader(True)


@intrinsic
def store_byte(context, address, value):
    """The lowest byte of an integer to an address."""

    def build(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], I8.as_pointer())
        builder.store(builder.trunc(arguments[1], I8), place, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@njit(**INLINE)
def _chunks(columns, size):
    """Chunks of all blocks."""
    whole = columns // size
    return whole * (-(-size // WIDTH)) + -(-(columns - whole * size) // WIDTH)


def spread_marks(at, start, stop):
    """A byte for each column, 1 if marked, blocks filled up with 0: marks (a bit each), columns, block, where to."""
    salient, columns, size, out = word(at, 0), word(at, 1), word(at, 2), word(at, 3)
    for block in range(-(-columns // size)):
        width = min(size, columns - block * size)
        for index in range(-(-width // WIDTH) * WIDTH):
            column = block * size + index
            mark = (load_byte(salient + (column >> 3)) >> (column & 7)) & 1 if index < width else 0
            store_byte(out, mark)
            out += 1


@intrinsic
def _order(context, values, out):
    """Sixty-four float32 from one address to another, in the order above."""

    def build(context, builder, signature, arguments):
        whole = load(builder, arguments[0], ir.VectorType(F32, WIDTH))
        for part in range(4):
            place = builder.add(arguments[1], ir.Constant(I64, WIDTH * part))
            register = shuffle(builder, whole, range(part, WIDTH, 4))
            builder.store(register, builder.inttoptr(place, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


def order_inputs(at, start, stop):
    """Inputs in the order above, blocks filled up with 0: x, count, columns, block, marks (not read), where to."""
    x, count, columns, size, out = word(at, 0), word(at, 1), word(at, 2), word(at, 3), word(at, 5)
    for vector in range(count):
        for block in range(-(-columns // size)):
            width = min(size, columns - block * size)
            place = x + 4 * (columns * vector + block * size)
            for _ in range(width // WIDTH):
                _order(place, out)
                place += 4 * WIDTH
                out += 4 * WIDTH
            if width % WIDTH:
                for j in range(WIDTH):
                    value = load_float(place + 4 * j) if j < width % WIDTH else 0.0
                    store_float(out + 4 * ((j & 3) * LANES + (j >> 2)), value)
                out += 4 * WIDTH


@njit(**INLINE)
def _rest_of_word(address, bytes_):
    value = 0
    for byte in range(bytes_):
        value |= load_byte(address + byte) << (8 * byte)
    return value


@njit(**INLINE)
def _chunk(first, second, mark, place, table, total):
    one, two, three, four = total
    index = places(first, second, mark)
    one = multiply_add(look_up(table, index), load_floats(place), one)
    two = multiply_add(look_up(table, down_8(index)), load_floats(place + 64), two)
    three = multiply_add(look_up(table, down_16(index)), load_floats(place + 128), three)
    four = multiply_add(look_up(table, down_24(index)), load_floats(place + 192), four)
    return one, two, three, four


def plane_rows(at, start, stop):
    """`BinaryResidual`: signs, second, scalars, marks of `spread_marks`, with means, columns of a block.

    x is what `order_inputs` wrote.
    """
    x, count, columns, y, rows, bias = common(at)
    signs, second, scalars, marks = word(at, OWN), word(at, OWN + 1), word(at, OWN + 2), word(at, OWN + 3)
    means, size = word(at, OWN + 4), word(at, OWN + 5)
    groups = -(-columns // size)
    last = columns - (groups - 1) * size
    chunks = _chunks(columns, size)
    row_bytes = (columns + 7) // 8
    scalar_bytes = 14 if means else 8
    zero = all_equal(0.0)
    for row in range(start, stop):
        ask_for(signs + row_bytes * row, row_bytes)
        ask_for(second + row_bytes * row, row_bytes)
        for vector in range(count):
            total = (zero, zero, zero, zero)
            place = x + 4 * WIDTH * chunks * vector
            mark = marks
            for group in range(groups):
                width = last if group == groups - 1 else size
                one = signs + row_bytes * row + group * (size // 8)
                two = second + row_bytes * row + group * (size // 8)
                address = scalars + scalar_bytes * (row * groups + group)
                table = levels_means(address) if means else levels_plain(address)
                for _ in range(width // WIDTH):
                    total = _chunk(load_word(one), load_word(two), mark, place, table, total)
                    one += 8
                    two += 8
                    mark += WIDTH
                    place += 4 * WIDTH
                if width % WIDTH:
                    bytes_ = (width % WIDTH + 7) // 8
                    first, other = _rest_of_word(one, bytes_), _rest_of_word(two, bytes_)
                    total = _chunk(first, other, mark, place, table, total)
                    mark += WIDTH
                    place += 4 * WIDTH
            finish(sum_of(plus(total[0], total[1]), plus(total[2], total[3])), y, rows, bias, vector, row)
