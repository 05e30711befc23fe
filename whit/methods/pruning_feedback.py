"""Sequential pruning with error feedback: the update of SparseGPT, for masks chosen on the way or known beforehand.

Source: Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023, arXiv
2301.00774. Columns take their turn from left to right; with H^-1 = U^T U a column's pruned weights leave the error
e_j = (w_j - q_j) / U_jj, q_j = w_j where kept and 0 elsewhere, and later columns change by w_k <- w_k - e_j U_jk. As in
`whit.methods.feedback` the errors of earlier columns are summed when a column is needed, and everything is held
transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.methods.feedback import LAZY_BLOCK

Choose = Callable[[int, Tensor], Tensor]
"""(first column of a step, current values (rows, step)) -> bool (rows, step), true where kept."""


@dataclass(frozen=True)
class FedBack:
    """Pruned and updated weight, its mask, and the loss sum ||e_j||^2 = tr(D H D^T) per row (rows,)."""

    weight: Tensor
    kept: Tensor
    loss: Tensor


def prune_with_feedback(weight: Tensor, upper: Tensor, step: int, choose: Choose) -> FedBack:
    """Prune the columns of a weight in turn, the kept ones absorbing the errors of those before them.

    Args:
        weight: (rows, columns); not modified.
        upper: U of H^-1 = U^T U, upper triangular (columns, columns).
        step: columns whose mask is chosen together, when the first of them is reached.
        choose: sees the step's values with the errors of all earlier columns fed back. A partial last step is shorter.
    """
    transposed = weight.T.contiguous()
    columns = len(transposed)
    out, errors = torch.empty_like(transposed), torch.empty_like(transposed)
    kept = torch.empty(transposed.shape, dtype=torch.bool, device=weight.device)
    diagonal = torch.diagonal(upper).tolist()
    span = step * max(1, LAZY_BLOCK // step)  # one product with all earlier errors for so many columns
    for start in range(0, columns, span):
        stop = min(start + span, columns)
        block = transposed[start:stop]
        if start:
            block = torch.addmm(block, upper[:start, start:stop].T, errors[:start], alpha=-1)
        inner = upper[start:stop, start:stop].T.contiguous()
        done = errors[start:stop]
        for first in range(0, stop - start, step):
            last = min(first + step, stop - start)
            values = block[first:last]
            if first:
                values = torch.addmm(values, inner[first:last, :first], done[:first], alpha=-1)
            mask = choose(start + first, values.T).T
            kept[start + first : start + last] = mask
            for j in range(first, last):
                column = block[j]
                if j:
                    column = torch.addmv(column, done[:j].T, inner[j, :j], alpha=-1)
                place = start + j
                torch.mul(column, mask[j - first], out=out[place])
                torch.div(column - out[place], diagonal[place], out=done[j])
    return FedBack(out.T.contiguous(), kept.T.contiguous(), errors.square().sum(0))
