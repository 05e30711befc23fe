"""compressed-tensors schemes of 8-bit codes, and of layers that also round their inputs: W8A8, W4A8, FP8.

    int-quantized     weight int8 (n, m), weight_scale float32 (n, G)             w = scale * weight
    float-quantized   weight float8_e4m3fn (n, m), weight_scale float32 (n, G)
    static inputs     input_scale float32 (1,)

Inputs are rounded per token with a scale taken from the token ("token", dynamic) or by a stored one ("tensor"). The
weights are exact. A reader rounds inputs by its own arithmetic: for int8 the library's own forward takes max|x| / 127.5
as the scale, whit and vLLM max|x| / 127.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from whit.exporters.base import CannotHoldError
from whit.exporters.schemes import INTEGER_BITS, Arguments, Parts, Scheme, hold, holds, words
from whit.exporters.source import PackedLayer
from whit.formats.bits import pack_codes, unpack_codes
from whit.formats.grouped_integer import GroupedInteger

#: Number systems of inputs -> type of their arguments.
_INPUT_TYPES = {"int8": "int", "e4m3fn": "float"}
#: Number systems whose codes are the bytes of torch.float8_e4m3fn (those of e4m3 end at 240).
_FLOAT8 = frozenset({"e4m3", "e4m3fn"})


class _Inner(Mapping[str, Tensor]):
    """The tensors of a format inside another, without the prefix of their names."""

    def __init__(self, outer: Mapping[str, Tensor], prefix: str) -> None:
        self._outer, self._prefix = outer, prefix

    def __getitem__(self, key: str) -> Tensor:
        return self._outer[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self._prefix) for key in self._outer if key.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@holds("scaled-codes")
def _scaled_codes(layer: PackedLayer, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Scheme, Parts]:
    layout: Any = layer.format
    bits, rows, columns = layout.numbers.bits, layer.rows, layer.columns
    arguments = _arguments(layer)
    if arguments.type == "float":
        return Scheme("float-quantized", arguments), _weight_and_scale(layer, tensors)

    def packed() -> Tensor:
        codes = tensors["codes"] if bits == 8 else unpack_codes(tensors["codes"], bits, columns)
        return words(pack_codes(codes ^ 2 ** (bits - 1), bits), columns, bits)  # two's complement -> offset

    return Scheme("pack-quantized", arguments), {
        "weight_packed": packed,
        "weight_scale": lambda: tensors["scales"].float().expand(rows, -1).contiguous(),
        "weight_shape": lambda: torch.tensor([rows, columns]),
    }


@holds("quantised-inputs")
def _quantised_inputs(layer: PackedLayer, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Scheme, Parts]:
    layout: Any = layer.format
    inner = dataclasses.replace(layer, format=layout.weight)
    hold(inner, _Inner(tensors, "weight_"), dtype)  # refuses what it refuses without rounded inputs
    arguments = _arguments(inner)
    if layout.system not in _INPUT_TYPES:
        raise CannotHoldError(
            layer.name, f"inputs are rounded to {' or '.join(_INPUT_TYPES)} there, not to {layout.system}"
        )
    if layout.group_size:
        raise CannotHoldError(layer.name, "inputs have one scale per token or for all there, not one per group")
    if _INPUT_TYPES[layout.system] != arguments.type:
        raise CannotHoldError(layer.name, "weights and inputs are both integers or both floats there")
    inputs = Arguments(8, arguments.type, True, "tensor" if layout.static else "token", dynamic=not layout.static)
    parts = _weight_and_scale(inner, _Inner(tensors, "weight_"))
    if layout.static:
        parts["input_scale"] = lambda: tensors["input_scales"]
    return Scheme(f"{arguments.type}-quantized", arguments, inputs), parts


@holds("outlier-int8")
def _outlier_int8(layer: PackedLayer, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Scheme, Parts]:
    layout: Any = layer.format
    if layout.outliers != "none":
        raise CannotHoldError(layer.name, "it has no outlier columns in 16 bit")
    if layout.granularity == "tensor":
        raise CannotHoldError(layer.name, "inputs have one scale per token there, not one per call")
    scheme = Scheme(
        "int-quantized",
        Arguments(8, "int", True, "channel"),
        Arguments(8, "int", True, "token", dynamic=True),
    )
    return scheme, {
        "weight": lambda: tensors["codes"],
        "weight_scale": lambda: (tensors["absmax"] / 127).unsqueeze(1).expand(layer.rows, 1).contiguous(),
    }


def _arguments(layer: PackedLayer) -> Arguments:
    """Arguments of a weight of whole or float codes.

    Raises:
        CannotHoldError: another number system, zero points, or groups of unequal size.
    """
    layout: Any = layer.format
    if isinstance(layout, GroupedInteger):
        if not layout.symmetric:
            raise CannotHoldError(layer.name, "weights have no zero points there where inputs are rounded")
        kind, bits = "int", layout.bits
    else:
        bits = layout.numbers.bits
        kind = "int" if layout.numbers.is_integer else "float"
        if bits not in INTEGER_BITS or (kind == "float" and layout.system not in _FLOAT8):
            raise CannotHoldError(layer.name, f"weights are int4, int8 or e4m3fn there, not {layout.system}")
    if layout.group_size <= 0 or layout.group_size >= layer.columns:
        return Arguments(bits, kind, True, "channel")
    if layer.columns % layout.group_size:
        raise CannotHoldError(
            layer.name, f"groups all have one size there, and {layer.columns} columns are no multiple of "
            f"{layout.group_size}"
        )  # fmt: skip
    return Arguments(bits, kind, True, "group", layout.group_size)


def _weight_and_scale(layer: PackedLayer, tensors: Mapping[str, Tensor]) -> Parts:
    """One byte per weight and float32 scales (rows, groups), for the layouts that `_arguments` accepts."""
    layout: Any = layer.format

    def weight() -> Tensor:
        offset = isinstance(layout, GroupedInteger)  # otherwise codes are two's complement
        bits: int = layout.bits if offset else layout.numbers.bits
        if not offset and bits == 8:
            return tensors["codes"].view(torch.int8 if layout.numbers.is_integer else torch.float8_e4m3fn)
        half = 2 ** (bits - 1)
        codes = unpack_codes(tensors["codes"], bits, layer.columns, torch.int16)
        signed: Tensor = (codes if offset else codes ^ half) - half
        return signed.to(torch.int8)

    return {
        "weight": weight,
        "weight_scale": lambda: tensors["scales"].float().expand(layer.rows, -1).contiguous(),
    }
