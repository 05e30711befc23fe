"""Weighted k-means levels per row and block, rounded column by column with error feedback: the honest 2.5-bit baseline.

Each row of each block of columns gets 2**bits free levels. They minimise sum_j (w_j - level(w_j))^2 / U_jj^2 over the
block's current weights, with H^-1 = U^T U: 1/U_jj^2 is what rounding error costs in column j once the later columns
have compensated for it. Columns are then rounded in turn to the nearest level, with the feedback of GPTQ
(`whit.methods.feedback`). At 2 bits and blocks of 128 this stores 2 + 4*16/128 = 2.5 bits per weight: no more than a
binarisation with group flags and scalars, which is a choice of four levels as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.errors import ModelError
from whit.finite import all_finite
from whit.formats.level_table import LevelTable
from whit.kernels import lloyd
from whit.methods.base import Compressed, Method, knob, register_method
from whit.methods.feedback import Rounder, column_importance, round_in_order, round_with_feedback
from whit.methods.rounders import LevelRounder
from whit.methods.statistics import LayerStatistics, Statistic, dead_column_notes


@register_method
@dataclass(frozen=True)
class KMeans(Method):
    """Free levels from weighted one-dimensional k-means, then sequential rounding."""

    name: ClassVar[str] = "kmeans"
    summary: ClassVar[str] = "free levels per row and block by weighted k-means, rounded in turn with error feedback"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SECOND_MOMENT})

    bits: int = knob(2, "bits per code: 2**bits levels", minimum=1, maximum=3)
    block_size: int = knob(128, "columns that share a table of levels; 0 for the whole row", minimum=0)
    act_order: bool = knob(False, "round columns by descending diag(H); levels are then fitted beforehand")
    iterations: int = knob(20, "most Lloyd iterations per block", minimum=0, maximum=1000)
    damping: float = knob(0.01, "added to diag(H), relative to its mean", minimum=0, maximum=1)

    def format(self, rows: int, columns: int) -> LevelTable:
        """Level tables; a block wider than the row becomes the row."""
        return LevelTable(self.bits, self.block_size if 0 < self.block_size < columns else 0)

    def compress(self, weight: Tensor, statistics: LayerStatistics) -> Compressed:
        """Fit levels block by block and round with feedback; needs `statistics.second_moment`."""
        layout = self.format(*weight.shape)
        order = statistics.descending_order() if self.act_order else None
        factor = statistics.inverse_factor(self.damping, order)
        importance = column_importance(factor.upper, order)
        alive = weight.masked_fill(statistics.dead_columns(), 0)
        tables: list[Tensor] = []

        def fit(first: int, values: Tensor) -> Rounder:
            part = importance[first : first + values.shape[1]]
            tables.append(weighted_levels(values, part, 2**self.bits, self.iterations))
            return LevelRounder(tables[-1].T.contiguous().unsqueeze(0))

        if order is None:
            rounded = round_with_feedback(alive, factor.upper, layout.block_size, fit)
        else:
            step = layout.block_size or weight.shape[1]
            rounders = [fit(start, alive[:, start : start + step]) for start in range(0, weight.shape[1], step)]
            rounded = round_in_order(alive, factor.upper, order, layout.block_size, rounders)
        notes = (*factor.notes, *dead_column_notes(statistics))
        return Compressed(layout.pack(rounded.codes, torch.stack(tables, 1)), notes)


def weighted_levels(values: Tensor, importance: Tensor, count: int, iterations: int) -> Tensor:
    """Levels of a weighted one-dimensional k-means per row, by Lloyd's iteration from the weighted quantiles.

    Values are sorted once; each iteration then needs only the places of the midpoints between levels and differences
    of prefix sums. Clusters that become empty keep their level.

    Args:
        values: (rows, k).
        importance: positive weights of the columns, (k,).
        count: number of levels.
        iterations: most iterations; fewer if nothing moves any more.

    Returns:
        float32 (rows, count), ascending, exact in float16.

    Raises:
        ModelError: a level overflows float16.
    """
    ordered, order = values.contiguous().sort(dim=1)
    mass = (importance / importance.mean()).double()[order]
    moments = torch.nn.functional.pad(torch.stack([mass, mass * ordered]).cumsum(2), (1, 0))
    edges = torch.arange(count, dtype=torch.float64, device=values.device).add(0.5) / count
    starts = torch.searchsorted(moments[0, :, 1:].contiguous(), moments[0, :, -1:] * edges)
    levels = ordered.gather(1, starts.clamp(max=values.shape[1] - 1)).double()
    mean_mass = (importance / importance.mean()).double()
    if lloyd.available(values.device) and lloyd.lloyd(values, mean_mass, levels, iterations):
        iterations = 0
    ordered = ordered.double()
    for _ in range(iterations):
        cuts = torch.searchsorted(ordered, (levels[:, 1:] + levels[:, :-1]) / 2)
        places = torch.nn.functional.pad(cuts, (1, 0))
        places = torch.nn.functional.pad(places, (0, 1), value=values.shape[1])
        sums = moments.gather(2, places.expand(2, -1, -1)).diff(dim=2)
        moved = torch.where(sums[0] > 0, sums[1] / sums[0].clamp(min=1e-300), levels)
        if torch.equal(moved, levels):
            break
        levels = moved
    levels = levels.half().float()
    if not all_finite(levels):
        raise ModelError(f"a weight of magnitude {float(values.abs().max()):.3g} is beyond float16; rescale the model")
    return levels
