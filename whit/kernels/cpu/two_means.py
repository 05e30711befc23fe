"""Weighted two-means of sorted rows in one pass, where torch writes a dozen tensors of their size."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np

from whit.kernels.cpu.compiling import compiled

ROWS_PER_TILE = 16


@compiled
def split_rows(magnitude, mass, low, high, first, last):
    """Rows `first` to `last` of `whit.methods.two_codebooks.two_magnitudes`, to the bit: prefix sums are added in
    double precision and rounded one by one, as `torch.cumsum` does on a CPU, and all else is single precision."""
    zero, least, share = np.float32(0), np.float32(1e-30), np.float32(1e-6)
    for row in range(first, last):
        whole_mass, whole_sum = 0.0, 0.0
        for j in range(magnitude.shape[1]):
            whole_mass += np.float64(mass[row, j])
            whole_sum += np.float64(mass[row, j] * magnitude[row, j])
        all_mass, all_sum = np.float32(whole_mass), np.float32(whole_sum)
        tiny = share * max(all_mass, least)
        most, mass_below, sum_below = np.float32(-1), zero, zero
        mass_so_far, sum_so_far = 0.0, 0.0
        for j in range(magnitude.shape[1]):
            mass_so_far += np.float64(mass[row, j])
            sum_so_far += np.float64(mass[row, j] * magnitude[row, j])
            below, total = np.float32(mass_so_far), np.float32(sum_so_far)
            above, rest = max(all_mass - below, zero), max(all_sum - total, zero)
            gain = total * total / max(below, tiny) + rest * rest / max(above, tiny)
            if gain > most:
                most, mass_below, sum_below = gain, below, total
        overall = all_sum / max(all_mass, tiny)
        above, rest = max(all_mass - mass_below, zero), max(all_sum - sum_below, zero)
        lower = sum_below / max(mass_below, tiny) if mass_below > tiny else overall
        upper = rest / max(above, tiny) if above > tiny else overall
        low[row], high[row] = min(lower, upper), max(lower, upper)


@compiled
def split_rows_by_column(magnitude, column, mass, low, high, first, last):
    """Rows `first` to `last`, the mass of an entry being that of its column."""
    masses = np.empty((1, magnitude.shape[1]), np.float32)
    for row in range(first, last):
        for j in range(magnitude.shape[1]):
            masses[0, j] = mass[column[row, j]]
        split_rows(magnitude[row : row + 1], masses, low[row : row + 1], high[row : row + 1], 0, 1)


@compiled
def squared_error_rows(magnitude, low, high, out, first, last):
    """Rows `first` to `last` of the squared distances from the nearer of two magnitudes."""
    for row in range(first, last):
        lower, upper = low[row], high[row]
        middle = (lower + upper) / np.float32(2)
        for j in range(magnitude.shape[1]):
            value = magnitude[row, j]
            distance = value - (upper if value > middle else lower)
            out[row, j] = distance * distance
