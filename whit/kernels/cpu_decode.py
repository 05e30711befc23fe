"""Packed layers for a few input vectors on a CPU: what decoding text one token after the other needs.

The plain meaning unpacks the whole weight for every token; here rows are decoded in registers
(`whit.kernels.cpu.decode`), so a token reads each packed byte once and nothing else of the weight. Needs numba and a
processor with AVX-512; elsewhere, for many vectors, where gradients are wanted and for layouts whose groups are no
multiples of sixteen columns, the plain meaning stays.

Products and sums are float32 whatever the dtype of the inputs. Bound on the difference from the plain meaning, relative
to sum_j |x_j w_j| of each output: (n + 2) 2^-24 for n columns, since the order of the sum differs, and in bfloat16 and
float16, whose plain meaning rounds the weight first, 2^-8 and 2^-11 more. The output's own rounding comes on top.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from whit.formats.base import Format, Packed
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.kernels.cpu.compiling import numba_works, shared_out
from whit.kernels.linear import Implementation, register_implementation

NAME = "registers (numba)"
CHUNK = 16
MOST_VECTORS = 16
TABLE_BITS = 4
BYTE_BITS = 8
NOTHING = ""
WEIGHTS_TO_SHARE = 2**22  # a smaller layer is done before a second thread has woken up
ROWS_PER_PART = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(maxsize=1)
def _has_vectors() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


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
class _Plan:
    """How a layout is computed: name of the compiled function, tensors it reads in order, and its own arguments."""

    function: str
    tensors: tuple[str, ...]
    arguments: tuple[int, ...]


@lru_cache(maxsize=1024)
def _plan(layout: Format, columns: int) -> _Plan | None:
    """The plan of a layout, None if its groups of columns are no whole chunks or its codes are not covered."""
    size = layout.group_size if isinstance(layout, GroupedInteger) else getattr(layout, "block_size", 1)
    if columns % CHUNK or size % CHUNK or not columns:
        return None
    size = size or columns
    if isinstance(layout, BinaryResidual):
        return _Plan("plane_rows", ("signs", "second", "scalars", "salient"), (int(layout.means), size))
    if isinstance(layout, LevelTable) and layout.bits <= TABLE_BITS:
        return _Plan("level_rows", ("codes", "levels"), (layout.bits, size))
    if isinstance(layout, GroupedInteger):
        stored = ("codes", "scales", NOTHING if layout.symmetric else "zeros")
        if layout.bits == BYTE_BITS:
            return _Plan("byte_rows", stored, (size,))
        if layout.bits <= TABLE_BITS:
            return _Plan("integer_rows", stored, (layout.bits, size))
    return None


def supports(x: Tensor, packed: Packed) -> bool:
    """Few vectors on a CPU with AVX-512, a layout in whole chunks of columns, and no gradient wanted."""
    if x.device.type != "cpu" or x.dtype not in DTYPES or x.numel() > MOST_VECTORS * packed.columns:
        return False
    if x.shape[-1:] != (packed.columns,):  # the plain meaning refuses them, a compiled loop would read on
        return False
    if (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return False
    return _plan(packed.format, packed.columns) is not None and _has_vectors() and _compiler_works()


def decoded_linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """y = x W^T + b for few vectors x (..., columns), in their dtype."""
    rows, columns = packed.rows, packed.columns
    plan = _plan(packed.format, columns)
    assert plan is not None
    # A vector of float32, the usual case, is taken as it is: each call of torch costs as much as 10,000 weights.
    inputs = (x if x.dtype == torch.float32 else x.float()).contiguous()
    count = inputs.numel() // columns
    out = torch.empty(*x.shape[:-1], rows)
    if count and rows:
        stored = [None if name is NOTHING else packed.tensors[name].contiguous() for name in plan.tensors]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in stored]
        kernel = _compiled(plan.function)
        if isinstance(packed.format, BinaryResidual):
            marks = torch.empty(columns, dtype=torch.int32)
            _compiled("spread_marks")(addresses[-1], columns, marks.data_ptr())
            addresses[-1] = marks.data_ptr()
        places = (inputs.data_ptr(), count, columns, *addresses, *plan.arguments, out.data_ptr(), rows)
        if count * rows * columns < WEIGHTS_TO_SHARE or torch.get_num_threads() == 1:
            kernel(*places, 0, rows)
        else:
            shared_out(lambda first, last: kernel(*places, first, last), rows, ROWS_PER_PART)
    if bias is not None:
        out += bias.detach()
    return out if x.dtype == torch.float32 else out.to(x.dtype)


@lru_cache(maxsize=8)
def _compiled(function: str) -> Callable[..., None]:
    from whit.kernels.cpu import decode  # imports numba, which takes a second

    compiled: Callable[..., None] = getattr(decode, function)
    return compiled


for _format in (GroupedInteger, LevelTable, BinaryResidual):
    register_implementation(_format.name, Implementation(NAME, supports, decoded_linear))
