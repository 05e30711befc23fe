"""Vectors of sixteen numbers as values of compiled code: what a decoding loop needs and numba has no words for.

Sixteen lanes are one AVX-512 register; where registers are narrower LLVM takes several. Memory is addressed by integers
(`Tensor.data_ptr`), so that a call carries nothing but numbers. Only `look_up` names an instruction, the permutation of
a register by another (AVX-512, AVX2), and goes through memory where there is none; the rest is LLVM's language.
"""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import intrinsic, models, register_model

from whit.kernels.cpu.processor import features

LANES = 16
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
FLOATS, INTEGERS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


class Floats(types.Type):
    """Sixteen float32."""

    def __init__(self):
        super().__init__(name="Floats")


class Integers(types.Type):
    """Sixteen int32."""

    def __init__(self):
        super().__init__(name="Integers")


floats, integers = Floats(), Integers()


@register_model(Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, FLOATS)


@register_model(Integers)
class _IntegersModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, INTEGERS)


def load(builder, address, kind, align=1):
    """A value of any kind at an address."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def shuffle(builder, vector, places):
    """vector[places], places known when compiling."""
    mask = ir.Constant(ir.VectorType(I32, len(places)), list(places))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def splat(builder, value, kind):
    """One number in all lanes."""
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return shuffle(builder, first, [0] * kind.count)


def call(builder, name, kind, arguments):
    """One of LLVM's intrinsic functions."""
    function = builder.module.declare_intrinsic(name, (), ir.FunctionType(kind, [item.type for item in arguments]))
    return builder.call(function, arguments)


def numbers(values, kind):
    """A vector known when compiling."""
    return ir.Constant(kind, list(values))


def load_halves(builder, address, count):
    """`count` finite float16 at an address, as a vector of float32."""
    wide, whole = ir.VectorType(F32, count), ir.VectorType(I32, count)
    if features() & {"f16c", "fullfp16", "avx512f"}:
        return builder.fpext(load(builder, address, ir.VectorType(F16, count)), wide)
    # The exponent, 15 in excess and moved to its new place, becomes 127 in excess by a multiplication with 2^112.
    bits = builder.zext(load(builder, address, ir.VectorType(I16, count)), whole)
    sign = builder.shl(builder.and_(bits, numbers([0x8000] * count, whole)), numbers([16] * count, whole))
    rest = builder.shl(builder.and_(bits, numbers([0x7FFF] * count, whole)), numbers([13] * count, whole))
    value = builder.fmul(builder.bitcast(rest, wide), numbers([2.0**112] * count, wide))
    return builder.bitcast(builder.or_(builder.bitcast(value, whole), sign), wide)


@intrinsic
def load_floats(context, address):
    """Sixteen float32 from an address."""

    def build(context, builder, signature, arguments):
        return load(builder, arguments[0], FLOATS)

    return floats(types.int64), build


