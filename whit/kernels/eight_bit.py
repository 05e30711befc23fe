"""8-bit weights in Triton, for float16 and bfloat16 inputs on a CUDA device: INT8 and FP8 as stored.

    inputs rounded too    1 token: one launch, in which each program rounds the token for itself
    (`QuantisedInputs`)   more: tokens are rounded by one launch, codes multiplied by another (FP8 of many tokens:
                          `torch._scaled_mm`)
    weights alone         1 token: one launch; up to 64: 16-bit tensor cores, codes widened on their way to them
    (`ScaledCodes`)       more: the weight decoded to 16 bit by one launch, then the library's product

Weights are read as they are stored, once. Those of other number systems, of 4 bits or scaled in groups are decoded
first whatever the number of tokens. Bounds on the difference from the plain meaning, relative to sum_j |x_j w_j|, where
u is the spacing of the inputs' type and the output's own rounding comes on top:

    INT8 inputs    n 2^-24 for n columns: integer sums are exact, the plain meaning's float32 sums are not
    FP8 inputs     2^-9: tensor cores add with less than float32's precision
    weights alone  u + 2^-18: the u is the plain meaning's own rounding of the weight
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.formats.minifloat import NumberSystem, number_system
from whit.formats.quantised_inputs import QuantisedInputs
from whit.formats.scaled_codes import WHOLE_TENSOR, ScaledCodes
from whit.kernels.launching import (
    Tile,
    capability,
    choose_tile,
    interpreted,
    power_of_two,
    processors,
    starts_early,
    usable,
)
from whit.kernels.linear import Implementation, register_implementation
from whit.kernels.quantised_inputs import E4M3, LARGEST_SUM, UNITS, float8_linear, int8_linear

ADDRESSED = 2**31
"""Numbers of a matrix that 32-bit offsets reach."""
MOST_COLUMNS = 32768
FEW = 64
"""Most tokens for which widening codes on their way to the tensor cores beats decoding the weight first."""
DECODED_ROWS, DECODED_COLUMNS = 16, 256


@torch.library.custom_op("whit::eight_bit_product", mutates_args=())
def eight_bit_product(
    x: Tensor, codes: Tensor, scales: Tensor, input_scale: Tensor | None, bias: Tensor | None, inputs: str, weight: str
) -> Tensor:
    """x (m, columns), contiguous, times 8-bit codes: (m, rows). See the top of this file.

    Args:
        x: float16 or bfloat16.
        codes: uint8 (rows, columns).
        scales: (rows, 1) or (1, 1).
        input_scale: float32 (1,), if it is stored.
        bias: (rows,) of any float type.
        inputs: number system of the inputs, or "" where they are left alone.
        weight: number system of the codes.
    """
    out = torch.empty(len(x), len(codes), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    native = number_system(weight).native
    assert native is not None
    if len(x) == 1 and codes.shape[1] % 4 == 0 and codes.data_ptr() % 4 == 0:
        _one_token(x, codes, scales, input_scale, bias, inputs, native, out)
    elif not inputs:
        _product(x, codes.view(native), scales, None, bias, out)
    else:
        rounded, steps = _round_tokens(x, input_scale, number_system(inputs))
        if _library_multiplies(x, codes, rounded.dtype, native):
            found = torch._scaled_mm(
                rounded,
                codes.view(native).T,
                scale_a=steps.unsqueeze(1),
                scale_b=scales.float().T.expand(1, len(codes)).contiguous(),
                out_dtype=torch.bfloat16,
            )
            return found if bias is None else found.add_(bias.to(found.dtype))
        _product(rounded, codes.view(native), scales, steps, bias, out)
    return out


@eight_bit_product.register_fake
def _(
    x: Tensor, codes: Tensor, scales: Tensor, input_scale: Tensor | None, bias: Tensor | None, inputs: str, weight: str
) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _library_multiplies(x: Tensor, codes: Tensor, inputs: torch.dtype, weight: torch.dtype) -> bool:
    """Whether `torch._scaled_mm` takes these with a scale per row."""
    fits = codes.shape[0] % 16 == 0 and codes.shape[1] % 16 == 0 and len(x) > FEW and x.dtype == torch.bfloat16
    return fits and (inputs, weight) == (E4M3, E4M3) and x.is_cuda and capability(x.device) >= (9, 0)


def _kind(native: torch.dtype | None) -> int:
    """The constant of the kernels for a dtype of codes."""
    from whit.kernels.triton import eight_bit as kernels

    kinds = {None: kernels.UNROUNDED, torch.int8: kernels.INT8, E4M3: kernels.E4M3}
    return int(kinds.get(native, kernels.E5M2).value)


def _one_token(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    inputs: str,
    weight: torch.dtype,
    out: Tensor,
) -> None:
    from whit.kernels.triton.eight_bit import one_token

    rows, columns = codes.shape
    numbers = number_system(inputs) if inputs else None
    tile = choose_tile("eight-bit", 1, rows, columns, x.device)
    blocks, early = -(-rows // tile.n), starts_early(x.device)
    programs = min(blocks, tile.group * processors(x.device))
    one_token[(programs,)](
        x,
        codes.view(torch.int32),
        scales,
        scales if input_scale is None else input_scale,
        scales if bias is None else bias,
        out,
        rows,
        columns // 4,
        0 if len(scales) == 1 else 1,
        1.0 if numbers is None else numbers.maximum,
        1.0,
        INPUTS=_kind(None if numbers is None else numbers.native),
        WEIGHT=_kind(weight),
        STATIC=input_scale is not None,
        BIAS=bias is not None,
        WORDS=power_of_two(columns // 4),
        ROWS=tile.n,
        LOOP=programs < blocks,
        EARLY=early,
        HARDWARE=not interpreted(),
        num_warps=tile.warps,
        enable_fp_fusion=numbers is None,  # fused products would round the inputs otherwise than the plain meaning
        launch_pdl=early,
    )


def _round_tokens(x: Tensor, input_scale: Tensor | None, numbers: NumberSystem) -> tuple[Tensor, Tensor]:
    """Codes (m, columns) in the native dtype of a number system, and float32 scales (m,)."""
    from whit.kernels.triton.eight_bit import round_tokens

    tokens, columns = x.shape
    rounded = torch.empty(tokens, columns, dtype=numbers.native, device=x.device)
    steps = torch.empty(tokens, dtype=torch.float32, device=x.device)
    size = power_of_two(columns)
    round_tokens[(tokens,)](
        x,
        rounded,
        steps,
        steps if input_scale is None else input_scale,
        columns,
        numbers.maximum,
        KIND=_kind(numbers.native),
        STATIC=input_scale is not None,
        COLUMNS=size,
        RECIPROCAL=x.is_cuda,
        EARLY=starts_early(x.device),
        num_warps=min(16, max(1, size // 512)),
        enable_fp_fusion=False,
        launch_pdl=starts_early(x.device),
    )
    return rounded, steps


def _product(
    left: Tensor, right: Tensor, scales: Tensor, steps: Tensor | None, bias: Tensor | None, out: Tensor
) -> None:
    from whit.kernels.triton.eight_bit import scaled_product
    from whit.kernels.triton.outlier_int8 import described

    (tokens, columns), rows = left.shape, len(right)
    tile = choose_tile("eight-bit" if steps is not None else "weight-only", tokens, rows, columns, left.device)
    if steps is None:  # 16-bit inputs take twice the room
        tile = Tile(tile.m, tile.n, min(tile.k, 128), tile.warps, tile.stages, tile.group)
    elif left.dtype != torch.int8:  # float32 sums of parts of the row need registers of their own
        tile = Tile(tile.m, min(tile.n, 128), tile.k, tile.warps, tile.stages, tile.group, tile.descriptor)
    descriptor = tile.descriptor and columns % 16 == 0 and right.data_ptr() % 16 == 0
    one: Any = described(left, [tile.m, tile.k]) if descriptor else left
    other: Any = described(right, [tile.n, tile.k]) if descriptor else right
    early = starts_early(left.device) and steps is not None
    scaled_product[(-(-tokens // tile.m) * -(-rows // tile.n),)](
        one,
        other,
        scales if steps is None else steps,
        scales,
        scales if bias is None else bias,
        out,
        tokens,
        rows,
        columns,
        0 if len(scales) == 1 else 1,
        1.0,
        INTEGER=left.dtype == torch.int8,
        WIDEN=steps is None,
        SCALED=steps is not None,
        BIAS=bias is not None,
        M=tile.m,
        N=tile.n,
        K=tile.k,
        GROUP=tile.group,
        DESCRIPTOR=descriptor,
        EVEN=columns % tile.k == 0,
        STAGES=tile.stages,
        PART=128,
        EARLY=early,
        num_warps=tile.warps,
        launch_pdl=early,
    )


@torch.library.custom_op("whit::decoded_codes", mutates_args=())
def decoded_codes(
    codes: Tensor, scales: Tensor, rows: int, columns: int, group: int, system: str, dtype: torch.dtype
) -> Tensor:
    """The dense weight (rows, columns) in float16 or bfloat16, from codes of 8 or 4 bits: `unpack().to(dtype)`."""
    from whit.kernels.triton.eight_bit import decode

    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    decode[(-(-rows // DECODED_ROWS), -(-columns // DECODED_COLUMNS))](
        codes,
        _table(system, codes.device),
        scales,
        out,
        rows,
        columns,
        codes.shape[1],
        group if group > 0 else columns,
        scales.shape[1],
        0 if len(scales) == 1 else 1,
        BITS=number_system(system).bits,
        ROWS=DECODED_ROWS,
        COLUMNS=DECODED_COLUMNS,
        num_warps=4,
    )
    return out


@decoded_codes.register_fake
def _(codes: Tensor, scales: Tensor, rows: int, columns: int, group: int, system: str, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(rows, columns, dtype=dtype)


@lru_cache(maxsize=64)
def _table(system: str, device: torch.device) -> Tensor:
    return torch.tensor(number_system(system).code_values(), dtype=torch.float32, device=device)


def _fits(x: Tensor, packed: Packed) -> bool:
    most = x.numel() // max(1, packed.columns) * max(packed.rows, packed.columns)
    return packed.columns <= MOST_COLUMNS and most < ADDRESSED and usable(x, packed)


def _float8_here(x: Tensor, *dtypes: torch.dtype | None) -> bool:
    return torch.int8 in dtypes or interpreted() or capability(x.device) >= (8, 9)


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
    tensors = layout.inner(packed.tensors, packed.rows, packed.columns).tensors
    return _call(x, packed, tensors["codes"], tensors["scales"], bias, layout.system, layout.weight.system)


def _call(
    x: Tensor, packed: Packed, codes: Tensor, scales: Tensor, bias: Tensor | None, inputs: str, weight: str
) -> Tensor:
    flat = x.detach().reshape(-1, packed.columns).contiguous()
    given = None if bias is None else bias.detach().contiguous()
    stored = packed.tensors.get("input_scales") if inputs else None
    out: Tensor = torch.ops.whit.eight_bit_product(flat, codes, scales, stored, given, inputs, weight)
    return out.reshape(*x.shape[:-1], packed.rows)


def _supports_few(x: Tensor, packed: Packed) -> bool:
    layout = packed.format
    assert isinstance(layout, ScaledCodes)
    if layout.group_size > 0 or layout.numbers.native is None or x.numel() > FEW * packed.columns:
        return False
    return _fits(x, packed) and _float8_here(x, layout.numbers.native)


def _few(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    layout = packed.format
    assert isinstance(layout, ScaledCodes)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return _decoded(x, packed, bias)
    return _call(x, packed, packed.tensors["codes"], packed.tensors["scales"], bias, "", layout.system)


def _supports_decoded(x: Tensor, packed: Packed) -> bool:
    layout = packed.format
    assert isinstance(layout, ScaledCodes)
    return layout.numbers.bits in (4, 8) and layout.group_size >= WHOLE_TENSOR and _fits(x, packed)


def _decoded(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    layout, tensors = packed.format, packed.tensors
    assert isinstance(layout, ScaledCodes)
    weight = torch.ops.whit.decoded_codes(
        tensors["codes"], tensors["scales"], packed.rows, packed.columns, layout.group_size, layout.system, x.dtype
    )
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


# The last one registered is asked first.
register_implementation(QuantisedInputs.name, Implementation("fused 8-bit (Triton)", _supports_rounded, _rounded))
register_implementation(ScaledCodes.name, Implementation("decode + matmul (Triton)", _supports_decoded, _decoded))
register_implementation(ScaledCodes.name, Implementation("8-bit weights (Triton)", _supports_few, _few))
