"""One vector times a weight of 256 signed codewords on CUDA, by a table of partial sums (`cuda/codebook_product.cu`).

Work per row and group of d columns: one look-up in shared memory and one addition. Bound, with u the unit roundoff of
the type of x: |error| <= u |y| + 2^-18 sum_j |w_ij x_j|; neither weights nor partial sums are rounded to 16 bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.kernels.calling import call
from whit.kernels.codebook_plan import (
    CodebookLaunch,
    clusters_at_once,
    codebook_options,
    codebook_source,
    has_codebook_product,
    place_codebook,
)
from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_linear import prepared, product_arguments, usable
from whit.kernels.cuda_ops import device_limits, starts_early
from whit.kernels.cuda_products import OneLaunch, Stored
from whit.kernels.driver import on_device
from whit.kernels.linear import Implementation, Run, register_implementation
from whit.kernels.nvrtc import Kernel, kernel


@lru_cache(maxsize=1024)
def codebook_launch(layout: Layout, rows: int, index: int) -> CodebookLaunch | None:
    """The launch on device number `index`, or None."""
    _, processors, memory = device_limits(index)
    return place_codebook(layout, rows, memory, clusters_at_once(processors, starts_early(index)))


@lru_cache(maxsize=1024)
def _compiled(layout: Layout, launch: CodebookLaunch, bfloat: bool, index: int) -> Kernel:
    options = codebook_options(layout, launch, bfloat, starts_early(index))
    return kernel(codebook_source(), "codebook_product", options, index)


def product_by_table(stored: Stored, bfloat: bool) -> OneLaunch:
    """What multiplies a weight by one vector."""
    launch = codebook_launch(stored.layout, stored.rows, stored.index)
    assert launch is not None
    run, numbers = _compiled(stored.layout, launch, bfloat, stored.index), (launch.passes, launch.rows_each)
    return OneLaunch(stored, run, launch.grid, launch.threads, launch.shared, numbers, cluster=launch.splits)


def multiply_by_table(
    x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: list[int], rows: int, columns: int
) -> Tensor:
    """x (1, columns), contiguous, times the packed weight: (1, rows)."""
    with on_device(x.device.index):
        return product_by_table(Stored.given(layout, tensors, rows, columns), x.dtype == torch.bfloat16)(x, bias)


codebook_product = torch.library.custom_op(
    "whit::codebook_product", multiply_by_table, mutates_args=(), device_types="cuda"
)


@codebook_product.register_fake
def _(x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: list[int], rows: int, columns: int) -> Tensor:
    return x.new_empty(1, rows)


def _supports(x: Tensor, packed: Packed) -> bool:
    layout = usable(x, packed)
    if layout is None or x.numel() != x.shape[-1] or not has_codebook_product(layout):
        return False
    return codebook_launch(layout, packed.rows, x.device.index) is not None


def _product(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    out = call(x, multiply_by_table, codebook_product, *product_arguments(x, packed, bias))
    return out.reshape(*x.shape[:-1], packed.rows)


def _prepare(x: Tensor, packed: Packed) -> Run | None:
    return prepared(x, packed, ("table",), lambda stored: product_by_table(stored, x.dtype == torch.bfloat16))


register_implementation("vector-codebook", Implementation("cuda table product", _supports, _product, _prepare))
