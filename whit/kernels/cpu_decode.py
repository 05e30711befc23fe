"""Packed layers for a few input vectors on a CPU: what decoding text one token after the other needs.

The plain meaning unpacks the whole weight for every token; here rows are decoded in registers
(`whit.kernels.cpu.decode`), so a token reads each packed byte once and nothing else of the weight. Needs numba; without
it, for many vectors, where gradients are wanted and for layouts whose groups are no multiples of sixteen columns, the
plain meaning stays.

Products and sums are float32 whatever the dtype of the inputs. Bound on the difference from the plain meaning, relative
to sum_j |x_j w_j| of each output: (n + 2) 2^-24 for n columns, since the order of the sum differs, and in bfloat16 and
float16, whose plain meaning rounds the weight first, 2^-8 and 2^-11 more. The output's own rounding comes on top.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from whit.formats.base import Format, Packed
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.formats.vector_codebook import VectorCodebook
from whit.kernels.cpu.compiling import numba_works, shared_out
from whit.kernels.cpu.program import Step, call
from whit.kernels.linear import Implementation, register_implementation

NAME = "registers (numba)"
CHUNK = 16
MOST_VECTORS = 16
PLANE_CHUNK = 64
LINE = 64
NO_STEP: tuple[str, tuple[int, ...], int] = ("", (), 0)
TABLE_BITS = 4
BYTE_BITS = 8
NOTHING = ""
WEIGHTS_TO_SHARE = 2**22  # a smaller layer is done before a second thread has woken up
ROWS_PER_PART = 16
WEIGHTS_IN_PART = 2**16  # some ten microseconds: a hundred times what it takes to agree on who does it
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Prepared = dict[tuple[str, tuple[int, ...]], Tensor]


@lru_cache(maxsize=1)
def _compiler_works() -> bool:
    if numba_works():
        return True
    warnings.warn(
        "numba is missing or unusable, so packed layers decode slowly on this CPU (remedy: pip install 'whit[cpu]')",
        stacklevel=2,
    )
    return False


@dataclass(frozen=True)
class _Preparation:
    """What is worked out before the rows, into memory that they read instead of a tensor and of the inputs.

    Attributes:
        fixed: the step for what depends on the weight alone, its arguments between tensor and output, and bytes; or
            None.
        inputs: the step for what depends on the inputs, its arguments before the fixed part, and bytes per vector.
        shared: whether the second is the same for all weights with these arguments.
    """

    fixed: tuple[str, tuple[int, ...], int] | None
    inputs: tuple[str, tuple[int, ...], int]
    shared: bool


@dataclass(frozen=True)
class _Plan:
    """How a layout is computed.

    Attributes:
        function: the step. tensors: names of what it reads, in order. arguments: its last ones.
        preparation: of the last of the tensors, if that has a fixed part, and of the inputs.
    """

    function: str
    tensors: tuple[str, ...]
    arguments: tuple[int, ...]
    preparation: _Preparation | None = None


@lru_cache(maxsize=1024)
def _plan(layout: Format, columns: int) -> _Plan | None:
    """The plan of a layout, None if its groups of columns are no whole chunks or its codes are not covered."""
    size = layout.group_size if isinstance(layout, GroupedInteger) else getattr(layout, "block_size", 1)
    size = size or columns
    if not columns:
        return None
    if isinstance(layout, BinaryResidual):
        return None if size % BYTE_BITS and size < columns else _plane_plan(layout, columns, size)
    if isinstance(layout, VectorCodebook):
        return _codebook_plan(layout, columns)
    if columns % CHUNK or size % CHUNK:
        return None
    if isinstance(layout, LevelTable) and layout.bits <= TABLE_BITS:
        return _Plan("decode.level_rows", ("codes", "levels"), (layout.bits, size), _interleaved(layout.bits, columns))
    if isinstance(layout, GroupedInteger):
        stored = ("codes", "scales", NOTHING if layout.symmetric else "zeros")
        if layout.bits == BYTE_BITS:
            return _Plan("decode.byte_rows", stored, (size,))
        if layout.bits <= TABLE_BITS:
            return _Plan("decode.integer_rows", stored, (layout.bits, size), _interleaved(layout.bits, columns))
    return None


def _interleaved(bits: int, columns: int) -> _Preparation | None:
    """Codes of four bits meet their inputs in another order."""
    return _Preparation(None, ("decode.interleave_inputs", (), 4 * columns), True) if bits == TABLE_BITS else None


def _plane_plan(layout: BinaryResidual, columns: int, size: int) -> _Plan:
    whole, rest = divmod(columns, size)
    room = PLANE_CHUNK * (whole * -(-size // PLANE_CHUNK) + -(-rest // PLANE_CHUNK))
    marks = ("plane_products.spread_marks", (columns, size), room)
    order = ("plane_products.order_inputs", (size,), 4 * room)
    stored = ("signs", "second", "scalars", "salient")
    return _Plan("plane_products.plane_rows", stored, (int(layout.means), size), _Preparation(marks, order, True))


def _codebook_plan(layout: VectorCodebook, columns: int) -> _Plan:
    codes, width = layout.codes, layout.width
    words = 4 * width * -(-codes // 2 // CHUNK) * CHUNK
    spread = ("codebook_products.spread_codewords", (codes, width, int(layout.ternary)), words)
    tables = ("codebook_products.tables", (codes, width), 4 * (layout.groups(columns) * codes + 2 * CHUNK))
    stored = ("codes", "scales", "codebook")
    own = (codes, width, layout.code_bits)
    return _Plan("codebook_products.codebook_rows", stored, own, _Preparation(spread, tables, False))


@dataclass(frozen=True)
class Steps:
    """A packed product as steps of a program: what comes before, if anything, and the product itself."""

    before: Step | None
    product: Step


def steps_of(
    packed: Packed, x: Tensor, y: Tensor, bias: Tensor | None, ordered: Prepared | None = None
) -> Steps | None:
    """y = x W^T + b over fixed tensors, None if the layout is not covered; the steps keep alive what they need.

    Args:
        x: float32 (n, columns). y: float32 (n, rows), written. bias: float32 (rows,). All contiguous.
        ordered: where products of one x find and leave what was made of it.
    """
    plan = _plan(packed.format, packed.columns)
    if plan is None or not _compiler_works():
        return None
    stored = [None if name is NOTHING else packed.tensors[name].contiguous() for name in plan.tensors]
    rows, columns, count = packed.rows, packed.columns, x.numel() // packed.columns
    before, inputs = None, x
    if plan.preparation is not None:
        function, more, room = plan.preparation.inputs
        spread = None
        if plan.preparation.fixed is not None:
            fixed, own, size = plan.preparation.fixed
            spread = torch.empty(size, dtype=torch.uint8)
            call(fixed, (packed.tensors[plan.tensors[-1]].contiguous().data_ptr(), *own, spread.data_ptr()), 0, 1)
            stored[-1] = spread
        known = None if ordered is None else ordered.get((function, more))
        inputs = torch.empty(count * room, dtype=torch.uint8) if known is None else known
        if known is None:
            before = Step(function, (x, count, columns, *more, spread, inputs))
        if ordered is not None and plan.preparation.shared:
            ordered[function, more] = inputs
    arguments = (inputs, count, columns, y, rows, bias, *stored, *plan.arguments)
    return Steps(before, Step(plan.function, arguments, rows, _rows_in_part(columns)))


def dense_steps(weight: Tensor, x: Tensor, y: Tensor, bias: Tensor | None) -> Steps | None:
    """The same for a weight of float32 (rows, columns), None if it is not contiguous."""
    if not weight.is_contiguous() or not _compiler_works():
        return None
    rows, columns = weight.shape
    arguments = (x, x.numel() // columns, columns, y, rows, bias, weight)
    return Steps(None, Step("decode.dense_rows", arguments, rows, _rows_in_part(columns)))


def _rows_in_part(columns: int) -> int:
    return max(1, WEIGHTS_IN_PART // columns)


def supports(x: Tensor, packed: Packed) -> bool:
    """Few vectors on a CPU with numba, a layout in whole chunks of columns, and no gradient wanted."""
    if x.device.type != "cpu" or x.dtype not in DTYPES or x.numel() > MOST_VECTORS * packed.columns:
        return False
    if x.shape[-1:] != (packed.columns,):  # the plain meaning refuses them, a compiled loop would read on
        return False
    if (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return False
    return _plan(packed.format, packed.columns) is not None and _compiler_works()


def decoded_linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """y = x W^T + b for few vectors x (..., columns), in their dtype."""
    rows, columns = packed.rows, packed.columns
    # A vector of float32, the usual case, is taken as it is: each call of torch costs as much as 10,000 weights.
    inputs = (x if x.dtype == torch.float32 else x.float()).contiguous()
    count = inputs.numel() // columns
    out = torch.empty(*x.shape[:-1], rows)
    plan = _plan(packed.format, columns)
    assert plan is not None
    if count and rows:
        stored = [None if name is NOTHING else packed.tensors[name].contiguous() for name in plan.tensors]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in stored]
        place = inputs.data_ptr()
        if plan.preparation is not None:
            (fixed, own, size), (function, more, room) = plan.preparation.fixed or NO_STEP, plan.preparation.inputs
            workspace = torch.empty(-(-size // LINE) * LINE + count * room, dtype=torch.uint8)
            spread = workspace.data_ptr()
            made = spread + -(-size // LINE) * LINE
            if fixed:
                call(fixed, (addresses[-1], *own, spread), 0, 1)
                addresses[-1] = spread
            call(function, (place, count, columns, *more, spread, made), 0, 1)
            place = made
        words = (place, count, columns, out.data_ptr(), rows, 0, *addresses, *plan.arguments)
        if count * rows * columns < WEIGHTS_TO_SHARE or torch.get_num_threads() == 1:
            call(plan.function, words, 0, rows)
        else:
            shared_out(lambda first, last: call(plan.function, words, first, last), rows, ROWS_PER_PART)
    if bias is not None:
        out += bias.detach()
    return out if x.dtype == torch.float32 else out.to(x.dtype)


for _format in (GroupedInteger, LevelTable, BinaryResidual, VectorCodebook):
    register_implementation(_format.name, Implementation(NAME, supports, decoded_linear))