@intrinsic
def store_floats(context, address, value):
    """Sixteen float32 to an address."""

    def build(context, builder, signature, arguments):
        builder.store(arguments[1], builder.inttoptr(arguments[0], FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, floats), build


@intrinsic
def load_float(context, address):
    """One float32 from an address."""

    def build(context, builder, signature, arguments):
        return load(builder, arguments[0], F32, 4)

    return types.float32(types.int64), build


@intrinsic
def store_float(context, address, value):
    """One float32 to an address."""

    def build(context, builder, signature, arguments):
        builder.store(arguments[1], builder.inttoptr(arguments[0], F32.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), build


@intrinsic
def load_half(context, address):
    """One float16 from an address, as float32."""

    def build(context, builder, signature, arguments):
        return builder.extract_element(load_halves(builder, arguments[0], 1), ir.Constant(I32, 0))

    return types.float32(types.int64), build


@intrinsic
def load_byte(context, address):
    """One byte from an address."""

    def build(context, builder, signature, arguments):
        return builder.zext(load(builder, arguments[0], I8), I64)

    return types.int64(types.int64), build


@intrinsic
def load_bytes(context, address):
    """Sixteen bytes from an address, as float32."""

    def build(context, builder, signature, arguments):
        wide = builder.zext(load(builder, arguments[0], ir.VectorType(I8, LANES)), INTEGERS)
        return builder.sitofp(wide, FLOATS)

    return floats(types.int64), build


@intrinsic
def all_equal(context, value):
    """Sixteen times one float32."""

    def build(context, builder, signature, arguments):
        return splat(builder, arguments[0], FLOATS)

    return floats(types.float32), build


def counter(bits):
    """A function that gives the values of 2**bits codes, repeated to sixteen."""

    @intrinsic
    def counting(context):
        def build(context, builder, signature, arguments):
            return numbers([float(lane % 2**bits) for lane in range(LANES)], FLOATS)

        return floats(), build

    return counting


def _of_two(operation):
    @intrinsic
    def apply(context, left, right):
        def build(context, builder, signature, arguments):
            return getattr(builder, operation)(*arguments)

        return floats(floats, floats), build

    return apply


plus, minus, times, over = (_of_two(operation) for operation in ("fadd", "fsub", "fmul", "fdiv"))


@intrinsic
def multiply_add(context, left, right, total):
    """left * right + total, rounded once where the processor can."""

    def build(context, builder, signature, arguments):
        name = "llvm.fma.v16f32" if features() & {"fma", "avx512f", "neon"} else "llvm.fmuladd.v16f32"
        return call(builder, name, FLOATS, arguments)

    return floats(floats, floats, floats), build


@intrinsic
def sum_of(context, left, right):
    """The sum of all lanes of two vectors."""

    def build(context, builder, signature, arguments):
        total = builder.fadd(*arguments)
        for width in (8, 4, 2, 1):
            halves = (shuffle(builder, total, range(start, start + width)) for start in (0, width))
            total = builder.fadd(*halves)
        return builder.extract_element(total, ir.Constant(I32, 0))

    return types.float32(floats, floats), build


@intrinsic
def look_up(context, table, index):
    """table[index % 16] for each lane."""

    def build(context, builder, signature, arguments):
        table, index = arguments
        if "avx512f" in features():
            return call(builder, "llvm.x86.avx512.permvar.sf.512", FLOATS, [table, index])
        if "avx2" in features():
            return _look_up_halves(builder, table, index)
        place = cgutils.alloca_once(builder, FLOATS)  # once for all rounds of a loop
        builder.store(table, place)
        first = builder.bitcast(place, F32.as_pointer())
        within = builder.and_(index, numbers([LANES - 1] * LANES, INTEGERS))
        out = ir.Constant(FLOATS, ir.Undefined)
        for lane in range(LANES):
            number = ir.Constant(I32, lane)
            item = builder.load(builder.gep(first, [builder.extract_element(within, number)]))
            out = builder.insert_element(out, item, number)
        return out

    return floats(floats, integers), build


def _look_up_halves(builder, table, index):
    """Eight lanes at a time: from both halves of the table, of which bit 3 chooses."""
    eight = ir.VectorType(F32, 8)
    low, high = (shuffle(builder, table, range(start, start + 8)) for start in (0, 8))
    parts = []
    for start in (0, 8):
        lanes = shuffle(builder, index, range(start, start + 8))
        pair = [call(builder, "llvm.x86.avx2.permps", eight, [half, lanes]) for half in (low, high)]
        above = builder.trunc(builder.lshr(lanes, numbers([3] * 8, lanes.type)), ir.VectorType(ir.IntType(1), 8))
        parts.append(builder.select(above, pair[1], pair[0]))
    whole = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))
    return builder.shuffle_vector(parts[0], parts[1], whole)


@intrinsic
def prefetch(context, address):
    """Ask for the cache line of an address, which need not be valid."""

    def build(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
        builder.call(function, [pointer, *(ir.Constant(I32, value) for value in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(types.int64), build


@intrinsic
def exponential(context, value):
    """e to the power of each lane, within two units in the last place; below e^-87 it is that.

    With n = round(x / ln 2), e^x = 2^n e^r where |r| <= ln(2) / 2: r by two parts of ln 2, e^r by its series to r^7.
    """

    def build(context, builder, signature, arguments):
        def all_lanes(number):
            return numbers([number] * LANES, FLOATS)

        def add_product(left, right, total):
            return call(builder, "llvm.fmuladd.v16f32", FLOATS, [left, right, total])

        inside = arguments[0]
        for bound, comparison in ((-87.0, "<"), (88.0, ">")):
            beyond = builder.fcmp_ordered(comparison, inside, all_lanes(bound))
            inside = builder.select(beyond, all_lanes(bound), inside)
        # Adding 1.5 * 2^23 rounds to the nearest whole number.
        moved = builder.fadd(builder.fmul(inside, all_lanes(1.4426950408889634)), all_lanes(12582912.0))
        whole = builder.fsub(moved, all_lanes(12582912.0))
        rest = add_product(whole, all_lanes(-0.693359375), inside)
        rest = add_product(whole, all_lanes(2.12194440e-4), rest)
        total = all_lanes(1 / 5040)
        for divisor in (720, 120, 24, 6, 2, 1, 1):
            total = add_product(total, rest, all_lanes(1 / divisor))
        exponent = builder.add(builder.fptosi(whole, INTEGERS), numbers([127] * LANES, INTEGERS))
        power = builder.bitcast(builder.shl(exponent, numbers([23] * LANES, INTEGERS)), FLOATS)
        return builder.fmul(total, power)

    return floats(floats), build
