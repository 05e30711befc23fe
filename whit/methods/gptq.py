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
from whit.methods.feedback import Rounder, round_in_order, round_with_feedback
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
    act_order: bool = knob(False, "round columns by descending diag(H); grids are then fitted beforehand")
    clip_steps: int = knob(0, "range candidates tried per group; 0 keeps the full range", minimum=0, maximum=100)
    damping: float = knob(0.01, "added to diag(H), relative to its mean", minimum=0, maximum=1)

    def format(self, rows: int, columns: int) -> GroupedInteger:
        """Grouped integers; a group wider than the row becomes the row."""
        group = self.group_size if 0 < self.group_size < columns else 0
        return GroupedInteger(self.bits, group, self.symmetric)

    def compress(self, weight: Tensor, statistics: LayerStatistics) -> Compressed:
        """Round with feedback; needs `statistics.second_moment`.

        Without `act_order` a group's grid is fitted when its first column is reached, on weights that hold the
        feedback so far; with it, beforehand (`round_in_order`). Inputs never active in calibration get zero weights.
        """
        layout = self.format(*weight.shape)
        order = statistics.descending_order() if self.act_order else None
        factor = statistics.inverse_factor(self.damping, order)
        alive = weight.masked_fill(statistics.dead_columns(), 0)
        grids: list[Grid] = []

        def fit(first: int, values: Tensor) -> Rounder:
            grids.append(fit_grid(values, self.bits, self.symmetric, self.clip_steps))
            return grids[-1].round_column

        if order is None:
            rounded = round_with_feedback(alive, factor.upper, layout.group_size, fit)
        else:
            step = layout.group_size or weight.shape[1]
            rounders = [fit(start, alive[:, start : start + step]) for start in range(0, weight.shape[1], step)]
            rounded = round_in_order(alive, factor.upper, order, layout.group_size, rounders)
        scales, zeros = torch.cat([grid.scale for grid in grids], 1), torch.cat([grid.zero for grid in grids], 1)
        notes = (*factor.notes, *dead_column_notes(statistics))
        return Compressed(layout.pack(rounded.codes, scales, zeros), notes)
