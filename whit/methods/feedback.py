"""Sequential rounding with error feedback: the update of GPTQ, for any scalar quantiser of columns.

Columns are rounded left to right. With H^-1 = U^T U (U upper triangular), the error of a column that minimises
tr(D H D^T), D = W - Q, over the columns not yet rounded is passed on by

    e_j = (w_j - q_j) / U_jj,      w_k <- w_k - e_j U_jk  for k > j      (Frantar et al. 2022, equation 2 and step 3)

so the value of column j when its turn comes is w_j - sum_{i<j} e_i U_ij, and the final loss is
tr(D H D^T) = sum_j ||e_j||^2. Here the feedback is summed when a column is needed ("looking left") instead of updating
all later columns each time: the errors of finished blocks enter by one matrix product per block, those of the running
block by one matrix-vector product per column. On a GPU a finished block is passed on to all later columns at once
("looking right"): as much arithmetic, but in a product wide enough to occupy it. Everything is held transposed, so a
column is one contiguous row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.kernels.columns import attempted, writes_halves
from whit.kernels.split_product import Panel, SplitFactor
from whit.methods.rounders import BlockRounder, join_rounders

LAZY_BLOCK = 128

Rounder = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""(column index, its current values (rows,)) -> (codes (rows,), the values the codes stand for (rows,))."""

Fit = Callable[[int, Tensor], Rounder]
"""(first column of a group, current values (rows, k) of the group) -> how to round the group's columns."""


@dataclass(frozen=True)
class Rounded:
    """Codes uint8 (rows, columns), and the loss sum ||e_j||^2 = tr(D H D^T) per row, shape (rows,)."""

    codes: Tensor
    loss: Tensor


def column_importance(upper: Tensor, order: Tensor | None) -> Tensor:
    """What an error of each column costs when later columns absorb what they can: 1 / U_jj^2, by column of the weight.

    Args:
        upper: U of H^-1 = U^T U, (columns, columns), for the columns taken in `order`.
        order: permutation (columns,), or None where the columns are taken as they stand.
    """
    cost = torch.diagonal(upper).square().reciprocal()
    if order is None:
        return cost
    importance = torch.empty_like(cost)
    importance[order] = cost
    return importance


def round_with_feedback(
    weight: Tensor, upper: Tensor, group_size: int, fit: Fit, block_size: int = LAZY_BLOCK
) -> Rounded:
    """Round the columns of a weight one after the other, each absorbing the errors of those before it.

    Args:
        weight: (rows, columns), float32 (float64 works too); not modified.
        upper: U of H^-1 = U^T U, upper triangular (columns, columns).
        group_size: columns per call of `fit`, 0 for the whole row. `fit` sees the values as they are when the first
            column of its group is reached, that is, with the errors of all earlier columns fed back.
        fit: returns the quantiser of a group.
        block_size: columns between two matrix products; changes speed, not results (up to float rounding).
    """
    rows, columns = weight.shape
    group = group_size or columns
    transposed = weight.T.contiguous()
    errors = torch.empty_like(transposed)
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    diagonal: list[float] = []
    pending = _Pending(transposed, errors, upper)
    for first in range(0, columns, group):
        last = min(first + group, columns)
        group_values = pending.current(first, last)
        rounder = fit(first, group_values.T)
        for start in range(first, last, block_size):
            stop = min(start + block_size, last)
            block = pending.current(start, stop) if start > first else group_values[: stop - start]
            done = errors[start:stop]
            if isinstance(rounder, BlockRounder) and rounder.fast(weight):
                inner, halves = upper[start:stop, start:stop], pending.halves(start, stop)
                given = (start, block.contiguous(), inner, codes[start:stop], done, halves)
                if attempted(rounder.round_block, *given):
                    pending.finish(start, stop, halves is not None)
                    continue
            inner = upper[start:stop, start:stop].T.contiguous()
            diagonal = diagonal or torch.diagonal(upper).tolist()
            for j in range(stop - start):
                values = torch.addmv(block[j], done[:j].T, inner[j, :j], alpha=-1) if j else block[j]
                codes[start + j], rounded = rounder(start + j, values)
                torch.div(values - rounded, diagonal[start + j], out=done[j])
            pending.finish(start, stop)
    return Rounded(codes.T, errors.square().sum(0))


def round_in_order(
    weight: Tensor, upper: Tensor, order: Tensor, group_size: int, rounders: Sequence[Rounder]
) -> Rounded:
    """As `round_with_feedback`, but columns take their turn in another order, with quantisers made beforehand.

    Neighbours of a group are then not rounded together, so their quantiser cannot see the fed-back weights ("static
    groups"); in return groups, and all that is stored, stay in natural order and no permutation is stored.

    Args:
        weight: (rows, columns), in natural order.
        upper: U of the permuted H, that is, of H[order][:, order].
        order: permutation of the columns, first to be rounded first.
        group_size: columns per rounder, 0 for the whole row.
        rounders: one per group, in natural order.

    Returns:
        codes in natural order.
    """
    step = group_size or weight.shape[1]
    joined: Rounder | None = join_rounders(rounders, step, order)
    if joined is None:
        natural: list[int] = order.tolist()

        def joined(turn: int, values: Tensor) -> tuple[Tensor, Tensor]:
            return rounders[natural[turn] // step](natural[turn], values)

    permuted = round_with_feedback(weight[:, order], upper, 0, lambda first, values: joined)
    codes = torch.empty_like(permuted.codes)
    codes[:, order] = permuted.codes
    return Rounded(codes, permuted.loss)


class _Pending:
    """Values of the columns not yet rounded.

    Args:
        values: (columns, rows), not modified. errors: (columns, rows), filled block by block. upper: U.
    """

    def __init__(self, values: Tensor, errors: Tensor, upper: Tensor) -> None:
        self._values = values.clone() if values.is_cuda else values
        self._errors = errors
        self._upper = upper
        self._factor = SplitFactor(upper) if values.is_cuda else None
        self._panel: Panel | None = None  # of finished columns whose errors are known only to those within it

    def current(self, start: int, stop: int) -> Tensor:
        """Columns start..stop, as rows (stop - start, rows), after the feedback of all finished columns."""
        if self._factor is None:
            if start == 0:
                return self._values[start:stop]
            left = self._upper[:start, start:stop].T
            return torch.addmm(self._values[start:stop], left, self._errors[:start], alpha=-1)
        if self._panel is not None and stop > self._panel.stop:
            self._pass_on(start)
        if self._panel is None:
            self._panel = self._factor.panel(start, self._end(start), self._values.shape[1])
        if start == self._panel.start:
            return self._values[start:stop]
        return self._panel.taken_off(self._values[start:stop], slice(start, stop))

    def halves(self, start: int, stop: int) -> Tensor | None:
        """Where the kernels write the errors of these columns in bfloat16, or None."""
        if self._panel is None or not writes_halves(self._values.device):
            return None
        return self._panel.halves(start, stop)

    def finish(self, start: int, stop: int, written: bool = False) -> None:
        """The errors of columns start..stop, before which all are finished, are known (in `halves` too, or not)."""
        if self._panel is None:
            return
        if not written:
            self._panel.put(start, self._errors[start:stop])
        if stop == self._panel.stop:
            self._pass_on(stop)

    def _pass_on(self, stop: int) -> None:
        """Take the errors of the panel, which ends before column `stop` or there, off all columns from it on."""
        assert self._panel is not None
        if stop < len(self._values):
            self._panel.take_off(self._values[stop:], slice(stop, None))
        self._panel = None

    def _end(self, start: int) -> int:
        assert self._factor is not None
        return min(start + self._factor.panel_columns, len(self._values))
