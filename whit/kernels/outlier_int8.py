"""LLM.int8() layers in one to three launches, for float16 and bfloat16 inputs on a CUDA device.

    1 token         one launch: each program rounds the token for itself and reads its rows of the weight once
    2 to 32         two: rows of the inputs are rounded and outlier columns listed; INT8 product on tensor cores
    more            the same, and with "dynamic" one launch before, in which columns are marked

These are Triton kernels; on Hopper more than 64 tokens take those of `outlier_wide`, in CUDA C++.

Nothing has a shape that depends on data and nothing waits for the device: outlier columns are listed in a buffer as
long as the row, and the product loops over as many as the device counted. If they are more than 8 of one token, or a
sixteenth of the columns with up to 1024, whole rows are multiplied instead, zeros standing for the other columns.
Codes and integer sums are those of the plain meaning, bit for bit; what follows is float32 (outlier columns: 16-bit
products, exact, with float32 sums) where the plain meaning has float64. Bound on the difference, with u the spacing of
the inputs' type and O the outlier columns, k of them:

    |error| <= u |y| + 2^-21 (s_t a_i / 127^2 |sum_j d_tj c_ij| + |b_i|) + (2^-18 + k 2^-27) sum_{j in O} |x_tj v_ij|

so a token's output may differ in its last bit with what it is batched with, "static" or not. Left to the plain meaning:
`compat`, granularity "tensor", float32 inputs, gradients, rows of more than 32768 columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.formats.outlier_int8 import OutlierInt8
from whit.kernels.calling import call
from whit.kernels.int8_product import int32_product
from whit.kernels.launching import usable
from whit.kernels.linear import Implementation, register_implementation
from whit.kernels.outlier_launch import Weight, one_token
from whit.kernels.outlier_many import many_tokens
from whit.kernels.outlier_wide import fits, wide_layer

MOST_COLUMNS = 32768
WIDE = 65
"""Fewest tokens for the kernels in CUDA C++."""
ADDRESSED = 2**31
"""Numbers of a matrix that 32-bit offsets reach."""


def _op(
    name: str, launches: Callable[[Tensor, Weight, Tensor], None]
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """A product and its op whit::`name`: x (m, columns), contiguous, times an LLM.int8() weight, (m, rows).

    Its arguments: x in float16 or bfloat16; codes, absmax, index and wide as the format stores them, of which `index`
    and `wide` are its outlier columns; bias (rows,) of any float type; threshold of outliers, if `dynamic`.
    """

    def product(
        x: Tensor,
        codes: Tensor,
        absmax: Tensor,
        index: Tensor | None,
        wide: Tensor | None,
        bias: Tensor | None,
        threshold: float,
        dynamic: bool,
    ) -> Tensor:
        out = torch.empty(len(x), len(codes), dtype=x.dtype, device=x.device)
        if out.numel():
            launches(x, Weight(codes, absmax, index, wide, bias, threshold, dynamic), out)
        return out

    op = torch.library.custom_op(f"whit::{name}", product, mutates_args=())
    op.register_fake(lambda x, codes, *rest: x.new_empty(x.shape[0], codes.shape[0]))
    return product, op


def _launches(x: Tensor, weight: Weight, out: Tensor) -> None:
    if len(x) == 1 and weight.columns % 4 == 0 and weight.codes.data_ptr() % 4 == 0:
        one_token(x, weight, out)
    else:
        many_tokens(x, weight, out)


multiply_outliers, outlier_int8_product = _op("outlier_int8", _launches)
multiply_outliers_wide, outlier_int8_wide_product = _op("outlier_int8_wide", wide_layer)


def _supports(x: Tensor, packed: Packed) -> bool:
    layout = packed.format
    assert isinstance(layout, OutlierInt8)
    if layout.compat or layout.granularity == "tensor" or packed.columns > MOST_COLUMNS or not usable(x, packed):
        return False
    return x.numel() // packed.columns * max(packed.rows, packed.columns) < ADDRESSED


def _supports_wide(x: Tensor, packed: Packed) -> bool:
    if x.numel() < WIDE * packed.columns or not _supports(x, packed) or not fits(x, packed.tensors["codes"]):
        return False
    stored = packed.tensors.get("outlier_weight")
    return stored is None or stored.dtype == x.dtype


def _linear(
    product: Callable[..., Tensor], op: Callable[..., object], x: Tensor, packed: Packed, bias: Tensor | None
) -> Tensor:
    layout, tensors = packed.format, packed.tensors
    assert isinstance(layout, OutlierInt8)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():  # the plain meaning has a derivative
        return layout.linear_with(int32_product, x, tensors, packed.rows, packed.columns, bias)
    flat = x.detach().reshape(-1, packed.columns).contiguous()
    out = call(
        flat,
        product,
        op,
        flat,
        tensors["codes"],
        tensors["absmax"],
        tensors.get("outlier_index"),
        tensors.get("outlier_weight"),
        None if bias is None else bias.detach().contiguous(),
        layout.threshold,
        layout.outliers == "dynamic",
    )
    return out.reshape(*x.shape[:-1], packed.rows)


def _triton(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return _linear(multiply_outliers, outlier_int8_product, x, packed, bias)


def _cuda(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    if (
        bias is not None and bias.dtype != x.dtype
    ):  # it would be rounded to the type of x, which the bound has no room for
        return _triton(x, packed, bias)
    return _linear(multiply_outliers_wide, outlier_int8_wide_product, x, packed, bias)


# The last one registered is asked first.
register_implementation(OutlierInt8.name, Implementation("fused int8 (Triton)", _supports, _triton))
register_implementation(OutlierInt8.name, Implementation("fused int8 (cuda)", _supports_wide, _cuda))
