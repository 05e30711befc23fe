"""Wanda: prune by weight times norm of its input, row by row.

Source: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from whit.methods.base import register_method
from whit.methods.pruning import ScorePruner
from whit.methods.scores import wanda_score
from whit.methods.statistics import LayerStatistics, Statistic


@register_method
@dataclass(frozen=True)
class Wanda(ScorePruner):
    """Score |w_ij| ||x_j||_2."""

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "prune by |weight| times the norm of its input, row by row (Sun et al. 2023)"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SQUARE_SUMS})

    def score(self, weight: Tensor, statistics: LayerStatistics) -> Tensor:
        """|w_ij| sqrt(1/N sum x_j^2), N sequences (section 3 of the paper): float32 (rows, columns)."""
        return wanda_score(weight, statistics.input_square_sums())
