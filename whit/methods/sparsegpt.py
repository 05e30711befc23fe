"""SparseGPT: masks chosen block by block on weights that already hold the feedback of what was pruned before.

Source: Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023, arXiv
2301.00774. The update is `whit.methods.pruning_feedback`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.methods.base import knob, register_method
from whit.methods.masks import dropped
from whit.methods.pruning import Pruned, Pruner
from whit.methods.pruning_feedback import prune_with_feedback
from whit.methods.statistics import LayerStatistics, Statistic, dead_column_notes


@register_method
@dataclass(frozen=True)
class SparseGPT(Pruner):
    """Score w_ij^2 / U_jj^2 of the current weights, H^-1 = U^T U."""

    name: ClassVar[str] = "sparsegpt"
    summary: ClassVar[str] = "prune in turn with error feedback through second moments (Frantar & Alistarh 2023)"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SECOND_MOMENT})

    block_size: int | None = knob(
        None, "without a pattern: columns whose mask is chosen together; if not given: 128", minimum=1
    )
    comparison: str | None = knob(
        None,
        "without a pattern: which weights compete, all of a block or those of each row in it; if not given: block",
        choices=("block", "row"),
    )
    damping: float = knob(0.01, "added to diag(H), relative to its mean", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None:
            self._refuse("with a pattern", block_size=self.block_size, comparison=self.comparison)

    @property
    def same_in_each_row(self) -> bool:
        """With a pattern, or when the weights of a row compete among themselves."""
        return self.pattern is not None or self.comparison == "row"

    def kept_without_pattern(self, rows: int, columns: int) -> int:
        """All but floor(count sparsity) of every block, or of every row of every block."""
        whole, rest = divmod(columns, self._block)
        height = 1 if self.same_in_each_row else rows
        sizes = [height * self._block] * whole + [height * rest] * bool(rest)
        return sum(size - dropped(size, self.drop_share) for size in sizes)

    def prune(self, weight: Tensor, statistics: LayerStatistics) -> Pruned:
        """Prune in turn; needs `statistics.second_moment`. Inputs never active in calibration get zero weights."""
        factor = statistics.inverse_factor(self.damping)
        squares = torch.diagonal(factor.upper).square()

        def choose(first: int, values: Tensor) -> Tensor:
            return self.mask(values.square() / squares[first : first + values.shape[1]])

        step = self._block if self.groups is None else self.groups[1]
        fed = prune_with_feedback(weight.masked_fill(factor.dead, 0), factor.upper, step, choose)
        return Pruned(fed.weight, fed.kept, (*factor.notes, *dead_column_notes(statistics)))

    @property
    def _block(self) -> int:
        return 128 if self.block_size is None else self.block_size
