"""Vectors of sixteen numbers as values of compiled code: what a decoding loop needs and numba has no words for.

Sixteen lanes are one AVX-512 register. Memory is addressed by integers (`Tensor.data_ptr`), so that a call from Python
carries nothing but numbers. Code j of a row of `bits`-bit codes is where `whit.formats.bits` puts it; a chunk is
sixteen codes, 2 * bits bytes. Only `look_up` names an instruction, the permutation of a register by another (AVX-512F);
the rest is LLVM's language for vectors.
"""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic, models, register_model

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


def _load(builder, address, kind):
    pointer = builder.inttoptr(address, kind.as_pointer())
    return builder.load(pointer, align=1)


def _shuffle(builder, vector, places):
    mask = ir.Constant(ir.VectorType(I32, len(places)), list(places))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def _splat(builder, value, kind):
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(
        first, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    )


def _call(builder, name, kind, arguments):
    function = builder.module.declare_intrinsic(name, (), ir.FunctionType(kind, [item.type for item in arguments]))
    return builder.call(function, arguments)


def _numbers(values, kind):
    return ir.Constant(kind, list(values))


@intrinsic
def load_floats(context, address):
    """Sixteen float32 from an address."""

    def build(context, builder, signature, arguments):
        return _load(builder, arguments[0], FLOATS)

    return floats(types.int64), build


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
        return builder.fpext(_load(builder, arguments[0], F16), F32)

    return types.float32(types.int64), build


@intrinsic
def load_byte(context, address):
    """One byte from an address."""

    def build(context, builder, signature, arguments):
        return builder.zext(_load(builder, arguments[0], I8), I64)

    return types.int64(types.int64), build


@intrinsic
def load_bytes(context, address):
    """Sixteen bytes from an address, as float32."""

    def build(context, builder, signature, arguments):
        wide = builder.zext(_load(builder, arguments[0], ir.VectorType(I8, LANES)), INTEGERS)
        return builder.sitofp(wide, FLOATS)

    return floats(types.int64), build


@intrinsic
def all_equal(context, value):
    """Sixteen times one float32."""

    def build(context, builder, signature, arguments):
        return _splat(builder, arguments[0], FLOATS)

    return floats(types.float32), build


def counter(bits):
    """A function that gives the values of 2**bits codes, repeated to sixteen."""

    @intrinsic
    def counting(context):
        def build(context, builder, signature, arguments):
            return _numbers([float(lane % 2**bits) for lane in range(LANES)], FLOATS)

        return floats(), build

    return counting


@intrinsic
def minus(context, left, right):
    """left - right."""

    def build(context, builder, signature, arguments):
        return builder.fsub(*arguments)

    return floats(floats, floats), build


@intrinsic
def times(context, left, right):
    """left * right."""

    def build(context, builder, signature, arguments):
        return builder.fmul(*arguments)

    return floats(floats, floats), build


@intrinsic
def multiply_add(context, left, right, total):
    """left * right + total, rounded once."""

    def build(context, builder, signature, arguments):
        return _call(builder, "llvm.fma.v16f32", FLOATS, arguments)

    return floats(floats, floats, floats), build


@intrinsic
def sum_of(context, left, right):
    """The sum of all lanes of two vectors."""

    def build(context, builder, signature, arguments):
        total = builder.fadd(*arguments)
        for width in (8, 4, 2, 1):
            halves = (_shuffle(builder, total, range(start, start + width)) for start in (0, width))
            total = builder.fadd(*halves)
        return builder.extract_element(total, ir.Constant(I32, 0))

    return types.float32(floats, floats), build


@intrinsic
def look_up(context, table, index):
    """table[index % 16] for each lane."""

    def build(context, builder, signature, arguments):
        return _call(builder, "llvm.x86.avx512.permvar.sf.512", FLOATS, arguments)

    return floats(floats, integers), build


