"""Magnitude pruning: the smallest weights go. The dull baseline of pruning; needs no calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from whit.methods.base import register_method
from whit.methods.pruning import ScorePruner
from whit.methods.statistics import LayerStatistics


@register_method
@dataclass(frozen=True)
class Magnitude(ScorePruner):
    """Score |w_ij|; without a pattern all weights of the matrix compete."""

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "prune the smallest weights; the dull baseline of pruning, no calibration"
    default_comparison: ClassVar[str] = "matrix"

    def score(self, weight: Tensor, statistics: LayerStatistics) -> Tensor:
        """|w_ij|; the statistics are not used."""
        return weight.abs()
