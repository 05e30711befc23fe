"""8-bit weights in Triton, for float16 and bfloat16 inputs on a CUDA device: INT8 and FP8 as stored.

    inputs rounded too    1 token: one launch, in which each program rounds the token for itself
    (`QuantisedInputs`)   more: tokens are rounded by one launch, codes multiplied by another (FP8 of many tokens:
                          `torch._scaled_mm`; INT8 on Hopper: `outlier_wide`, in CUDA C++)
    weights alone         1 token: one launch, any numbers of 8 or 4 bits, also scaled in groups
    (`ScaledCodes`)       up to 64: INT8, E4M3 and E5M2 on 16-bit tensor cores, codes widened on their way to them
                          more: the weight decoded to 16 bit by one launch, then the library's product

Weights are read as they are stored, once. Bounds on the difference from the plain meaning, relative to
sum_j |x_j w_j|, where u is the spacing of the inputs' type and the output's own rounding comes on top:

    INT8 inputs    n 2^-24 for n columns: integer sums are exact, the plain meaning's float32 sums are not
    FP8 inputs     2^-9: tensor cores add with less than float32's precision
    weights alone  u + 2^-18: the u is the plain meaning's own rounding of the weight
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.formats.minifloat import number_system
from whit.formats.quantised_inputs import QuantisedInputs
from whit.formats.scaled_codes import WHOLE_TENSOR, ScaledCodes
from whit.kernels.calling import call, unobserved
from whit.kernels.cuda_ops import aligned
from whit.kernels.eight_launch import decode, one_token, product, round_tokens
from whit.kernels.launching import capability, processors, usable
from whit.kernels.linear import Implementation, register_implementation
from whit.kernels.outlier_gather import Prepared
from whit.kernels.outlier_wide import fits, wide_product, wide_tile
from whit.kernels.quantised_inputs import E4M3, LARGEST_SUM, UNITS, float8_linear, int8_linear

ADDRESSED = 2**31
"""Numbers of a matrix that 32-bit offsets reach."""
MOST_COLUMNS = 32768
WIDE = 65
"""Fewest tokens for the INT8 product in CUDA C++."""
FEW = 64
"""Most tokens for which widening codes on their way to the tensor cores beats decoding the weight first."""


def multiply_codes(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    inputs: str,
    weight: str,
    group: int,
) -> Tensor:
    """x (m, columns), contiguous, times codes: (m, rows). See the top of this file.

    Args:
        x: float16 or bfloat16.
        codes: uint8 (rows, columns); for one token also (rows, columns / 2), two codes of 4 bits each.
        scales: (rows, 1) or (1, 1); for one token also (rows, groups).
        input_scale: float32 (1,), if it is stored.
        bias: (rows,) of any float type.
        inputs: number system of the inputs, or "" where they are left alone.
        weight: number system of the codes.
        group: columns that share a scale, if positive.
    """
    out = torch.empty(len(x), len(codes), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    moved = codes.data_ptr() % 16 != 0  # a view into a larger buffer may start anywhere
    if moved:
        codes = codes.clone()
    if len(x) == 1 and codes.shape[1] % 4 == 0:
        one_token(x, codes, scales, input_scale, bias, inputs, weight, group, out, settled=not moved)
        return out
    native = number_system(weight).native
    assert native is not None
    if not inputs:
        product(x, codes.view(native), scales, None, bias, out)
    else:
        numbers = number_system(inputs)
        library = _library_multiplies(x, codes, numbers.native, native)
        rounded, steps, by_row = round_tokens(x, input_scale, numbers, scales, len(codes) if library else 0)
        if library:
            found = torch._scaled_mm(
                rounded, codes.view(native).T, scale_a=steps[:, None], scale_b=by_row[None], out_dtype=torch.bfloat16
            )
            return found if bias is None else found.add_(bias.to(found.dtype))
        product(rounded, codes.view(native), scales, steps, bias, out)
    return out


eight_bit_product = torch.library.custom_op("whit::eight_bit_product", multiply_codes, mutates_args=())


@eight_bit_product.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    inputs: str,
    weight: str,
    group: int,
) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def multiply_int8(x: Tensor, codes: Tensor, scales: Tensor, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (m, columns), contiguous and rounded to INT8, times INT8 codes by `whit.kernels.outlier_wide`: (m, rows).

    Args as of `eight_bit_product`, the bias of the type of x.
    """
    out, codes = torch.empty(len(x), len(codes), dtype=x.dtype, device=x.device), aligned([codes])[0]
    rounded, steps, by_row = round_tokens(x, input_scale, number_system("int8"), scales, len(codes))
    tile = wide_tile(*out.shape, processors(out.device))
    with torch.cuda.device(out.device):
        wide_product(tile, Prepared(rounded, steps), codes.view(torch.int8), by_row, bias, out, levels=1, ahead=False)
    return out


