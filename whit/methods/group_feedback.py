"""Vector quantisation with error feedback: groups of columns rounded together, each absorbing the errors before it.

For a group B of columns, D_B = W_B - Q_B and H^-1 = U^T U, the exact form of GPTQ's update is

    E_B = D_B U_BB^-1,      W_later <- W_later - E_B U_B,later,      tr(D H D^T) = sum_B ||E_B||^2

(for one column: `whit.methods.feedback`), so the best codeword is the nearest in the metric ||. U_BB^-1||. Afterwards
`descend_groups` chooses every code anew given all others. Groups are contiguous in the order of the given matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from whit.kernels.groups import MOST_GROUPS, Words, attempted, available
from whit.kernels.split_product import add_product, product
from whit.methods.codebook_learning import nearest_words

# Groups between two products with all earlier or later columns; changes speed, not results (up to float rounding).
LAZY_GROUPS = MOST_GROUPS


@dataclass(frozen=True)
class GroupOrder:
    """Groups of `width` neighbouring columns, loudest first.

    Attributes:
        columns: permutation of the columns (m,), those of a group together and in natural order.
        groups: natural number of each group, in order, (groups,).
        bounds: (start, stop) of each group in the permuted columns.
    """

    columns: Tensor
    groups: Tensor
    bounds: tuple[tuple[int, int], ...]

    @cached_property
    def edges(self) -> Tensor:
        """First column of each group, and the end: int32 (groups + 1,)."""
        edges = [start for start, _ in self.bounds] + [self.bounds[-1][1]]
        return torch.tensor(edges, dtype=torch.int32, device=self.columns.device)

    def places(self, width: int) -> tuple[Tensor, Tensor]:
        """Columns of each group, int64 (groups, width), and which of them are its own; the others are its last one."""
        places = self.edges[:-1].long().unsqueeze(1) + torch.arange(width, device=self.columns.device)
        stops = self.edges[1:].long().unsqueeze(1)
        return torch.minimum(places, stops - 1), places < stops


def loudest_first(loudness: Tensor, width: int) -> GroupOrder:
    """Order groups by descending mean of `loudness` (m,), diag(H); ties in natural order."""
    columns = len(loudness)
    number = torch.arange(columns, device=loudness.device) // width
    count = torch.bincount(number)
    mean = torch.zeros(len(count), dtype=torch.float64).index_add_(0, number.cpu(), loudness.double().cpu())
    groups = torch.argsort(mean / count.cpu(), descending=True, stable=True)
    places = [torch.arange(g * width, min((g + 1) * width, columns)) for g in groups.tolist()]
    stops = torch.tensor([len(part) for part in places]).cumsum(0).tolist()
    bounds = tuple(zip([0, *stops[:-1]], stops, strict=True))
    return GroupOrder(torch.cat(places).to(loudness.device), groups.to(loudness.device), bounds)


def stacked(weight: Tensor, order: GroupOrder, width: int) -> Tensor:
    """The groups of a permuted weight (rows, columns) on top of each other: (groups, rows, width), zeros where a group
    is narrower."""
    places, inside = order.places(width)
    return (weight[:, places] * inside).transpose(0, 1).contiguous()


def metrics(upper: Tensor, order: GroupOrder, width: int) -> Tensor:
    """T = U_BB^-1 of each group: (groups, width, width), zeros where a group is narrower."""
    blocks, inside = diagonal_blocks(upper, order, width)
    identity = torch.eye(width, dtype=torch.float64, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(blocks.double(), identity.expand_as(blocks), upper=True)
    return inverse.float() * inside


def diagonal_blocks(matrix: Tensor, order: GroupOrder, width: int) -> tuple[Tensor, Tensor]:
    """The part of a matrix (columns, columns) between the columns of each group, (groups, width, width), continued by
    the identity where a group is narrower; and where it is the matrix, of the same shape."""
    places, there = order.places(width)
    inside = there.unsqueeze(2) & there.unsqueeze(1)
    identity = torch.eye(width, dtype=matrix.dtype, device=matrix.device)
    return torch.where(inside, matrix[places.unsqueeze(2), places.unsqueeze(1)], identity), inside


def decode(codes: Tensor, scales: Tensor, words: Tensor, order: GroupOrder) -> Tensor:
    """Values (rows, columns) in order, of codes (rows, groups) in order."""
    _, inside = order.places(words.shape[1])
    whole = torch.cat([words, -words])[codes].flatten(1)
    if whole.shape[1] > len(order.columns):
        whole = whole[:, torch.nonzero(inside.flatten()).squeeze(1)]
    return whole * scales.unsqueeze(1)


def round_groups(
    weight: Tensor, upper: Tensor, order: GroupOrder, metric: Tensor, scales: Tensor, words: Tensor
) -> tuple[Tensor, Tensor]:
    """Round group after group with feedback.

    Args:
        weight: (rows, columns), permuted by `order.columns`; not modified.
        upper: U of the permuted H.
        metric: `metrics(upper, order, d)`.
        scales: (rows,).
        words: (K/2, d).

    Returns:
        codes int64 (rows, groups), and every group's values when its turn came, (rows, columns), both in order.
    """
    errors, current = (weight.new_empty(weight.shape) for _ in range(2))
    codes = torch.empty(weight.shape[0], len(order.bounds), dtype=torch.int64, device=weight.device)
    signed = torch.cat([words, -words])
    fast = Words(words, scales, metric, order.edges) if available(weight.device, words.shape[1]) else None
    for first, block in _blocks(order.bounds):
        begin, end = block[0][0], block[-1][1]
        values = torch.addmm(weight[:, begin:end], errors[:, :begin], upper[:begin, begin:end], alpha=-1)
        if fast is not None:
            here, mine = slice(begin, end), codes[:, first : first + len(block)]
            given = (values, values, upper[here, here], mine, errors[:, here], current[:, here])
            if attempted(fast.take, first, len(block), *given):
                continue
        for group, (start, stop) in enumerate(block, first):
            near = slice(start - begin, stop - begin)
            width = stop - start
            value = values[:, near] - errors[:, begin:start] @ upper[begin:start, start:stop]
            current[:, start:stop] = value
            inner = metric[group, :width, :width]
            codes[:, group] = nearest_words(value, scales, words[:, :width], inner)
            errors[:, start:stop] = (value - scales.unsqueeze(1) * signed[codes[:, group], :width]) @ inner
    return codes, current


def descend_groups(
    codes: Tensor,
    values: Tensor,
    gradient: Tensor,
    moment: Tensor,
    order: GroupOrder,
    scales: Tensor,
    words: Tensor,
) -> None:
    """One pass of coordinate descent over all groups, in place: each code becomes the best one given all others.

    With G = (W - Q) H and all else fixed, the loss of a group is a constant plus ||(t - q) L||^2, t = q_old + G_B
    H_BB^-1, H_BB = L L^T. So no pass can raise tr(D H D^T).

    Args:
        codes: (rows, groups), in order.
        values: Q, (rows, columns), in order.
        gradient: (W - Q) H, (rows, columns).
        moment: H, permuted, positive definite.
        scales, words: as in `round_groups`.
    """
    signed = torch.cat([words, -words])
    fast = _for_descent(moment, order, scales, words) if available(moment.device, words.shape[1]) else None
    for first, block in _blocks(order.bounds):
        begin, end = block[0][0], block[-1][1]
        old = values[:, begin:end].clone()
        if fast is not None:
            here, mine, change = slice(begin, end), codes[:, first : first + len(block)], torch.empty_like(old)
            given = (old, gradient[:, here], moment[here, here], mine, change, values[:, here])
            if attempted(fast.take, first, len(block), *given):
                add_product(gradient, change, moment[begin:end], -1)
                continue
        for group, (start, stop) in enumerate(block, first):
            width = stop - start
            change = values[:, begin:start] - old[:, : start - begin]
            slope = gradient[:, start:stop] - change @ moment[begin:start, start:stop]
            lower = torch.linalg.cholesky(moment[start:stop, start:stop])
            target = values[:, start:stop] + torch.cholesky_solve(slope.T, lower).T
            codes[:, group] = nearest_words(target, scales, words[:, :width], lower)
            values[:, start:stop] = scales.unsqueeze(1) * signed[codes[:, group], :width]
        gradient -= (values[:, begin:end] - old) @ moment[begin:end]


def _for_descent(moment: Tensor, order: GroupOrder, scales: Tensor, words: Tensor) -> Words:
    """The codebook in the metric of the groups' blocks of H."""
    blocks, inside = diagonal_blocks(moment, order, words.shape[1])
    lower = torch.linalg.cholesky_ex(blocks).L  # of a positive definite matrix's blocks: nothing need be checked
    inverse = torch.cholesky_inverse(lower) * inside
    return Words(words, scales, lower * inside, order.edges, inverse)


def refit_scales(weight: Tensor, values: Tensor, moment: Tensor, scales: Tensor) -> Tensor:
    """The scale of each row that minimises (w - q) H (w - q)^T for its codes: a (w H q^T) / (q H q^T).

    Rows for which that is not positive keep their scale. All in order; returns (rows,).
    """
    found = product(values, moment)
    above, below = (weight * found).sum(1), (values * found).sum(1)
    sound = (above > 0) & (below > 0)
    return torch.where(sound, scales * above / below.clamp(min=1e-30), scales)


def _blocks(bounds: Sequence[tuple[int, int]]) -> list[tuple[int, Sequence[tuple[int, int]]]]:
    return [(first, bounds[first : first + LAZY_GROUPS]) for first in range(0, len(bounds), LAZY_GROUPS)]
