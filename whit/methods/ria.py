"""RIA: relative importance of a weight in its row and column, times a power of the norm of its input.

Source: Zhang, Bai, Lin, Zhao, Hou, Cannistraci, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
Language Models", ICLR 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from whit.methods.base import knob, register_method
from whit.methods.pruning import ScorePruner
from whit.methods.scores import ria_score
from whit.methods.statistics import LayerStatistics, Statistic


@register_method
@dataclass(frozen=True)
class RIA(ScorePruner):
    """Score (|w_ij| / sum of its column + |w_ij| / sum of its row) ||x_j||_2^power."""

    name: ClassVar[str] = "ria"
    summary: ClassVar[str] = "prune by importance relative to row and column, and input norm (Zhang et al. 2024)"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SQUARE_SUMS})

    power: float = knob(0.5, "exponent of the input norm", minimum=0, maximum=4)

    def score(self, weight: Tensor, statistics: LayerStatistics) -> Tensor:
        """The relative importance with activations: float32 (rows, columns)."""
        return ria_score(weight, statistics.input_square_sums(), self.power)
