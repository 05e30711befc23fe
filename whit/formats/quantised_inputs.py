"""A packed weight whose layer also rounds its inputs to a number system: W8A8, W4A8 and the like.

    y = (s_x round(x / s_x)) W^T + b

computed in float32 and returned in the dtype of x, so that the layer means the same in every dtype the model runs in.
The scale s_x of the inputs is

    dynamic:  max |x| / maximum, of each token (group size 0) or of each token and group of channels
    static:   stored, float32: one for all tokens (group size 0) or one per group of channels; larger inputs saturate

The only thing stored besides the weight is the static scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from whit.formats.base import Format, Packed, TensorSpec, nested_specs, nested_tensors, register_format
from whit.formats.minifloat import NumberSystem, number_system
from whit.formats.scaled_codes import join_groups, split_groups


@register_format
@dataclass(frozen=True)
class QuantisedInputs(Format):
    """Inputs in `system`, weights in the layout `weight`.

    Attributes:
        weight: layout of the weight; one that leaves its inputs alone.
        system: number system of the inputs.
        static: whether their scale is stored, or taken from each token.
        group_size: channels that share a scale; 0 for all.
    """

    name: ClassVar[str] = "quantised-inputs"
    changes_inputs: ClassVar[bool] = True
    weight: Format
    system: str
    static: bool
    group_size: int = 0

    def __post_init__(self) -> None:
        _ = self.numbers
        if not isinstance(self.weight, Format) or self.weight.changes_inputs:
            raise ValueError(f"weight must be a layout that leaves its inputs alone, got {self.weight!r}")
        if self.group_size < 0:
            raise ValueError(f"group_size must be 0 (all channels) or positive, got {self.group_size}")

    @cached_property  # found already when the layout is made: nothing is left for torch.compile to trace
    def numbers(self) -> NumberSystem:
        """The number system of the inputs."""
        return number_system(self.system)

    def specs(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """The tensors of the weight, `weight_*`; if static, input_scales float32 (groups of channels,)."""
        out = nested_specs("weight", self.weight, rows, columns)
        if self.static:
            out["input_scales"] = TensorSpec((-(-columns // (self.group_size or columns)),), torch.float32)
        return out

    def pack(self, weight: Packed, input_scales: Tensor | None = None) -> Packed:
        """Wrap a packed weight; `input_scales` (groups,) positive, if static."""
        tensors = {f"weight_{key}": tensor for key, tensor in weight.tensors.items()}
        if self.static:
            if input_scales is None:
                raise ValueError("static input scales must be given")
            tensors["input_scales"] = input_scales.float().contiguous()
        return Packed(self, weight.rows, weight.columns, tensors)

    def inner(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Packed:
        """The packed weight (tensors shared)."""
        return nested_tensors("weight", self.weight, tensors, rows, columns)

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """The weight alone, float32 (rows, columns)."""
        return self.inner(tensors, rows, columns).unpack()

    def unpack_rows(self, tensors: Mapping[str, Tensor], rows: int, columns: int, index: Tensor) -> Tensor:
        """Rows of the weight; a look-up has no inputs to round."""
        inner = self.inner(tensors, rows, columns)
        return self.weight.unpack_rows(inner.tensors, rows, columns, index)

    def input_scales(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Positive float32 scales of inputs (..., columns): (groups,) if static, else (..., groups)."""
        if self.static:
            return tensors["input_scales"]
        scales = split_groups(inputs.float().abs(), self.group_size).amax(-1) / self.numbers.maximum
        return torch.where(scales == 0, torch.ones_like(scales), scales)  # NaN stays, and spreads over the token

    def round_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the product sees: float32 (..., columns).

        Gradients pass straight through where a value was in range and stop where it saturated.
        """
        scales = self.input_scales(inputs.detach(), tensors).unsqueeze(-1)
        grouped = split_groups(inputs.float(), self.group_size)
        rounded = self.numbers.round(grouped.detach() / scales) * scales
        if inputs.requires_grad and torch.is_grad_enabled():
            limit = self.numbers.maximum * scales
            passing = torch.minimum(torch.maximum(grouped, -limit), limit)
            rounded = passing + (rounded - passing).detach()
        return join_groups(rounded, inputs.shape[-1])

    def linear(
        self, inputs: Tensor, tensors: Mapping[str, Tensor], rows: int, columns: int, bias: Tensor | None = None
    ) -> Tensor:
        """(..., columns) -> (..., rows) by the equation at the top of this file."""
        inner = self.inner(tensors, rows, columns)
        rounded = self.round_inputs(self.weight.transform(inputs, inner.tensors), tensors)
        out = torch.nn.functional.linear(rounded, inner.unpack(), None if bias is None else bias.float())
        return out.to(inputs.dtype)
