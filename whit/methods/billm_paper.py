"""BiLLM as its paper describes it: no means, and both searches look at the weights, not at their saliency.

For a set of weights binarised by one sign plane, alpha = |w|_1 / n is optimal and leaves an error of
|w|_2^2 - |w|_1^2 / n per row (Huang et al. 2024, section 3). So every candidate of a search is ranked by the gain
sum over rows and sets of |w|_1^2 / n, which prefix sums give for all candidates at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.methods.billm_official import SALIENT_LIMIT, push_error
from whit.methods.billm_planes import BinaryPlanes

SPLIT_SHARES = 9


def search_salient_columns(block: Tensor, scores: Tensor, limit: int = SALIENT_LIMIT) -> Tensor:
    """The first k columns by score, k = 1 ... limit - 1, for which one sign plane on each side fits the block best.

    Args:
        block: float32 (rows, columns).
        scores: (columns,), larger is more salient.
        limit: number of candidate columns; clamped to the block's width.

    Returns:
        bool (columns,).
    """
    columns = block.shape[1]
    limit = min(limit, columns)
    salient = torch.zeros(columns, dtype=torch.bool, device=block.device)
    if limit < 2:
        return salient
    ranked = torch.topk(scores, limit).indices
    magnitude = block.abs()
    inside = magnitude[:, ranked[: limit - 1]].cumsum(1)
    outside = magnitude.sum(1, keepdim=True) - inside
    count = torch.arange(1, limit, device=block.device)
    gain = (inside.square() / count + outside.square() / (columns - count)).sum(0)
    salient[ranked[: int(gain.argmax()) + 1]] = True
    return salient


def search_split(block: Tensor, salient: Tensor) -> Tensor:
    """The split p among 0.1 ... 0.9 of max|w| for which {|w| <= p} and {|w| > p}, one sign plane each, fit best.

    Salient columns (bool (columns,)) take no part. Returns a scalar tensor.
    """
    rest = ~salient
    magnitude = block.abs() * rest
    shares = torch.arange(1, SPLIT_SHARES + 1, device=block.device) / (SPLIT_SHARES + 1)
    candidates = magnitude.max() * shares
    gains = []
    for split in candidates:
        sparse = magnitude > split
        count = sparse.sum(1)
        above = (magnitude * sparse).sum(1)
        below = magnitude.sum(1) - above
        others = rest.sum() - count
        gains.append((above.square() / count.clamp(min=1) + below.square() / others.clamp(min=1)).sum())
    return candidates[torch.stack(gains).argmax()]


def paper_billm(
    weight: Tensor,
    upper: Tensor,
    *,
    block_size: int = 128,
    salient_metric: str = "hessian",
    limit: int = SALIENT_LIMIT,
    compensate: bool = True,
) -> BinaryPlanes:
    """Binarise a weight matrix block by block: two magnitudes on ordinary columns, two sign planes on salient ones.

    Ordinary:  w = alpha_c * sign(w) or alpha_s * sign(w);  salient:  w = alpha_1 b_1 + alpha_2 b_2, the second plane
    and scale fitted to what the first leaves. Later blocks absorb the error as in `official_billm`; scalars are
    rounded to float16 first, so what is compensated is what is stored.

    Args:
        weight: float32 (rows, columns), dead columns zero. Not modified.
        upper: U with H^-1 = U^T U.
        block_size, salient_metric, limit, compensate: as in `official_billm`.
    """
    rows, columns = weight.shape
    current = weight.clone()
    blocks = -(-columns // block_size)
    salient = torch.zeros(columns, dtype=torch.bool, device=weight.device)
    signs = torch.zeros(rows, columns, dtype=torch.bool, device=weight.device)
    second = torch.zeros_like(signs)
    scalars = torch.zeros(rows, blocks, 4, device=weight.device)
    for number in range(blocks):
        start, end = number * block_size, min((number + 1) * block_size, columns)
        block = current[:, start:end]
        diagonal = torch.diagonal(upper)[start:end]
        scores = (block.square() / diagonal.square()).sum(0) if salient_metric == "hessian" else block.abs().sum(0)
        marks = search_salient_columns(block, scores, limit)
        sparse = (block.abs() > search_split(block, marks)) & ~marks
        first = block >= 0
        sign = first.float() * 2 - 1
        alpha_c = _mean_magnitude(block, ~sparse & ~marks)
        alpha_s = _mean_magnitude(block, sparse)
        alpha_1 = _mean_magnitude(block, marks.expand_as(block))
        residual = block - alpha_1 * sign
        alpha_2 = _mean_magnitude(residual, marks.expand_as(block))
        last = residual >= 0
        ordinary = torch.where(sparse, alpha_s, alpha_c) * sign
        quantised = torch.where(marks, alpha_1 * sign + alpha_2 * (last.float() * 2 - 1), ordinary)
        if compensate:
            push_error(current, (block - quantised) / diagonal, upper, start, end)
        salient[start:end] = marks
        signs[:, start:end] = first
        second[:, start:end] = torch.where(marks, last, sparse)
        scalars[:, number] = torch.cat([alpha_c, alpha_s, alpha_1, alpha_2], 1)
    return BinaryPlanes(salient, signs, second, scalars)


def _mean_magnitude(values: Tensor, mask: Tensor) -> Tensor:
    """Mean |value| over the mask per row, (rows, 1), rounded to float16; 0 where a row has no entry."""
    mean = (values.abs() * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return mean.half().float()