def table_loader(bits):
    """A function that loads 2**bits float16 levels from an address, repeated to sixteen float32."""

    @intrinsic
    def load_table(context, address):
        def build(context, builder, signature, arguments):
            count = 2**bits
            wide = builder.fpext(_load(builder, arguments[0], ir.VectorType(F16, count)), ir.VectorType(F32, count))
            return _shuffle(builder, wide, [lane % count for lane in range(LANES)])

        return floats(types.int64), build

    return load_table


def code_loader(bits, first):
    """A function that loads the chunk of codes `first` chunks after an address; above the code, lanes hold other bits.

    With `first` = 1 and one bit per code, four bytes are read at the address: both chunks must be there.
    """

    @intrinsic
    def load_codes(context, address):
        def build(context, builder, signature, arguments):
            def word(offset, kind=I32):
                place = builder.add(arguments[0], ir.Constant(I64, offset))
                value = _load(builder, place, kind)
                return _splat(builder, value if kind is I32 else builder.zext(value, I32), INTEGERS)

            start = 2 * bits * first
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
            return builder.lshr(spread, _numbers(shifts, INTEGERS))

        return integers(types.int64), build

    return load_codes


def plane_loader(second):
    """A function that joins a chunk of two bit planes and sixteen marks: first + 2 * middle + marks.

    With `second`, the chunk after the one addressed; otherwise two bytes of each plane are read. Marks are int32.
    """

    @intrinsic
    def load_planes(context, first, middle, marks):
        def build(context, builder, signature, arguments):
            def lanes(address, position):
                kind = I32 if second else I16
                value = _load(builder, address, kind)
                word = _splat(builder, value if second else builder.zext(value, I32), INTEGERS)
                turns = _numbers([(position - lane - 16 * second) % 32 for lane in range(LANES)], INTEGERS)
                turned = _call(builder, "llvm.fshl.v16i32", INTEGERS, [word, word, turns])
                return builder.and_(turned, _numbers([1 << position] * LANES, INTEGERS))

            marked = builder.or_(_load(builder, arguments[2], INTEGERS), lanes(arguments[0], 0))
            return builder.or_(marked, lanes(arguments[1], 1))

        return integers(types.int64, types.int64, types.int64), build

    return load_planes


@intrinsic
def store_marks(context, plane, marks):
    """Sixteen bits from an address to sixteen int32 at another: 4 or 0."""

    def build(context, builder, signature, arguments):
        bits = builder.bitcast(_load(builder, arguments[0], I16), ir.VectorType(ir.IntType(1), LANES))
        four = builder.select(bits, _numbers([4] * LANES, INTEGERS), _numbers([0] * LANES, INTEGERS))
        store = builder.store(four, builder.inttoptr(arguments[1], INTEGERS.as_pointer()))
        store.align = 4
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def prefetch(context, address):
    """Ask for the cache line of an address, which need not be valid."""

    def build(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
        builder.call(function, [pointer, *(ir.Constant(I32, value) for value in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(types.int64), build


def level_loader(means):
    """A function that loads the scalars of `whit.formats.binary_residual` and returns its eight levels, twice."""

    @intrinsic
    def load_levels(context, address):
        def build(context, builder, signature, arguments):
            count = 7 if means else 4
            scalars = builder.fpext(_load(builder, arguments[0], ir.VectorType(F16, count)), ir.VectorType(F32, count))
            scales = [1, 1, 3, 3, 5, 5, 5, 5] if means else [0, 0, 1, 1, 2, 2, 2, 2]
            first = _shuffle(builder, scalars, scales * 2)
            last = _shuffle(builder, scalars, [count - 1] * LANES)
            signs = _numbers([-1.0, 1.0] * 8, FLOATS)
            last_signs = _numbers([0.0, 0.0, 0.0, 0.0, -1.0, -1.0, 1.0, 1.0] * 2, FLOATS)
            level = builder.fmul(first, signs)
            if means:
                level = builder.fadd(_shuffle(builder, scalars, [0, 0, 2, 2, 4, 4, 4, 4] * 2), level)
            return builder.fadd(level, builder.fmul(last, last_signs))

        return floats(types.int64), build

    return load_levels
