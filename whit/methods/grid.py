"""The integer grid shared by round-to-nearest and GPTQ: scales and zero points of column groups, codes and values.

Scales are rounded to float16 before anything is quantised with them, so what is computed is what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from whit.errors import ModelError
from whit.finite import all_finite
from whit.methods.rounders import BlockRounder, GridRounder, LevelRounder


@dataclass(frozen=True)
class Grid:
    """Scale and zero point per row, float32 (rows, 1) holding float16-exact scales and whole zeros."""

    bits: int
    symmetric: bool
    scale: Tensor
    zero: Tensor

    def encode(self, values: Tensor) -> Tensor:
        """Nearest codes in [0, 2**bits) of values (rows, k), as float32."""
        if self.symmetric and self.bits == 1:
            return (values >= 0).float()
        return (values / self._divisor).round_().add_(self.zero).clamp_(0, 2**self.bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of codes (rows, k)."""
        if self.symmetric and self.bits == 1:
            return (2 * codes - 1) * self.scale
        return (codes - self.zero).mul_(self.scale)

    def rounder(self) -> BlockRounder:
        """Rounds columns of the group, whichever: they share the grid."""
        if self.symmetric and self.bits == 1:
            return LevelRounder(torch.cat([-self.scale, self.scale], 1).T.contiguous().unsqueeze(0))
        return GridRounder(torch.cat([self.scale, self.zero], 1).T.contiguous().unsqueeze(0), bits=self.bits)

    @cached_property
    def _divisor(self) -> Tensor:
        """The scale, or 1 for rows of zeros (whose every code means zero)."""
        return torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale)


def fit_grid(values: Tensor, bits: int, symmetric: bool, clip_steps: int = 0) -> Grid:
    """The grid of one column group.

    asymmetric: scale = (max(x, 0) - min(x, 0)) / (2**bits - 1), zero = round(-min / scale);
    symmetric: scale = max|x| / (2**(bits-1) - 0.5), codes centred on 2**(bits-1); 1 bit: scale = mean|x|, signs.

    Args:
        values: float32 (rows, group).
        clip_steps: if positive, also try `clip_steps` ranges shrunk evenly down to half and keep, per row, the one of
            least squared error.

    Raises:
        ModelError: a scale overflows float16.
    """
    low, high = values.amin(1, keepdim=True).clamp(max=0), values.amax(1, keepdim=True).clamp(min=0)
    best = _grid_of_range(values, low, high, bits, symmetric)
    if clip_steps and not (symmetric and bits == 1):
        best_error = (best.decode(best.encode(values)) - values).square().sum(1, keepdim=True)
        for step in range(1, clip_steps + 1):
            shrink = 1 - 0.5 * step / clip_steps
            trial = _grid_of_range(values, low * shrink, high * shrink, bits, symmetric)
            error = (trial.decode(trial.encode(values)) - values).square().sum(1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = Grid(
                bits,
                symmetric,
                torch.where(better, trial.scale, best.scale),
                torch.where(better, trial.zero, best.zero),
            )
    if not all_finite(best.scale):
        raise ModelError(
            f"a weight of magnitude {float(values.abs().max()):.3g} needs a scale beyond float16; rescale the model"
        )
    return best


def _grid_of_range(values: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Grid:
    if symmetric:
        if bits == 1:
            scale = values.abs().mean(1, keepdim=True)
            return Grid(bits, True, scale.half().float(), torch.zeros_like(scale))
        scale = torch.maximum(-low, high) / (2 ** (bits - 1) - 0.5)
        return Grid(bits, True, scale.half().float(), torch.full_like(scale, 2 ** (bits - 1)))
    grid = Grid(bits, False, ((high - low) / (2**bits - 1)).half().float(), torch.zeros_like(low))
    return replace(grid, zero=grid.encode(-low))
