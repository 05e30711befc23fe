"""N:M sparse binary weights times 1 to 16 vectors on CUDA, packed bytes read once.

`cuda/structured_product.cu` takes groups of 8 columns of which 1 to 7 are kept, with scalars of the whole row; other
layouts are decoded for every number of vectors. On Hopper decoding holds these weights in another form, which is faster
and takes more memory (`signed_levels.py`); this is for one layer by itself, and for every other device. The bound is
that of the other tensor-core products: with u the unit roundoff of the type of x, |error| <= u |y| + (u + 2^-20) sum_j
|w_ij x_j|, where the u of the sum is the plain meaning's own rounding of w.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.kernels.calling import call
from whit.kernels.codebook_plan import clusters_at_once
from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_linear import prepared, product_arguments, usable
from whit.kernels.cuda_ops import device_limits, starts_early
from whit.kernels.cuda_products import OneLaunch, Stored
from whit.kernels.driver import on_device
from whit.kernels.linear import Implementation, Run, register_implementation
from whit.kernels.nvrtc import Kernel, kernel
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


def product_of_structured(stored: Stored, vectors: int, bfloat: bool) -> OneLaunch:
    """What multiplies a weight by `vectors` vectors."""
    layout, index = stored.layout, stored.index
    launch = _launch(layout, stored.rows, stored.columns, vectors, index)
    assert launch is not None
    run = _compiled(layout, launch.threads, launch.tokens, launch.splits, bfloat, index)
    geometry, numbers = (launch.grid, launch.threads, launch.shared), (launch.parts, launch.tiles)
    return OneLaunch(stored, run, *geometry, numbers, cluster=launch.splits, counted=True)


def multiply_structured(
    x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: list[int], rows: int, columns: int
) -> Tensor:
    """x (m, columns), contiguous, m from 1 to 16, times the packed weight: (m, rows)."""
    with on_device(x.device.index):
        stored = Stored.given(layout, tensors, rows, columns)
        return product_of_structured(stored, x.shape[0], x.dtype == torch.bfloat16)(x, bias)


structured_product = torch.library.custom_op(
    "whit::structured_product", multiply_structured, mutates_args=(), device_types="cuda"
)


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
    out = call(x, multiply_structured, structured_product, *product_arguments(x, packed, bias))
    return out.reshape(*x.shape[:-1], packed.rows)


def _prepare(x: Tensor, packed: Packed) -> Run | None:
    vectors, bfloat = x.numel() // packed.columns, x.dtype == torch.bfloat16
    return prepared(x, packed, ("structured", vectors), lambda stored: product_of_structured(stored, vectors, bfloat))


register_implementation("structured-binary", Implementation("cuda structured product", _supports, _product, _prepare))
