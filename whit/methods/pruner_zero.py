"""Pruner-Zero's metric: squared weight times min-max scaled gradient, found by genetic programming.

Source: Dong, Li, Tang, Liu, Pan, Wang, Chu, "Pruner-Zero: Evolving Symbolic Pruning Metric from Scratch for Large
Language Models", ICML 2024, arXiv 2406.02924; the formula is the tree that its authors distribute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from whit.methods.base import register_method
from whit.methods.pruning import Pruned, ScorePruner
from whit.methods.scores import pruner_zero_score
from whit.methods.statistics import LayerStatistics, Statistic

BLIND = "no gradient: pruned by magnitude"


@register_method
@dataclass(frozen=True)
class PrunerZero(ScorePruner):
    """Score w_ij^2 (G_ij - min G) / (max G - min G)."""

    name: ClassVar[str] = "pruner-zero"
    summary: ClassVar[str] = "prune by squared weight times scaled gradient of the loss (Dong et al. 2024)"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.GRADIENT})

    def prune(self, weight: Tensor, statistics: LayerStatistics) -> Pruned:
        """As of every method that scores; a layer that no input reaches is pruned by magnitude, and a note says so."""
        pruned = super().prune(weight, statistics)
        return replace(pruned, notes=(*pruned.notes, BLIND)) if _unreached(statistics) else pruned

    def score(self, weight: Tensor, statistics: LayerStatistics) -> Tensor:
        """The metric with `statistics.gradient`: float32 (rows, columns).

        Where no input is known the gradient is taken to be the same for every weight, which leaves the magnitude.

        Raises:
            ModelError: inputs but no gradient, or it is not finite, all zero or the same for every weight.
        """
        return weight.abs() if _unreached(statistics) else pruner_zero_score(weight, statistics.gradient)


def _unreached(statistics: LayerStatistics) -> bool:
    return statistics.gradient is None and statistics.tokens == 0