int8_product_wide = torch.library.custom_op("whit::int8_product_wide", multiply_int8, mutates_args=())


@int8_product_wide.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _library_multiplies(x: Tensor, codes: Tensor, inputs: torch.dtype | None, weight: torch.dtype) -> bool:
    """Whether `torch._scaled_mm` takes these with a scale per row."""
    fits = codes.shape[0] % 16 == 0 and codes.shape[1] % 16 == 0 and len(x) > FEW and x.dtype == torch.bfloat16
    return fits and (inputs, weight) == (E4M3, E4M3) and x.is_cuda and capability(x.device) >= (9, 0)


def decode_codes(
    codes: Tensor, scales: Tensor, rows: int, columns: int, group: int, system: str, dtype: torch.dtype
) -> Tensor:
    """The dense weight (rows, columns) in float16 or bfloat16, from codes of 8 or 4 bits: `unpack().to(dtype)`."""
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    decode(codes, scales, group, number_system(system), out)
    return out


decoded_codes = torch.library.custom_op("whit::decoded_codes", decode_codes, mutates_args=())


@decoded_codes.register_fake
def _(codes: Tensor, scales: Tensor, rows: int, columns: int, group: int, system: str, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(rows, columns, dtype=dtype)


def _fits(x: Tensor, packed: Packed) -> bool:
    most = x.numel() // max(1, packed.columns) * max(packed.rows, packed.columns)
    return packed.columns <= MOST_COLUMNS and most < ADDRESSED and usable(x, packed)


def _float8_here(x: Tensor, *dtypes: torch.dtype | None) -> bool:
    return torch.int8 in dtypes or not x.is_cuda or capability(x.device) >= (8, 9)


def _supports_rounded(x: Tensor, packed: Packed) -> bool:
    layout = packed.format
    assert isinstance(layout, QuantisedInputs)
    if not isinstance(layout.weight, ScaledCodes) or layout.weight.group_size > 0 or layout.group_size > 0:
        return False
    pair = layout.numbers.native, layout.weight.numbers.native
    if pair not in UNITS or (pair[0] == torch.int8 and packed.columns > LARGEST_SUM) or not _fits(x, packed):
        return False
    one = x.numel() == packed.columns and packed.columns % 4 == 0
    return _float8_here(x, *pair) and (one or pair[0] == pair[1])


def _rounded(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    layout = packed.format
    assert isinstance(layout, QuantisedInputs) and isinstance(layout.weight, ScaledCodes)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():  # these have a derivative
        return (int8_linear if layout.numbers.native == torch.int8 else float8_linear)(x, packed, bias)
    tensors = _inner(x, packed).tensors
    return _call(x, packed, tensors["codes"], tensors["scales"], bias, layout.system, layout.weight.system, 0)


def _inner(x: Tensor, packed: Packed) -> Packed:
    """The weight within a layer that rounds its inputs."""
    layout = packed.format
    assert isinstance(layout, QuantisedInputs)
    if not unobserved(x):
        return layout.inner(packed.tensors, packed.rows, packed.columns)
    answers = packed.memory.of(packed.tensors)
    if "inner" not in answers:
        answers["inner"] = layout.inner(packed.tensors, packed.rows, packed.columns)
    found: Packed = answers["inner"]
    return found


def _supports_wide(x: Tensor, packed: Packed) -> bool:
    layout = packed.format
    assert isinstance(layout, QuantisedInputs)
    if layout.numbers.native != torch.int8 or x.numel() < WIDE * packed.columns or not _supports_rounded(x, packed):
        return False
    return fits(x, _inner(x, packed).tensors["codes"])


def _wide(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    layout = packed.format
    assert isinstance(layout, QuantisedInputs)
    if bias is not None and (bias.dtype != x.dtype or (bias.requires_grad and torch.is_grad_enabled())):
        return _rounded(x, packed, bias)
    tensors = _inner(x, packed).tensors
    flat = x.detach().reshape(-1, packed.columns).contiguous()
    given, stored = None if bias is None else bias.detach().contiguous(), packed.tensors.get("input_scales")
    out = call(flat, multiply_int8, int8_product_wide, flat, tensors["codes"], tensors["scales"], stored, given)
    return out.reshape(*x.shape[:-1], packed.rows)


def _call(
    x: Tensor, packed: Packed, codes: Tensor, scales: Tensor, bias: Tensor | None, inputs: str, weight: str, group: int
) -> Tensor:
    flat = x.detach().reshape(-1, packed.columns).contiguous()
    given = None if bias is None else bias.detach().contiguous()
    stored = packed.tensors.get("input_scales") if inputs else None
    arguments = (flat, codes, scales, stored, given, inputs, weight, group)
    out = call(flat, multiply_codes, eight_bit_product, *arguments)
    return out.reshape(*x.shape[:-1], packed.rows)


def _supports_few(x: Tensor, packed: Packed) -> bool:
    layout = packed.format
    assert isinstance(layout, ScaledCodes)
    if not _fits(x, packed) or x.numel() > FEW * packed.columns:
        return False
    numbers, group = layout.numbers, layout.group_size
    if x.numel() == packed.columns and packed.tensors["codes"].shape[1] % 4 == 0 and numbers.bits in (4, 8):
        shared = group % (32 // numbers.bits) == 0 and group & (group - 1) == 0
        if group <= 0 or (shared and group <= packed.columns):
            return packed.columns % (32 // numbers.bits) == 0
    return group <= 0 and numbers.native is not None and _float8_here(x, numbers.native)


def _few(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    layout = packed.format
    assert isinstance(layout, ScaledCodes)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return _decoded(x, packed, bias)
    return _call(
        x, packed, packed.tensors["codes"], packed.tensors["scales"], bias, "", layout.system, layout.group_size
    )


def _supports_decoded(x: Tensor, packed: Packed) -> bool:
    layout = packed.format
    assert isinstance(layout, ScaledCodes)
    return layout.numbers.bits in (4, 8) and layout.group_size >= WHOLE_TENSOR and _fits(x, packed)


def _decoded(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    layout, tensors = packed.format, packed.tensors
    assert isinstance(layout, ScaledCodes)
    shape = (packed.rows, packed.columns, layout.group_size, layout.system, x.dtype)
    weight = call(x, decode_codes, decoded_codes, tensors["codes"], tensors["scales"], *shape)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


# The last one registered is asked first.
register_implementation(QuantisedInputs.name, Implementation("fused 8-bit (Triton)", _supports_rounded, _rounded))
register_implementation(QuantisedInputs.name, Implementation("fused 8-bit (cuda)", _supports_wide, _wide))
register_implementation(ScaledCodes.name, Implementation("decode + matmul (Triton)", _supports_decoded, _decoded))
register_implementation(ScaledCodes.name, Implementation("few vectors (Triton)", _supports_few, _few))
