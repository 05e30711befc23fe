"""Launch shapes of the Triton kernels of 8-bit layers: which may be tried for a layer, and trying them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from whit.formats.base import Format, Packed
from whit.formats.outlier_int8 import OutlierInt8
from whit.formats.quantised_inputs import QuantisedInputs
from whit.formats.scaled_codes import ScaledCodes
from whit.kernels.launching import (
    Tile,
    copies_boxes,
    device_name,
    keep_tuned,
    power_of_two,
    tile_key,
    tuned_tiles,
    use_tile,
)
from whit.kernels.linear import explain
from whit.kernels.nvrtc import CompilationError, DeviceError
from whit.kernels.tuning import Tuner, fastest, register_tuner

FEW = 64
"""Most vectors that a kernel multiplies by 8-bit weights alone."""


def candidates(kind: str, tokens: int, width: int, boxes: bool) -> list[Tile]:
    """Launch shapes among which tuning chooses; `width` bytes of codes in a row, `boxes` as `copies_boxes` says."""
    if tokens == 1:
        warps = max(1, power_of_two(width // 4) // 256)
        shapes = [(8, warps, 2), (8, 2 * warps, 2), (4, warps, 4), (16, warps, 2)]
        return [Tile(1, rows, 0, count, 1, group) for rows, count, group in shapes]
    if tokens <= 32:
        return [Tile(16, 32, 256, 4, 4, 4), Tile(16, 32, 128, 4, 6, 4)]
    many = [(64, 128, 4, 4, 8, 0), (128, 128, 4, 3, 8, 0), (128, 256, 8, 4, 16, 0)]
    if kind == "outlier-int8":
        many += [(128, 256, 8, 4, 16, 1), (64, 128, 4, 4, 8, 2)]
    return [Tile(m, n, 128, warps, stages, group, boxes, tail) for m, n, warps, stages, group, tail in many]


def kind_of(layout: Format, tokens: int) -> str:
    """What the shape of a layer's product is filed under; "" where the product is a library's."""
    if isinstance(layout, OutlierInt8):
        return "outlier-int8"
    if isinstance(layout, QuantisedInputs) and isinstance(layout.weight, ScaledCodes):
        if layout.numbers.native == torch.int8:
            return "eight-bit"
        return f"one-{layout.weight.numbers.bits}" if tokens == 1 else ""
    if isinstance(layout, ScaledCodes) and tokens <= FEW:
        if tokens == 1:
            return f"one-{layout.numbers.bits}"
        return "weight-only" if layout.numbers.native is not None else ""  # others are decoded
    return ""


def tune_tiles(x: Tensor, packed: Packed, seconds: Callable[[], float]) -> dict[Tile, float]:
    """Try the shapes for one call, use and keep the fastest.

    Returns:
        the time of each that could be launched.

    Raises:
        CompilationError: none could.

    Whatever is raised, the shape before stays in use, and nothing is kept.
    """
    device, tokens = device_name(x.device), x.numel() // x.shape[-1]
    codes = packed.tensors.get("codes", packed.tensors.get("weight_codes"))
    assert codes is not None
    width = codes.shape[1]
    kind = kind_of(packed.format, tokens)
    key = tile_key(kind, tokens, packed.rows, width)

    def timed() -> float:
        try:
            return seconds()
        except (torch.OutOfMemoryError, CompilationError, DeviceError):
            raise
        except Exception as error:  # whatever a device or a version of Triton says to a shape that it cannot launch
            torch.cuda.synchronize()  # raises what no other shape would mend
            raise CompilationError(str(error)) from error

    shapes = candidates(kind, tokens, width, copies_boxes(width, x.device))
    what = f"{kind} of {packed.rows} x {packed.columns}"
    best, times = fastest(shapes, tuned_tiles(device).get(key), lambda tile: use_tile(device, key, tile), timed, what)
    keep_tuned(device, {key: best})
    return times


def _supports(x: Tensor, packed: Packed) -> bool:
    return bool(kind_of(packed.format, x.numel() // x.shape[-1])) and explain(x, packed).endswith("(Triton)")


for _format in (OutlierInt8, QuantisedInputs, ScaledCodes):
    register_tuner(_format.name, Tuner(_supports, lambda x, packed, seconds: len(tune_tiles(x, packed, seconds))))
