"""N:M sparse binary weights times 1 to 16 vectors on CUDA, packed bytes read once.

`cuda/structured_product.cu` takes groups of 8 columns of which 1 to 7 are kept, with scalars of the whole row; other
layouts are decoded for every number of vectors. On Hopper decoding holds these weights in another form, which is faster
and takes more memory (`signed_levels.py`); this is for one layer by itself, and for every other device. The bound is
that of the other tensor-core products: with u the unit roundoff of the type of x, |error| <= u |y| + (u + 2^-20) sum_j
|w_ij x_j|, where the u of the sum is the plain meaning's own rounding of w.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.kernels.codebook_plan import clusters_at_once
from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_linear import product_arguments, usable
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
def _launch(layout: Layout, rows: int, columns: int, vectors: int, index: int) -> StructuredLaunch | None:
    _, processors, memory = device_limits(index)
    room = clusters_at_once(processors, starts_early(index))
    return structured_launch(layout, rows, columns, vectors, memory, room)


@lru_cache(maxsize=1024)
def _compiled(layout: Layout, threads: int, tokens: int, splits: int, bfloat: bool, index: int) -> Kernel:
    unit = unit_of(layout)
    assert unit is not None
    options = structured_options(layout, unit, threads, tokens, bfloat, starts_early(index), splits)
    return kernel(structured_source(layout, "structured_product"), "structured_product", options, index)


def launch_structured(
    x: Tensor,
    tensors: list[Tensor],
    bias: Tensor | None,
    layout: Layout,
    shape: tuple[int, int],
    launch: StructuredLaunch,
) -> Tensor:
    """x (m, columns) times the packed weight of `shape` (rows, columns) by a given launch."""
    rows, columns = shape
    tensors, index = aligned(tensors), x.device.index
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        run = _compiled(layout, launch.threads, launch.tokens, launch.splits, x.dtype == torch.bfloat16, index)
        arguments: list[Argument] = [
            ctypes.c_void_p(x.data_ptr()),
            weight_of(layout, tensors, rows, columns),
            ctypes.c_void_p(None if bias is None else bias.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            *(ctypes.c_int(number) for number in (x.shape[0], launch.parts, launch.tiles)),
        ]
        early = starts_early(index)
        run.launch(launch.grid, launch.threads, launch.shared, arguments, early=early, cluster=launch.splits)
    return out


@torch.library.custom_op("whit::structured_product", mutates_args=(), device_types="cuda")
def structured_product(
    x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: list[int], rows: int, columns: int
) -> Tensor:
    """x (m, columns), contiguous, m from 1 to 16, times the packed weight: (m, rows)."""
    described = layout_from(layout)
    launch = _launch(described, rows, columns, x.shape[0], x.device.index)
    assert launch is not None
    return launch_structured(x, tensors, bias, described, (rows, columns), launch)


@structured_product.register_fake
def _(x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: list[int], rows: int, columns: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)


def _supports(x: Tensor, packed: Packed) -> bool:
    layout = usable(x, packed)
    if layout is None or x.numel() > MOST_VECTORS * x.shape[-1] or unit_of(layout) is None:
        return False
    vectors = x.numel() // x.shape[-1]
    return _launch(layout, packed.rows, packed.columns, vectors, x.device.index) is not None


def _product(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.whit.structured_product(*product_arguments(x, packed, bias))
    return out.reshape(*x.shape[:-1], packed.rows)


register_implementation("structured-binary", Implementation("cuda structured product", _supports, _product))
