"""Packed codes and levels as vectors of sixteen: what the loops over packed weights load.

Code j of a row of `bits`-bit codes is where `whit.formats.bits` puts it; a chunk is sixteen codes, 2 * bits bytes.
"""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from whit.kernels.cpu.vectors import (
    FLOATS,
    I16,
    I32,
    I64,
    INTEGERS,
    LANES,
    floats,
    integers,
    load,
    load_halves,
    numbers,
    shuffle,
    splat,
)

INTERLEAVED_BITS = 4
INTERLEAVED = [column // 2 + 8 * (column % 2) for column in range(LANES)]
"""Columns of a chunk in the order in which their codes of four bits are loaded."""


def table_loader(bits):
    """A function that loads 2**bits float16 levels from an address, repeated to sixteen float32."""

    @intrinsic
    def load_table(context, address):
        def build(context, builder, signature, arguments):
            count = 2**bits
            wide = load_halves(builder, arguments[0], count)
            return shuffle(builder, wide, [lane % count for lane in range(LANES)])

        return floats(types.int64), build

    return load_table


def code_loader(bits, first):
    """A function that loads the chunk of codes `first` chunks after an address; above the code, lanes hold other bits.

    With `first` = 1 and one bit per code, four bytes are read at the address: both chunks must be there. Codes of four
    bits come in the order of `INTERLEAVED`: the low and the high word of a chunk in turn, so that both are one load.
    """

    @intrinsic
    def load_codes(context, address):
        def build(context, builder, signature, arguments):
            def word(offset, kind=I32):
                place = builder.add(arguments[0], ir.Constant(I64, offset))
                value = load(builder, place, kind)
                return splat(builder, value if kind is I32 else builder.zext(value, I32), INTEGERS)

            start = 2 * bits * first
            if bits == INTERLEAVED_BITS:
                place = builder.add(arguments[0], ir.Constant(I64, start))
                pairs = splat(builder, load(builder, place, I64), ir.VectorType(I64, LANES // 2))
                shifts = numbers([bits * (column % 8) for column in INTERLEAVED], INTEGERS)
                return builder.lshr(builder.bitcast(pairs, INTEGERS), shifts)
            if bits == 1:
                spread = word(0) if first else word(0, I16)
                shifts = [lane + 16 * first for lane in range(LANES)]
            elif bits == 2:
                spread, shifts = word(start), [2 * lane for lane in range(LANES)]
            else:
                # Eight codes lie in the low bits of the first word, eight in the high bits of the last.
                above = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [lane >= 8 for lane in range(LANES)])
                spread = builder.select(above, word(start + 2 * bits - 4), word(start))
                shifts = [bits * (lane % 8) + (lane // 8) * (32 - 8 * bits) for lane in range(LANES)]
            return builder.lshr(spread, numbers(shifts, INTEGERS))

        return integers(types.int64), build

    return load_codes


def level_loader(means):
    """A function that loads the scalars of `whit.formats.binary_residual` and returns its eight levels, twice.

    Their order is that of mark + 2 * first + 4 * second (bits of a weight).
    """

    @intrinsic
    def load_levels(context, address):
        def build(context, builder, signature, arguments):
            count = 7 if means else 4
            scalars = load_halves(builder, arguments[0], count)
            scales = [1, 5, 1, 5, 3, 5, 3, 5] if means else [0, 2, 0, 2, 1, 2, 1, 2]
            first = shuffle(builder, scalars, scales * 2)
            last = shuffle(builder, scalars, [count - 1] * LANES)
            signs = numbers([-1.0, -1.0, 1.0, 1.0] * 4, FLOATS)
            last_signs = numbers([0.0, -1.0, 0.0, -1.0, 0.0, 1.0, 0.0, 1.0] * 2, FLOATS)
            level = builder.fmul(first, signs)
            if means:
                level = builder.fadd(shuffle(builder, scalars, [0, 4, 0, 4, 2, 4, 2, 4] * 2), level)
            return builder.fadd(level, builder.fmul(last, last_signs))

        return floats(types.int64), build

    return load_levels


@intrinsic
def interleave(context, values, out):
    """Sixteen float32 from one address to another, in the order of `INTERLEAVED`."""

    def build(context, builder, signature, arguments):
        register = shuffle(builder, load(builder, arguments[0], FLOATS), INTERLEAVED)
        builder.store(register, builder.inttoptr(arguments[1], FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build
