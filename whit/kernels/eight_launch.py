"""How the launches of `whit.kernels.eight_bit` are put together: buffers, grids and constants of the kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeAlias

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
from whit.kernels.repeated import Repeated

DECODED_ROWS, DECODED_COLUMNS, SCALES = 16, 256, 1024
"""Of the tile that a program decodes; rows of which one program widens the scales."""
Types: TypeAlias = tuple[torch.dtype, ...]


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


@lru_cache(maxsize=256)
def _rounder(
    sizes: tuple[int, int, int, int], numbers: NumberSystem, static: bool, types: Types, device: torch.device
) -> Repeated:
    from whit.kernels.triton import eight_many as kernels

    tokens, rows, columns, _ = sizes
    size, early = power_of_two(columns), starts_early(device)
    constants = {
        "KIND": _kind(numbers.native),
        "STATIC": static,
        "COLUMNS": size,
        "ROWS": SCALES,
        "RECIPROCAL": device.type == "cuda",
        "EARLY": early,
    }
    options = {"num_warps": min(16, max(1, size // 512)), "enable_fp_fusion": False, "launch_pdl": early}
    grid = (tokens + -(-rows // SCALES),)
    return Repeated(kernels.round_tokens, grid, (*sizes, numbers.maximum), constants, options)


def round_tokens(
    x: Tensor, input_scale: Tensor | None, numbers: NumberSystem, scales: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (m, columns) in the native dtype, float32 scales (m,), and those of `rows` rows of the weight."""
    tokens, columns = x.shape
    rounded = torch.empty(tokens, columns, dtype=numbers.native, device=x.device)
    steps = torch.empty(tokens, dtype=torch.float32, device=x.device)
    by_row = torch.empty(rows, dtype=torch.float32, device=x.device)
    given = steps if input_scale is None else input_scale
    sizes = (tokens, rows, columns, 0 if scales.shape[0] == 1 else 1)
    types = x.dtype, given.dtype, scales.dtype
    launch = _rounder(sizes, numbers, input_scale is not None, types, x.device)
    launch.launch(x, rounded, steps, given, scales, by_row)
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


@lru_cache(maxsize=256)
def _decoder(
    shape: tuple[int, int],
    stored: tuple[torch.Size, torch.Size],
    group: int,
    numbers: NumberSystem,
    types: Types,
    device: torch.device,
) -> Repeated:
    from whit.kernels.triton import eight_decode as kernels

    (rows, columns), ((_, width), (scale_rows, groups)) = shape, stored
    mantissa, factor = _mantissa(numbers)
    constants = {
        "BITS": numbers.bits,
        "MANTISSA": mantissa,
        "GROUP": 0 if group <= 0 else group if DECODED_COLUMNS % group == 0 else -1,
        "ROWS": DECODED_ROWS,
        "COLUMNS": DECODED_COLUMNS,
    }
    grid = -(-rows // DECODED_ROWS), -(-columns // DECODED_COLUMNS)
    sizes = (rows, columns, width, max(group, 1), groups, 0 if scale_rows == 1 else 1, factor)
    return Repeated(kernels.decode, grid, sizes, constants, {"num_warps": 4})


def decode(codes: Tensor, scales: Tensor, group: int, numbers: NumberSystem, out: Tensor) -> None:
    """The dense weight into `out` (rows, columns)."""
    rows, columns = out.shape
    types = codes.dtype, scales.dtype, out.dtype
    launch = _decoder((rows, columns), (codes.shape, scales.shape), group, numbers, types, out.device)
    launch.launch(codes, scales, out)
