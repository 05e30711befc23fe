"""N:M sparse binary weights times 1 to 16 vectors on CUDA (`cuda/structured_product.cu`), packed bytes read once.

For groups of 8 columns of which 1 to 7 are kept, with scalars of the whole row; other layouts are decoded for every
number of vectors. The bound is that of the other tensor-core products: with u the unit roundoff of the type of x,
|error| <= u |y| + (u + 2^-20) sum_j |w_ij x_j|, where the u of the sum is the plain meaning's own rounding of w.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_linear import op_arguments, usable
from whit.kernels.cuda_ops import aligned, device_limits, layout_from, starts_early, weight_of
from whit.kernels.linear import Implementation, register_implementation
from whit.kernels.nvrtc import Argument, Kernel, kernel
from whit.kernels.structured_plan import (
    MOST_VECTORS,
    StructuredLaunch,
    structured_launch,
    structured_options,
    structured_source,
    unit_of,
)


@lru_cache(maxsize=1024)
def _prepared(
    layout: Layout, rows: int, columns: int, vectors: int, bfloat: bool, index: int
) -> tuple[Kernel, StructuredLaunch]:
    _, processors, memory = device_limits(index)
    unit, launch = unit_of(layout), structured_launch(layout, rows, columns, vectors, processors, memory)
    assert unit is not None and launch is not None
    options = structured_options(layout, unit, launch.threads, launch.tokens, bfloat, starts_early(index))
    return kernel(structured_source(layout, "structured_product"), "structured_product", options, index), launch


@torch.library.custom_op("whit::structured_product", mutates_args=(), device_types="cuda")
def structured_product(
    x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: list[int], rows: int, columns: int
) -> Tensor:
    """x (m, columns), contiguous, m from 1 to 16, times the packed weight: (m, rows)."""
    described, tensors, index = layout_from(layout), aligned(tensors), x.device.index
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        run, launch = _prepared(described, rows, columns, x.shape[0], x.dtype == torch.bfloat16, index)
        arguments: list[Argument] = [
            ctypes.c_void_p(x.data_ptr()),
            weight_of(described, tensors, rows, columns),
            ctypes.c_void_p(None if bias is None else bias.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            *(ctypes.c_int(number) for number in (x.shape[0], launch.parts, launch.tiles)),
        ]
        run.launch(launch.grid, launch.threads, launch.shared, arguments, early=starts_early(index))
    return out


@structured_product.register_fake
def _(x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: list[int], rows: int, columns: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)


def _supports(x: Tensor, packed: Packed) -> bool:
    layout, vectors = usable(x, packed), x.numel() // x.shape[-1]
    if layout is None or not 1 <= vectors <= MOST_VECTORS or unit_of(layout) is None:
        return False
    _, processors, memory = device_limits(x.device.index)
    return structured_launch(layout, packed.rows, packed.columns, vectors, processors, memory) is not None


def _product(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    tensors, layout = op_arguments(packed)
    flat = x.reshape(-1, packed.columns).contiguous()
    bias = None if bias is None else bias.detach().to(x.dtype).contiguous()
    out: Tensor = torch.ops.whit.structured_product(flat, tensors, bias, layout, packed.rows, packed.columns)
    return out.reshape(*x.shape[:-1], packed.rows)


register_implementation("structured-binary", Implementation("cuda structured product", _supports, _product))
