"""Layers with rounded inputs on the 8-bit multipliers of the hardware: INT8 (GPU, CPU with VNNI) and FP8 (GPU).

Codes are multiplied, not the numbers they stand for: sum_j a_j b_j, then times both scales in float32. A number system
that the hardware lacks runs on one that contains it (`NumberSystem.multiplier`): e2m1 weights with float8 inputs, int4
or e2m5 numbers with int8 inputs. What no unit can multiply (e3m4; an int8 input with an e4m3 weight), weights scaled in
groups and inputs that need a gradient are left to the plain meaning.

Bounds on the difference from the plain meaning, relative to sum_j |x_j w_j| of each output:
    INT8    integer sums are exact; what differs is the float32 rounding of the plain meaning, n 2^-24 for n columns
    FP8     2^-9: tensor cores add with less than float32's precision, and bfloat16 outputs are rounded before the bias
The output's own rounding to the dtype of the inputs comes on top. A NaN among inputs with a stored scale is lost in
INT8, which has none; with a scale per token the whole token becomes NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.formats.minifloat import NumberSystem, number_system
from whit.formats.quantised_inputs import QuantisedInputs
from whit.formats.scaled_codes import ScaledCodes
from whit.kernels.int8_product import int32_product, multiplies_int8
from whit.kernels.linear import Implementation, register_implementation

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
UNITS = ((torch.int8, torch.int8), (E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2))
"""Dtypes of inputs and weights that hardware multiplies; it has no product of two e5m2 numbers."""

LARGEST_SUM = 2**31 // 127**2
"""Columns up to which an INT8 sum fits into 32 bits."""


@dataclass(frozen=True)
class _Operands:
    """Codes (tokens, columns) and (rows, columns), and their float32 scales (tokens or 1, 1) and (1, rows or 1)."""

    inputs: Tensor
    weight: Tensor
    input_scales: Tensor
    weight_scales: Tensor


@lru_cache(maxsize=256)
def unit_for(inputs: str, weight: str) -> tuple[torch.dtype, torch.dtype] | None:
    """The dtypes in which a pair of number systems can be multiplied exactly as it is, or None."""
    systems = number_system(inputs), number_system(weight)
    for unit in UNITS:
        if all(numbers.multiplier(dtype) is not None for numbers, dtype in zip(systems, unit, strict=True)):
            return unit
    return None


def int8_linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """The layer by an exact product of INT8 codes."""
    operands = _operands(x, packed, torch.int8, torch.int8)
    product = int32_product(operands.inputs, operands.weight).float()
    return _finish(product.mul_(operands.input_scales).mul_(operands.weight_scales), x, packed, bias)


def float8_linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """The layer by `torch._scaled_mm`: scales within the product for e4m3 and bfloat16, after it otherwise."""
    layout = packed.format
    assert isinstance(layout, QuantisedInputs) and isinstance(layout.weight, ScaledCodes)
    unit = unit_for(layout.system, layout.weight.system)
    assert unit is not None
    operands = _operands(x, packed, *unit)
    weight = operands.weight.T
    if unit == (E4M3, E4M3) and x.dtype == torch.bfloat16 and _scales_by_row(x.device):
        input_scales = operands.input_scales.expand(len(operands.inputs), 1).contiguous()
        weight_scales = operands.weight_scales.expand(1, packed.rows).contiguous()
        product = torch._scaled_mm(
            operands.inputs, weight, scale_a=input_scales, scale_b=weight_scales, out_dtype=torch.bfloat16
        )
        return _finish(product, x, packed, bias)
    one = torch.ones((), device=x.device)
    product = torch._scaled_mm(operands.inputs, weight, scale_a=one, scale_b=one, out_dtype=torch.float32)
    return _finish(product.mul_(operands.input_scales).mul_(operands.weight_scales), x, packed, bias)


def _operands(x: Tensor, packed: Packed, input_dtype: torch.dtype, weight_dtype: torch.dtype) -> _Operands:
    layout = packed.format
    assert isinstance(layout, QuantisedInputs) and isinstance(layout.weight, ScaledCodes)
    inner = layout.inner(packed.tensors, packed.rows, packed.columns)
    numbers, weight_numbers = layout.numbers, layout.weight.numbers
    flat = x.reshape(-1, packed.columns)
    scales = layout.input_scales(flat, packed.tensors).reshape(-1, 1)
    inputs, factor = _carried(flat.float() / scales, numbers, input_dtype)
    codes = layout.weight.codes(inner.tensors, packed.columns)
    if weight_numbers.native == weight_dtype:
        weight, weight_factor = codes.view(weight_dtype), 1.0
    else:
        weight, weight_factor = _carried(weight_numbers.decode(codes), weight_numbers, weight_dtype)
    weight_scales = inner.tensors["scales"].float().T / (factor * weight_factor)
    return _Operands(inputs, weight, scales, weight_scales)


def _carried(values: Tensor, numbers: NumberSystem, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Values rounded to a number system, in a dtype that holds a multiple of every number; and that multiple."""
    if dtype.is_floating_point and numbers.native == dtype:  # torch rounds as we do, but does not saturate
        return values.clamp(-numbers.maximum, numbers.maximum).to(dtype), 1.0
    factor = numbers.multiplier(dtype)
    assert factor is not None
    return (numbers.round(values) * factor).to(dtype), factor


def _finish(product: Tensor, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    out = product if bias is None else product + bias.to(product.dtype)
    return out.to(x.dtype).reshape(*x.shape[:-1], packed.rows)


def _unit(x: Tensor, packed: Packed) -> tuple[torch.dtype, torch.dtype] | None:
    """The unit a call could use by its formats, whatever the hardware."""
    layout = packed.format
    assert isinstance(layout, QuantisedInputs)
    if not isinstance(layout.weight, ScaledCodes) or layout.weight.group_size > 0 or layout.group_size > 0:
        return None
    if x.numel() == 0 or (x.requires_grad and torch.is_grad_enabled()):
        return None
    return unit_for(layout.system, layout.weight.system)


def _int8_supported(x: Tensor, packed: Packed) -> bool:
    fits = packed.columns <= LARGEST_SUM and multiplies_int8(x.device)
    return fits and _unit(x, packed) == (torch.int8, torch.int8)


def _float8_supported(x: Tensor, packed: Packed) -> bool:
    unit = _unit(x, packed)
    if unit is None or not unit[0].is_floating_point or not x.is_cuda:
        return False
    return packed.columns % 16 == 0 and packed.rows % 16 == 0 and _capability(x.device) >= (8, 9)


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _scales_by_row(device: torch.device) -> bool:
    return device.type == "cuda" and _capability(device) >= (9, 0)


register_implementation(QuantisedInputs.name, Implementation("int8", _int8_supported, int8_linear))
register_implementation(QuantisedInputs.name, Implementation("float8", _float8_supported, float8_linear))
