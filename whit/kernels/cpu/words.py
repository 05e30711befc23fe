"""What compiled code needs to run steps that are listed in memory: their arguments, their addresses, and turns.

Arguments are words of 64 bits, integers or float64, one after the other. Several threads agree on who does what by
numbers in memory that are read and added to as a whole (atomic, acquiring and releasing).
"""

# mypy: ignore-errors
from __future__ import annotations

import sys

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

I32, I64, F64 = ir.IntType(32), ir.IntType(64), ir.DoubleType()
WORD = 8


def _pointer(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def word(context, address, index):
    """The integer `index` words after an address."""

    def build(context, builder, signature, arguments):
        place = builder.add(arguments[0], builder.mul(arguments[1], ir.Constant(I64, WORD)))
        return builder.load(_pointer(builder, place, I64), align=WORD)

    return types.int64(types.int64, types.int64), build


@intrinsic
def real(context, address, index):
    """The float64 `index` words after an address, as float32."""

    def build(context, builder, signature, arguments):
        place = builder.add(arguments[0], builder.mul(arguments[1], ir.Constant(I64, WORD)))
        return builder.fptrunc(builder.load(_pointer(builder, place, F64), align=WORD), ir.FloatType())

    return types.float32(types.int64, types.int64), build


@intrinsic
def call(context, function, arguments, start, stop):
    """Call the step at an address."""

    def build(context, builder, signature, values):
        kind = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
        builder.call(_pointer(builder, values[0], kind), values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), build


@intrinsic
def read(context, address):
    """A number that other threads change."""

    def build(context, builder, signature, arguments):
        return builder.load_atomic(_pointer(builder, arguments[0], I64), "acquire", WORD)

    return types.int64(types.int64), build


@intrinsic
def write(context, address, value):
    """Set a number that other threads read."""

    def build(context, builder, signature, arguments):
        builder.store_atomic(arguments[1], _pointer(builder, arguments[0], I64), "release", WORD)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def take_next(context, address):
    """Add one to a number that other threads change too; its value before."""

    def build(context, builder, signature, arguments):
        place = _pointer(builder, arguments[0], I64)
        return builder.atomic_rmw("add", place, ir.Constant(I64, 1), "acq_rel")

    return types.int64(types.int64), build


@intrinsic
def let_others_run(context):
    """Give the processor to another thread that wants it, where the system has a call for that."""

    def build(context, builder, signature, arguments):
        if sys.platform in ("linux", "darwin"):
            kind = ir.FunctionType(I32, [])
            name = "sched_yield"
            function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def pause(context):
    """Wait for a moment, sparing the thread that shares the core."""

    def build(context, builder, signature, arguments):
        if "x86_64" in builder.module.triple or "i686" in builder.module.triple:
            kind = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), build
