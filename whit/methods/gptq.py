"""GPTQ: round column by column on an integer grid, each column absorbing the errors of those before it.

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323. The update is `whit.methods.feedback`, the grid `whit.methods.grid`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.formats.grouped_integer import GroupedInteger
from whit.methods.base import Compressed, Method, knob, register_method
from whit.methods.feedback import Rounder, round_with_feedback
from whit.methods.grid import Grid, fit_grid
from whit.methods.statistics import LayerStatistics, Statistic, dead_column_notes


@register_method
@dataclass(frozen=True)
class GPTQ(Method):
    """Sequential rounding with error feedback through the inverse second moments of the inputs."""

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "integer grid, columns rounded in turn with error feedback (Frantar et al. 2022)"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SECOND_MOMENT})

    bits: int = knob(4, "bits per code", minimum=1, maximum=8)
    group_size: int = knob(128, "columns that share a scale; 0 for the whole row", minimum=0)
    symmetric: bool = knob(False, "centre the grid on zero and store no zero points")
    act_order: bool = knob(False, "round columns by descending diag(H); grids are then fitted before the loop")
    clip_steps: int = knob(0, "range candidates tried per group; 0 keeps the full range", minimum=0, maximum=100)
    damping: float = knob(0.01, "added to diag(H), relative to its mean", minimum=0, maximum=1)

    def format(self, rows: int, columns: int) -> GroupedInteger:
        """Grouped integers; a group wider than the row becomes the row."""
        group = self.group_size if 0 < self.group_size < columns else 0
        return GroupedInteger(self.bits, group, self.symmetric)

    def compress(self, weight: Tensor, statistics: LayerStatistics) -> Compressed:
        """Round with feedback; needs `statistics.second_moment`.

        Inputs that were always zero during calibration have their weights set to zero, as in the paper's code.
        """
        layout = self.format(*weight.shape)
        order = statistics.descending_order() if self.act_order else None
        factor = statistics.inverse_factor(self.damping, order)
        alive = weight.masked_fill(statistics.dead_columns(), 0)
        codes, grids = self._ordered(alive, factor.upper, layout.group_size, order)
        scales, zeros = torch.cat([grid.scale for grid in grids], 1), torch.cat([grid.zero for grid in grids], 1)
        notes = (*factor.notes, *dead_column_notes(statistics))
        return Compressed(layout.pack(codes, scales, zeros), notes)

    def _ordered(
        self, weight: Tensor, upper: Tensor, group_size: int, order: Tensor | None
    ) -> tuple[Tensor, list[Grid]]:
        """Codes in natural column order, and the grids of the natural groups.

        In natural order a grid is fitted when its group is reached, on weights that already hold the feedback. With an
        order, neighbours in a group are not rounded together, so grids are fitted on the original weights ("static
        groups"): storage keeps the natural order and no permutation is stored.
        """
        grids: list[Grid] = []
        if order is None:

            def fit(first: int, values: Tensor) -> Rounder:
                grids.append(fit_grid(values, self.bits, self.symmetric, self.clip_steps))
                return grids[-1].round_column

            return round_with_feedback(weight, upper, group_size, fit).codes, grids
        step = group_size or weight.shape[1]
        for start in range(0, weight.shape[1], step):
            part = weight[:, start : start + step]
            grids.append(fit_grid(part, self.bits, self.symmetric, self.clip_steps))
        natural = order.tolist()

        def round_static(column: int, values: Tensor) -> tuple[Tensor, Tensor]:
            return grids[natural[column] // step].round_column(column, values)

        permuted = round_with_feedback(weight[:, order], upper, 0, lambda first, values: round_static).codes
        codes = torch.empty_like(permuted)
        codes[:, order] = permuted
        return codes, grids
