"""Round-to-nearest: the dull baseline every other method must beat at equal stored bits. Needs no calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.formats.grouped_integer import GroupedInteger
from whit.methods.base import Compressed, Method, knob, register_method
from whit.methods.grid import fit_grid
from whit.methods.statistics import LayerStatistics


@register_method
@dataclass(frozen=True)
class RTN(Method):
    """Each weight goes to the nearest point of its group's integer grid (`whit.methods.grid.fit_grid`)."""

    name: ClassVar[str] = "rtn"
    summary: ClassVar[str] = "round to nearest on a grouped integer grid; the dull baseline, no calibration"
    follows_pruning: ClassVar[bool] = True

    bits: int = knob(4, "bits per code", minimum=1, maximum=8)
    group_size: int = knob(128, "columns that share a scale; 0 for the whole row", minimum=0)
    symmetric: bool = knob(False, "centre the grid on zero and store no zero points")
    clip_steps: int = knob(0, "range candidates tried per group; 0 keeps the full range", minimum=0, maximum=100)

    def format(self, rows: int, columns: int) -> GroupedInteger:
        """Grouped integers; a group wider than the row becomes the row."""
        group = self.group_size if 0 < self.group_size < columns else 0
        return GroupedInteger(self.bits, group, self.symmetric)

    def compress(self, weight: Tensor, statistics: LayerStatistics) -> Compressed:
        """Quantise group by group; the statistics are not used."""
        layout = self.format(*weight.shape)
        step = layout.group_size or weight.shape[1]
        codes, scales, zeros = [], [], []
        for start in range(0, weight.shape[1], step):
            part = weight[:, start : start + step]
            grid = fit_grid(part, self.bits, self.symmetric, self.clip_steps)
            codes.append(grid.encode(part))
            scales.append(grid.scale)
            zeros.append(grid.zero)
        return Compressed(layout.pack(torch.cat(codes, 1), torch.cat(scales, 1), torch.cat(zeros, 1)))

    def compress_kept(self, weight: Tensor, kept: Tensor, statistics: LayerStatistics) -> Compressed:
        """Quantise the kept weights of each row side by side: groups are of kept weights."""
        return self.compress(torch.masked_select(weight, kept).reshape(len(weight), -1), statistics)
