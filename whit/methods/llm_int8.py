"""LLM.int8(): vector-wise INT8 products, and the few inputs that are too large for them multiplied in 16 bit.

Source: Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
arXiv 2208.07339. The equations, and all that happens at run time, are in `whit.formats.outlier_int8`. What is decided
here is which input columns are known to be outliers beforehand: those whose largest magnitude in calibration reaches
the threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.errors import KnobError, ModelError
from whit.finite import all_finite
from whit.formats.base import Packed
from whit.formats.outlier_int8 import GRANULARITIES, OUTLIERS, OutlierInt8, quantise
from whit.methods.base import Compressed, Method, knob, register_method
from whit.methods.statistics import LayerStatistics, Statistic


@register_method
@dataclass(frozen=True)
class LLMInt8(Method):
    """INT8 weights and inputs, with outlier inputs in 16 bit."""

    name: ClassVar[str] = "llm-int8"
    summary: ClassVar[str] = "8-bit weights and inputs, outlier inputs in 16 bit (Dettmers et al. 2022)"

    threshold: float = knob(6.0, "magnitude from which an input is an outlier; positive")
    outliers: str = knob(
        "dynamic",
        "outlier columns: found in every call, or frozen from calibration (static), or none",
        choices=OUTLIERS,
    )
    outlier_weights: str = knob(
        "cached",
        "weights of outlier columns: 16 bit for those seen in calibration (cached), or int8 (no calibration)",
        choices=("cached", "int8"),
    )
    max_outlier_share: float = knob(0.01, "most columns listed or cached, relative to all", minimum=0, maximum=1)
    granularity: str = knob(
        "vector", "constants: per token and weight row; per token (row); or one each (tensor)", choices=GRANULARITIES
    )
    compat: bool = knob(False, "round as bitsandbytes does; needs outlier_weights=int8")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold < math.inf:
            raise KnobError(
                f"knob 'threshold' of method {self.name!r} must be positive and finite, got {self.threshold!r}: for "
                "vector-wise INT8 without outlier columns use outliers=none"
            )
        if self.compat and self.outliers != "none" and (self.outliers, self.outlier_weights) != ("dynamic", "int8"):
            raise KnobError(
                f"knob 'compat' of method {self.name!r} means what bitsandbytes does, got "
                f"outliers={self.outliers!r} and outlier_weights={self.outlier_weights!r}: use outliers=dynamic and "
                "outlier_weights=int8"
            )

    def required(self) -> frozenset[Statistic]:
        """Ranges of the inputs, where columns are chosen beforehand; nothing otherwise."""
        return frozenset({Statistic.RANGE}) if self._lists_columns() else frozenset()

    def format(self, rows: int, columns: int) -> OutlierInt8:
        """The layout with as many listed columns as `max_outlier_share` allows: the result is at most that large."""
        return self._layout(self._most(columns), "float16") if self._lists_columns() else self._layout(0, "int8")

    def plan_note(self) -> str | None:
        """Planned sizes are upper bounds where calibration decides how many columns are listed."""
        if not self._lists_columns() or self.max_outlier_share == 0:
            return None
        return (
            f"{self.name}: how many outlier columns are stored is known after calibration; planned sizes hold the most "
            f"that max_outlier_share={self.max_outlier_share:g} allows"
        )

    def compress(self, weight: Tensor, statistics: LayerStatistics) -> Compressed:
        """Round the weight; list the outlier columns, if asked for, from `statistics.absolute_maximum`.

        In "static" mode the codes of columns with 16-bit weights are zero and do not count in a row's largest
        magnitude. Without calibration data "static" has nothing to freeze: that layer becomes "dynamic".

        Raises:
            ModelError: `compat`, and a weight beyond float16.
        """
        if self.compat:
            weight = weight.half().float()
            if not all_finite(weight):
                raise ModelError("a weight is beyond float16, through which compat=true passes it: use compat=false")
        if not self._lists_columns():
            return Compressed(_pack(self._layout(0, "int8"), weight, None))
        if statistics.absolute_maximum is None or statistics.tokens == 0:
            layout = OutlierInt8(float(self.threshold), "dynamic", granularity=self.granularity)
            notes = ("no calibration inputs: outlier columns are found in every call",)
            return Compressed(_pack(layout, weight, None), notes if self.outliers == "static" else ())
        columns = weight.shape[1]
        crossing = int((statistics.absolute_maximum >= self.threshold).sum())
        index = outlier_columns(statistics.absolute_maximum, self.threshold, self._most(columns))
        dtype = _exact_dtype(weight[:, index]) if self.outlier_weights == "cached" else "int8"
        return Compressed(
            _pack(self._layout(len(index), dtype), weight, index), (self._describe(crossing, len(index), columns),)
        )

    def _lists_columns(self) -> bool:
        return self.outliers == "static" or (self.outliers == "dynamic" and self.outlier_weights == "cached")

    def _most(self, columns: int) -> int:
        return math.ceil(self.max_outlier_share * columns)

    def _layout(self, listed: int, dtype: str) -> OutlierInt8:
        return OutlierInt8(
            threshold=float(self.threshold) if self.outliers == "dynamic" else 0.0,
            outliers=self.outliers,
            stored_columns=listed,
            stored_dtype=dtype if listed and self.outlier_weights == "cached" else "int8",
            granularity=self.granularity,
            compat=self.compat,
        )

    def _describe(self, crossing: int, listed: int, columns: int) -> str:
        """How many outlier columns there are, and which part of the multiply-adds is done in 16 bit."""
        if not crossing:
            return f"no input reaches {self.threshold:g} in calibration"
        capped = f" (max_outlier_share {self.max_outlier_share:g})" if listed < crossing else ""
        reach = (
            f"inputs that reach {self.threshold:g} in calibration: {crossing} of {columns} ({crossing / columns:.2%})"
        )
        if self.outliers == "static":
            return f"{reach}; outlier columns: {listed}{capped}, {listed / columns:.2%} of the multiply-adds in 16 bit"
        return (
            f"{reach}, at most that share of the multiply-adds in 16 bit; columns with 16-bit weights: {listed}{capped}"
        )


def outlier_columns(largest: Tensor, threshold: float, most: int) -> Tensor:
    """Columns whose largest magnitude (columns,) reaches the threshold: int64 indices, ascending.

    If there are more than `most`, those of the largest magnitude (of equal ones, the first).
    """
    order = torch.argsort(largest, descending=True, stable=True)[:most]
    return order[largest[order] >= threshold].sort().values


def _exact_dtype(values: Tensor) -> str:
    """The 16-bit dtype that holds weights: bfloat16 if that is exact or needed for the range, else float16."""
    exact = bool((values.bfloat16().float() == values).all())
    return "bfloat16" if exact or not all_finite(values.half()) else "float16"


def _pack(layout: OutlierInt8, weight: Tensor, index: Tensor | None) -> Packed:
    """Codes and constants of a float32 weight, and what is stored of the listed columns."""
    rows, columns = weight.shape
    tensors: dict[str, Tensor] = {}
    rounded = weight
    if index is not None and layout.stored_columns:
        tensors["outlier_index"] = index.int()
        if layout.stored_dtype != "int8":
            spec = layout.specs(rows, columns)["outlier_weight"]
            tensors["outlier_weight"] = weight[:, index].to(spec.dtype).contiguous()
            if layout.outliers == "static":
                rounded = weight.index_fill(1, index, 0)
    absmax = rounded.abs().amax(1)
    if layout.granularity != "vector":
        absmax = absmax.amax(0, keepdim=True)
    return Packed(layout, rows, columns, {"codes": quantise(rounded, absmax.unsqueeze(1)), "absmax": absmax} | tensors)
