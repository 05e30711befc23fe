"""Codes of a number system (`whit.formats.minifloat`) with one scale per tensor, row, or row and column group.

    w = scale * number(code)

Stored bits per weight: the code (one byte for 8 bits, otherwise packed densely) plus 16/g for groups of g columns
(g: the whole row for group size 0), or 32 bits once for the tensor. Scales of 16 bits are bfloat16, not float16: the
scale of e5m2 numbers, absmax / 57344, is below what float16 can hold for any trained weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from whit.formats.base import Format, Packed, TensorSpec, register_format
from whit.formats.bits import pack_codes, packed_width, unpack_codes
from whit.formats.minifloat import NumberSystem, number_system

WHOLE_TENSOR = -1
"""Group size that stands for one scale for all weights."""


def split_groups(values: Tensor, group_size: int) -> Tensor:
    """(..., columns) -> (..., groups, group_size), the last group filled up with zeros; 0 takes the whole row."""
    size = group_size or max(values.shape[-1], 1)
    missing = -values.shape[-1] % size
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return padded.reshape(*values.shape[:-1], padded.shape[-1] // size, size)


def join_groups(grouped: Tensor, columns: int) -> Tensor:
    """Inverse of `split_groups`: (..., groups, size) -> (..., columns)."""
    return grouped.flatten(-2)[..., :columns]


@register_format
@dataclass(frozen=True)
class ScaledCodes(Format):
    """Numbers of `system`; `group_size` columns of a row share a scale (0: the whole row, -1: the whole tensor)."""

    name: ClassVar[str] = "scaled-codes"
    system: str
    group_size: int

    def __post_init__(self) -> None:
        _ = self.numbers
        if self.group_size < WHOLE_TENSOR:
            raise ValueError(f"group_size must be -1 (tensor), 0 (row) or positive, got {self.group_size}")

    @cached_property  # found already when the layout is made: nothing is left for torch.compile to trace
    def numbers(self) -> NumberSystem:
        """The number system."""
        return number_system(self.system)

    @property
    def scale_dtype(self) -> torch.dtype:
        """float32 for the one scale of a tensor, bfloat16 otherwise."""
        return torch.float32 if self.group_size == WHOLE_TENSOR else torch.bfloat16

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """(1, 1) for the whole tensor, else (rows, groups)."""
        if self.group_size == WHOLE_TENSOR:
            return (1, 1)
        return (rows, -(-columns // (self.group_size or columns)))

    def specs(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """codes uint8 (rows, columns), or (rows, packed) below 8 bits; scales as in `scale_shape`."""
        width = columns if self.numbers.bits == 8 else packed_width(columns, self.numbers.bits)
        return {
            "codes": TensorSpec((rows, width), torch.uint8),
            "scales": TensorSpec(self.scale_shape(rows, columns), self.scale_dtype),
        }

    def pack(self, weight: Tensor, scales: Tensor) -> Packed:
        """Round weight / scale to the nearest numbers and store their codes.

        Args:
            weight: float32 (rows, columns).
            scales: positive, of `scale_shape`; what is stored is their value in `scale_dtype`, used for rounding too.
        """
        rows, columns = weight.shape
        stored = scales.to(self.scale_dtype).contiguous()
        codes = self.numbers.encode(join_groups(self.divide(weight, stored.float()), columns))
        bits = self.numbers.bits
        packed = codes.contiguous() if bits == 8 else pack_codes(codes, bits)
        return Packed(self, rows, columns, {"codes": packed, "scales": stored})

    def divide(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Weight / scale in groups: (rows, groups, size), one group where a scale covers the row or more."""
        return split_groups(weight, max(self.group_size, 0)) / scales.unsqueeze(-1)

    def codes(self, tensors: Mapping[str, Tensor], columns: int) -> Tensor:
        """uint8 (rows, columns), one code each."""
        bits = self.numbers.bits
        return tensors["codes"] if bits == 8 else unpack_codes(tensors["codes"], bits, columns)

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """float32 (rows, columns) by the equation at the top of this file."""
        numbers = self.numbers.decode(self.codes(tensors, columns))
        scales = tensors["scales"].float()
        if scales.shape[1] == 1:
            return numbers.mul_(scales)
        return join_groups(split_groups(numbers, self.group_size).mul_(scales.unsqueeze(-1)), columns).contiguous()

    def unpack_rows(self, tensors: Mapping[str, Tensor], rows: int, columns: int, index: Tensor) -> Tensor:
        """Only the asked rows are decoded."""
        scales = tensors["scales"]
        part = {"codes": tensors["codes"][index], "scales": scales if len(scales) == 1 else scales[index]}
        return self.unpack(part, len(index), columns)
