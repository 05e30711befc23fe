"""Joint refinement after rounding: coordinate descent over codes and least squares of scalars, under the full H.

Both lower tr(D H D^T), D = W - Q, for any quantiser of columns. Everything is held transposed, so a column of the
weight is one contiguous row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from whit.kernels import columns as columns_kernel
from whit.kernels.split_product import SplitFactor, add_product
from whit.methods.feedback import Rounder
from whit.methods.rounders import LevelRounder

LAZY_COLUMNS = 128


def descend_columns(
    codes: Tensor,
    values: Tensor,
    gradient: Tensor,
    moment: Tensor,
    rounder: Rounder,
    factor: SplitFactor | None = None,
) -> None:
    """One pass of coordinate descent over all columns, in place: each code becomes the best one given all others.

    Row by row the loss is d^T H d with d = w - q. With g = H d, the minimum over q_j alone lies at q_j + g_j / H_jj,
    and the best code is the one nearest to it. The gradient is kept exact: within a block by looking back at the
    block's own changes, across blocks by one matrix product.

    Args:
        codes: uint8 (columns, rows).
        values: float32 (columns, rows), what the codes stand for.
        gradient: H (w - q), float32 (columns, rows).
        moment: H, float32 (columns, columns), positive diagonal.
        rounder: (column, targets (rows,)) -> codes and values nearest to them.
        factor: of `moment`, if it was prepared before.
    """
    factor = factor or SplitFactor(moment)
    diagonal: list[float] = []
    columns = len(values)
    for first in range(0, columns, factor.panel_columns):
        panel = factor.panel(first, min(first + factor.panel_columns, columns), values.shape[1])
        for start in range(panel.start, panel.stop, LAZY_COLUMNS):
            stop = min(start + LAZY_COLUMNS, panel.stop)
            inner, part = moment[start:stop, start:stop], slice(start, stop)
            slope = panel.taken_off(gradient[part], part) if start > first else gradient[part]
            change = torch.empty_like(values[part])
            if isinstance(rounder, LevelRounder) and rounder.fast(values):
                halves = panel.halves(start, stop) if columns_kernel.writes_halves(values.device) else None
                given = (start, values[part], slope, inner, codes[part], change, halves)
                if columns_kernel.attempted(rounder.descend_block, *given):
                    if halves is None:
                        panel.put(start, change)
                    continue
            diagonal = diagonal or torch.diagonal(moment).tolist()
            for j in range(stop - start):
                column = start + j
                here = slope[j]
                if j:
                    here = torch.addmv(here, change[:j].T, inner[j, :j], alpha=-1)
                best = torch.add(values[column], here, alpha=1 / diagonal[column])
                codes[column], rounded = rounder(column, best)
                torch.sub(rounded, values[column], out=change[j])
                values[column] = rounded
            panel.put(start, change)
        panel.take_off(gradient, slice(None))


class BlockFactors:
    """H prepared for products: whole, and between the columns of each block that shares scalars.

    Args:
        moment: H, float32 (columns, columns).
        book: codebook of each column, (columns,), number 2 * block + mark.

    Attributes:
        whole: H.
    """

    def __init__(self, moment: Tensor, book: Tensor) -> None:
        self.whole = SplitFactor(moment)
        self._moment = moment
        self._blocks = book // 2
        self._book = book
        self._parts: dict[tuple[int, int | None], SplitFactor] = {}

    def columns(self, block: int, mark: int | None = None) -> Tensor:
        """Columns of a block, or those of one mark."""
        chosen = self._blocks == block if mark is None else self._book == 2 * block + mark
        return torch.nonzero(chosen).squeeze(1)

    def of(self, block: int, mark: int | None = None) -> SplitFactor:
        """H between these columns; kept for the next time."""
        if (block, mark) not in self._parts:
            columns = self.columns(block, mark)
            whole = len(columns) == len(self._moment)
            self._parts[block, mark] = self.whole if whole else self.whole.part(columns)
        return self._parts[block, mark]

    def subtract(self, gradient: Tensor, block: int, change: Tensor) -> None:
        """gradient <- gradient - H[:, columns of the block] change, in place."""
        columns = self.columns(block)
        if len(columns) == len(self._moment):
            self.whole.subtract(gradient, change)
        else:
            add_product(gradient, self._moment[:, columns], change, -1)


def least_squares_step(patterns: Sequence[Tensor], gradient: Tensor, factor: SplitFactor) -> Tensor:
    """The change of scalars a that minimises the loss of each row when q = sum_i a_i pattern_i, all codes fixed.

    It solves (B^T H B) x = B^T H (w - q), B = the patterns of a row side by side.

    Args:
        patterns: p of (columns, rows), of signs and zeros.
        gradient: H (w - q), (columns, rows), of the same columns.
        factor: H of these columns.

    Returns:
        (rows, p).
    """
    right = torch.stack([(pattern * gradient).sum(0) for pattern in patterns], 1)
    normal = torch.zeros(*right.shape, len(patterns), dtype=right.dtype, device=right.device)
    for i, pattern in enumerate(patterns):
        product = factor.times(pattern)
        for j in range(i + 1):
            normal[:, i, j] = normal[:, j, i] = (patterns[j] * product).sum(0)
    return solve_least_squares(normal, right)


def solve_least_squares(normal: Tensor, right: Tensor) -> Tensor:
    """x of A x = b, with a little added to the diagonal of A: patterns that a row does not use stay where they are.

    Args:
        normal: A, (rows, p, p), modified. right: b, (rows, p).
    """
    diagonal = torch.diagonal(normal, dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + 1e-30
    step: Tensor = torch.linalg.solve_ex(normal, right).result  # a diagonal above zero: nothing need be checked
    return step
