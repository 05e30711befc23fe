"""Plain floating-point values: what the kept weights of a pruned layer are when nothing else was done to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.errors import ModelError
from whit.finite import all_finite
from whit.formats.base import Format, Packed, TensorSpec, register_format

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@register_format
@dataclass(frozen=True)
class Dense(Format):
    """One value of `dtype` (float16, bfloat16 or float32) per weight."""

    name: ClassVar[str] = "dense"
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def specs(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """data (rows, columns) of the dtype."""
        return {"data": TensorSpec((rows, columns), DTYPES[self.dtype])}

    def pack(self, weight: Tensor) -> Packed:
        """Store a finite weight (rows, columns), rounded to the dtype.

        Raises:
            ModelError: a value overflows the dtype.
        """
        data = weight.to(DTYPES[self.dtype]).contiguous()
        if not all_finite(data):
            raise ModelError(
                f"a weight of magnitude {float(weight.abs().max()):.3g} is beyond {self.dtype}: choose another dtype"
            )
        return Packed(self, weight.shape[0], weight.shape[1], {"data": data})

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """float32 (rows, columns); exact."""
        return tensors["data"].float()

    def unpack_rows(self, tensors: Mapping[str, Tensor], rows: int, columns: int, index: Tensor) -> Tensor:
        """Only the asked rows are converted."""
        return tensors["data"][index].float()
