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
from whit.methods.rounders import GridRounder, LevelRounder
from whit.methods.statistics import LayerStatistics, Statistic, dead_column_notes


@register_method
@dataclass(frozen=True)
class GPTQ(Method):
    """Sequential rounding with error feedback through the inverse second moments of the inputs."""

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "integer grid, columns rounded in turn with error feedback (Frantar et al. 2022)"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SECOND_MOMENT})
    follows_pruning: ClassVar[bool] = True

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
            return grids[-1].rounder()

        if order is None:
            rounded = round_with_feedback(alive, factor.upper, layout.group_size, fit)
        else:
            step = layout.group_size or weight.shape[1]
            rounders = [fit(start, alive[:, start : start + step]) for start in range(0, weight.shape[1], step)]
            rounded = round_in_order(alive, factor.upper, order, layout.group_size, rounders)
        scales, zeros = torch.cat([grid.scale for grid in grids], 1), torch.cat([grid.zero for grid in grids], 1)
        notes = (*factor.notes, *dead_column_notes(statistics))
        return Compressed(layout.pack(rounded.codes, scales, zeros), notes)

    def compress_kept(self, weight: Tensor, kept: Tensor, statistics: LayerStatistics) -> Compressed:
        """Round the kept weights with feedback; pruned places stay zero and pass the error of that on.

        Groups are of the kept weights of a row side by side, so neighbours in a group lie in different columns from row
        to row; their grids are fitted beforehand on the pruned weights.
        """
        rows, count = len(weight), int(kept[0].sum())
        layout = self.format(rows, count)
        order = statistics.descending_order() if self.act_order else None
        factor = statistics.inverse_factor(self.damping, order)
        alive = weight.masked_fill(statistics.dead_columns(), 0)
        values = torch.masked_select(alive, kept).reshape(rows, count)
        step = layout.group_size or count
        parts = [values[:, start : start + step] for start in range(0, count, step)]
        grids = [fit_grid(part, self.bits, self.symmetric, self.clip_steps) for part in parts]
        scales, zeros = torch.cat([grid.scale for grid in grids], 1), torch.cat([grid.zero for grid in grids], 1)
        rounder = _round_kept(kept, step, self.bits, self.symmetric, scales, zeros)
        if order is None:
            rounded = round_with_feedback(alive, factor.upper, 0, lambda first, part: rounder)
        else:
            rounded = round_in_order(alive, factor.upper, order, 0, [rounder])
        codes = torch.masked_select(rounded.codes, kept).reshape(rows, count)
        return Compressed(layout.pack(codes, scales, zeros), (*factor.notes, *dead_column_notes(statistics)))


def _round_kept(kept: Tensor, step: int, bits: int, symmetric: bool, scales: Tensor, zeros: Tensor) -> Rounder:
    """Round a column where it is kept, on the grid of the group that it belongs to in each row; elsewhere to zero.

    Args:
        kept: bool (rows, columns), the same number in every row.
        step: kept weights per group. scales, zeros: of the groups, (rows, groups).
    """
    places = kept.cumsum(1).sub_(1).clamp_(min=0).div_(step, rounding_mode="floor")
    scale, zero = scales.gather(1, places) * kept, zeros.gather(1, places)
    number = torch.arange(kept.shape[1], dtype=torch.int32, device=kept.device)
    if symmetric and bits == 1:
        return LevelRounder(torch.stack([-scale.T, scale.T], 1), number)
    return GridRounder(torch.stack([scale.T, zero.T], 1), number, bits)
