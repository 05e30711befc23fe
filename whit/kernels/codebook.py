"""One vector times a weight of 256 signed codewords on CUDA, by a table of partial sums (`cuda/codebook_product.cu`).

Work per row and group of d columns: one look-up in shared memory and one addition. Bound, with u the unit roundoff of
the type of x: |error| <= u |y| + 2^-18 sum_j |w_ij x_j|; neither weights nor partial sums are rounded to 16 bits.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.kernels.codebook_plan import (
    CodebookLaunch,
    clusters_at_once,
    codebook_options,
    codebook_source,
    has_codebook_product,
    place_codebook,
)
from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_linear import product_arguments, usable
from whit.kernels.cuda_ops import aligned, device_limits, layout_from, starts_early, waits_for_nothing, weight_of
from whit.kernels.linear import Implementation, register_implementation
from whit.kernels.nvrtc import Argument, Kernel, kernel


@lru_cache(maxsize=1024)
def codebook_launch(layout: Layout, rows: int, index: int) -> CodebookLaunch | None:
    """The launch on device number `index`, or None."""
    _, processors, memory = device_limits(index)
    return place_codebook(layout, rows, memory, clusters_at_once(processors, starts_early(index)))


@lru_cache(maxsize=1024)
def _compiled(layout: Layout, launch: CodebookLaunch, bfloat: bool, index: int) -> Kernel:
    options = codebook_options(layout, launch, bfloat, starts_early(index))
    return kernel(codebook_source(), "codebook_product", options, index)


def launch_codebook(
    x: Tensor,
    tensors: list[Tensor],
    bias: Tensor | None,
    layout: Layout,
    shape: tuple[int, int],
    launch: CodebookLaunch,
) -> Tensor:
    """x (1, columns) times the packed weight of `shape` (rows, columns) by a given launch."""
    rows, columns = shape
    given, tensors, index = tensors, aligned(tensors), x.device.index
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    out = torch.empty(1, rows, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        run = _compiled(layout, launch, x.dtype == torch.bfloat16, index)
        arguments: list[Argument] = [
            ctypes.c_void_p(x.data_ptr()),
            weight_of(layout, tensors, rows, columns),
            ctypes.c_void_p(None if bias is None else bias.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_int(launch.passes),
            ctypes.c_int(launch.rows_each),
        ]
        early = waits_for_nothing(index, given, tensors)
        run.launch(launch.grid, launch.threads, launch.shared, arguments, early=early, cluster=launch.splits)
    return out


@torch.library.custom_op("whit::codebook_product", mutates_args=(), device_types="cuda")
def codebook_product(
    x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: list[int], rows: int, columns: int
) -> Tensor:
    """x (1, columns), contiguous, times the packed weight: (1, rows)."""
    described = layout_from(layout)
    launch = codebook_launch(described, rows, x.device.index)
    assert launch is not None
    return launch_codebook(x, tensors, bias, described, (rows, columns), launch)


@codebook_product.register_fake
def _(x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: list[int], rows: int, columns: int) -> Tensor:
    return x.new_empty(1, rows)


def _supports(x: Tensor, packed: Packed) -> bool:
    layout = usable(x, packed)
    if layout is None or x.numel() != x.shape[-1] or not has_codebook_product(layout):
        return False
    return codebook_launch(layout, packed.rows, x.device.index) is not None


def _product(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.whit.codebook_product(*product_arguments(x, packed, bias))
    return out.reshape(*x.shape[:-1], packed.rows)


register_implementation("vector-codebook", Implementation("cuda table product", _supports, _product))
