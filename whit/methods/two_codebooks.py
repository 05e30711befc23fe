"""Two codebooks {+-low, +-high} per row, and which of them each column uses: least weighted squared error by turns.

The best codebooks for given marks come from prefix sums over sorted magnitudes, which give every split exactly; the
best mark of a column is that of the codebook with less error. Equal magnitudes are taken in the order of their columns
on every CPU, so that sums over them do not depend on how a processor sorts.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from whit.kernels.cpu.compiling import runs_compiled, shared_out

MARK_ROUNDS = 3
INITIAL_SHARE = 0.1
SAMPLED_ROWS = 1024
SORTED_ROWS = 32
"""Rows that are sorted at once: few enough that they stay in a core's cache."""


def two_magnitudes(sorted_magnitude: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The exact optimum of weighted two-means per row: low, high (rows,).

    Splitting sorted magnitudes a_1 <= ... <= a_k after position t, the weighted squared error is a constant minus
    (sum_{i<=t} m_i a_i)^2 / sum_{i<=t} m_i + (the same for i > t); prefix sums give all t at once.

    Args:
        sorted_magnitude: float32 (rows, k), ascending per row.
        mass: non-negative weights (rows, k); entries of mass zero do not count.
    """
    if runs_compiled(mass) and sorted_magnitude.dtype == mass.dtype == torch.float32:
        return _compiled_two_magnitudes(sorted_magnitude, mass)
    mass_low = mass.cumsum(1)
    sum_low = (mass * sorted_magnitude).cumsum(1)
    mass_high = (mass_low[:, -1:] - mass_low).clamp(min=0)
    sum_high = (sum_low[:, -1:] - sum_low).clamp(min=0)
    tiny = 1e-6 * mass_low[:, -1:].clamp(min=1e-30)
    gain = sum_low.square() / mass_low.clamp(min=tiny) + sum_high.square() / mass_high.clamp(min=tiny)
    split = gain.argmax(1, keepdim=True)
    below, above = mass_low.gather(1, split), mass_high.gather(1, split)
    overall = sum_low[:, -1:] / mass_low[:, -1:].clamp(min=tiny)
    low = torch.where(below > tiny, sum_low.gather(1, split) / below.clamp(min=tiny), overall)
    high = torch.where(above > tiny, sum_high.gather(1, split) / above.clamp(min=tiny), overall)
    return torch.minimum(low, high).squeeze(1), torch.maximum(low, high).squeeze(1)


def _compiled_two_magnitudes(sorted_magnitude: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers in one pass over the rows."""
    from whit.kernels.cpu.two_means import ROWS_PER_TILE, split_rows

    low, high = torch.empty(len(mass)), torch.empty(len(mass))
    arrays = [item.contiguous().numpy() for item in (sorted_magnitude, mass)]
    shared_out(
        lambda first, last: split_rows(*arrays, low.numpy(), high.numpy(), first, last), len(mass), ROWS_PER_TILE
    )
    return low, high


def two_magnitudes_by_column(sorted_magnitude: Tensor, column: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """`two_magnitudes` of weights that columns have, not entries: mass (columns,), and the `column` of each entry."""
    if not (runs_compiled(mass) and sorted_magnitude.dtype == mass.dtype == torch.float32):
        return two_magnitudes(sorted_magnitude, mass[column])
    from whit.kernels.cpu.two_means import ROWS_PER_TILE, split_rows_by_column

    rows = len(sorted_magnitude)
    low, high = torch.empty(rows), torch.empty(rows)
    arrays = [item.contiguous().numpy() for item in (sorted_magnitude, column, mass, low, high)]
    shared_out(lambda first, last: split_rows_by_column(*arrays, first, last), rows, ROWS_PER_TILE)
    return low, high


def ascending(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of non-negative numbers in ascending order, and the column of each; equal ones in the order of columns.

    On a CPU a float32 number and its column are sorted as one integer, which is no slower than sorting numbers alone:
    numbers that are not negative are in the order of their bits.

    Args:
        magnitude: (rows, columns), without NaN.

    Returns:
        the same shape and dtype; and columns, int32 or int64.
    """
    if magnitude.device.type != "cpu" or magnitude.dtype != torch.float32:
        found = torch.sort(magnitude, dim=1, stable=magnitude.device.type == "cpu")
        return found.values, found.indices
    given = magnitude.contiguous().numpy().view(np.int32)
    ordered, column = torch.empty(given.shape), torch.empty(given.shape, dtype=torch.int32)
    numbers = np.arange(given.shape[1], dtype=np.int64)

    def part(first: int, last: int) -> None:
        for start in range(first, last, SORTED_ROWS):
            rows = slice(start, min(start + SORTED_ROWS, last))
            keys = given[rows].astype(np.int64)
            keys <<= 32
            keys |= numbers
            keys.sort(axis=1)
            halves = keys.view(np.int32).reshape(*keys.shape, 2)
            lower = 0 if sys.byteorder == "little" else 1
            column.numpy()[rows] = halves[:, :, lower]
            ordered.numpy().view(np.int32)[rows] = halves[:, :, 1 - lower]

    shared_out(part, len(given), SORTED_ROWS)
    return ordered, column


def choose_marks(weight: Tensor, importance: Tensor, rounds: int = MARK_ROUNDS) -> Tensor:
    """Which of two codebooks each column of a block uses, by turns of fitting codebooks and moving columns.

    Starts from the tenth of the columns that matter most. Wide weights are judged by an even sample of their rows.

    Args:
        weight: float32 (rows, columns).
        importance: 1/U_jj^2, (columns,).
        rounds: turns.

    Returns:
        bool (columns,).
    """
    stride = -(-weight.shape[0] // SAMPLED_ROWS)
    magnitude = weight[::stride].abs()
    marks = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    marks[torch.topk(importance, max(1, round(INITIAL_SHARE * weight.shape[1]))).indices] = True
    ordered, column = ascending(magnitude)
    for _ in range(rounds):
        errors = []
        for mask in (~marks, marks):
            low, high = two_magnitudes_by_column(ordered, column, importance * mask)
            errors.append(_squared_errors(magnitude, low, high).sum(0))
        marks = errors[1] < errors[0]
    return marks


def fit_codebooks(weight: Tensor, importance: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
    """Both codebooks of a block for given marks: low, high (2, rows)."""
    pairs = []
    for mask in (~marks, marks):
        magnitude, column = ascending(weight[:, mask].abs())
        if magnitude.shape[1]:
            pairs.append(two_magnitudes_by_column(magnitude, column, importance[mask]))
        else:
            pairs.append((torch.zeros_like(weight[:, 0]), torch.zeros_like(weight[:, 0])))
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])


def _squared_errors(magnitude: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Squared distance of each magnitude (rows, columns) from the nearer of its row's two (rows,)."""
    if not (runs_compiled(magnitude) and magnitude.dtype == torch.float32):
        nearest = torch.where(magnitude > (low + high)[:, None] / 2, high[:, None], low[:, None])
        return (magnitude - nearest) ** 2
    from whit.kernels.cpu.two_means import ROWS_PER_TILE, squared_error_rows

    out = torch.empty_like(magnitude)
    arrays = [item.contiguous().numpy() for item in (magnitude, low, high)] + [out.numpy()]
    shared_out(lambda first, last: squared_error_rows(*arrays, first, last), len(magnitude), ROWS_PER_TILE)
    return out
