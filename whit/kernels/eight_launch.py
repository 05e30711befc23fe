"""How the launches of `whit.kernels.eight_bit` are put together: buffers, grids and constants of the kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from whit.formats.minifloat import Minifloat, NumberSystem, number_system
from whit.kernels.launching import (
    capability,
    choose_tile,
    fitted,
    interpreted,
    power_of_two,
    processors,
    registers,
    shared_memory,
    starts_early,
)
from whit.kernels.quantised_inputs import E4M3

DECODED_ROWS, DECODED_COLUMNS, SCALES = 16, 256, 1024
"""Of the tile that a program decodes; rows of which one program widens the scales."""


def _kind(native: torch.dtype | None) -> int:
    """The constant of the kernels for a dtype of codes."""
    from whit.kernels.triton import small_numbers as kernels

    kinds = {None: kernels.UNROUNDED, torch.int8: kernels.INT8, E4M3: kernels.E4M3}
    return int(kinds.get(native, kernels.E5M2).value)


def _mantissa(numbers: NumberSystem) -> tuple[int, float]:
    """Bits of the significand (-1: integers), and what fields read as float16 have to be multiplied with."""
    if isinstance(numbers, Minifloat):
        return numbers.mantissa_bits, 2.0 ** (15 - numbers.bias)
    return -1, 1.0


def one_token(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    inputs: str,
    weight: str,
    group: int,
    out: Tensor,
    *,
    settled: bool = True,
) -> None:
    """The only launch for one token; see `whit.kernels.eight_bit.eight_bit_product`.

    `settled`: no kernel that may still run writes the codes, so they are asked for before it has ended.
    """
    from whit.kernels.triton import eight_one as kernels

    rows = len(codes)
    numbers, weights = number_system(inputs) if inputs else None, number_system(weight)
    words = codes.shape[1] // 4
    each = 32 // weights.bits
    integer = numbers is not None and numbers.native == torch.int8
    tile = choose_tile("eight-bit" if integer else f"one-{weights.bits}", 1, rows, codes.shape[1], x.device)
    blocks, early = -(-rows // tile.n), settled and starts_early(x.device)
    programs = min(blocks, tile.group * processors(x.device))
    mantissa, factor = _mantissa(weights)
    unit = not interpreted() and (
        weights.native == torch.int8 or (weights.native == E4M3 and capability(x.device) >= (8, 9))
    )
    kernels.one_token[(programs,)](
        x,
        codes.view(torch.int32),
        scales,
        scales if input_scale is None else input_scale,
        scales if bias is None else bias,
        out,
        rows,
        words,
        0 if len(scales) == 1 else 1,
        scales.shape[1],
        1.0 if numbers is None else numbers.maximum,
        1.0 if unit or integer else factor,
        INPUTS=_kind(None if numbers is None else numbers.native),
        BITS=weights.bits,
        MANTISSA=mantissa,
        UNIT=unit,
        STATIC=input_scale is not None,
        BIAS=bias is not None,
        WORDS=power_of_two(words),
        GROUP=max(group, 0) // each,
        ROWS=tile.n,
        LOOP=programs < blocks,
        EARLY=early,
        HARDWARE=not interpreted(),
        num_warps=tile.warps,
        maxnreg=registers(tile),
        enable_fp_fusion=numbers is None,  # fused products would round the inputs otherwise than the plain meaning
        launch_pdl=early,
    )


def round_tokens(
    x: Tensor, input_scale: Tensor | None, numbers: NumberSystem, scales: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (m, columns) in the native dtype, float32 scales (m,), and those of `rows` rows of the weight."""
    from whit.kernels.triton import eight_many as kernels

    tokens, columns = x.shape
    rounded = torch.empty(tokens, columns, dtype=numbers.native, device=x.device)
    steps = torch.empty(tokens, dtype=torch.float32, device=x.device)
    by_row = torch.empty(rows, dtype=torch.float32, device=x.device)
    size = power_of_two(columns)
    kernels.round_tokens[(tokens + -(-rows // SCALES),)](
        x,
        rounded,
        steps,
        steps if input_scale is None else input_scale,
        scales,
        by_row,
        tokens,
        rows,
        columns,
        0 if len(scales) == 1 else 1,
        numbers.maximum,
        KIND=_kind(numbers.native),
        STATIC=input_scale is not None,
        COLUMNS=size,
        ROWS=SCALES,
        RECIPROCAL=x.is_cuda,
        EARLY=starts_early(x.device),
        num_warps=min(16, max(1, size // 512)),
        enable_fp_fusion=False,
        launch_pdl=starts_early(x.device),
    )
    return rounded, steps, by_row


def product(
    left: Tensor, right: Tensor, scales: Tensor, steps: Tensor | None, bias: Tensor | None, out: Tensor
) -> None:
    """Codes times codes or, without `steps`, 16-bit inputs times codes; scales and bias, into `out`."""
    from whit.kernels.triton import eight_many as kernels
    from whit.kernels.triton.tiles import described

    (tokens, columns), rows = left.shape, len(right)
    tile = choose_tile("eight-bit" if steps is not None else "weight-only", max(tokens, 2), rows, columns, left.device)
    if steps is None:  # 16-bit inputs take twice the room
        tile = fitted(replace(tile, k=min(tile.k, 128), descriptor=False), 2, shared_memory(left.device))
    elif left.dtype != torch.int8:  # float32 sums of parts of the row need registers of their own
        tile = replace(tile, n=min(tile.n, 128))
    descriptor = tile.descriptor and columns % 16 == 0 and right.data_ptr() % 16 == 0
    one: Any = described(left, [tile.m, tile.k]) if descriptor else left
    other: Any = described(right, [tile.n, tile.k]) if descriptor else right
    early = starts_early(left.device) and steps is not None
    kernels.scaled_product[(-(-tokens // tile.m) * -(-rows // tile.n),)](
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


def decode(codes: Tensor, scales: Tensor, group: int, numbers: NumberSystem, out: Tensor) -> None:
    """The dense weight into `out` (rows, columns)."""
    from whit.kernels.triton import eight_decode as kernels

    rows, columns = out.shape
    mantissa, factor = _mantissa(numbers)
    kernels.decode[(-(-rows // DECODED_ROWS), -(-columns // DECODED_COLUMNS))](
        codes,
        scales,
        out,
        rows,
        columns,
        codes.shape[1],
        max(group, 1),
        scales.shape[1],
        0 if len(scales) == 1 else 1,
        factor,
        BITS=numbers.bits,
        MANTISSA=mantissa,
        GROUP=0 if group <= 0 else group if DECODED_COLUMNS % group == 0 else -1,
        ROWS=DECODED_ROWS,
        COLUMNS=DECODED_COLUMNS,
        num_warps=4,
    )
