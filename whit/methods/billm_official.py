"""BiLLM exactly as its released code computes it (Huang et al. 2024, arXiv 2402.04291), bit for bit in float32 on CPU.

Written from the description of the algorithm and checked against the released code; nothing else in whit should copy
its choices, several of which are traps (see docs/methods/billm.md). Most notable: the masks are searched on the
saliency matrix S = w^2 / U_jj^2 and not on the weights, and a block is never updated while it is quantised.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from whit.methods.billm_screening import promising_counts, promising_splits

SALIENT_LIMIT = 50
SPLIT_QUANTILES = 81


@dataclass(frozen=True)
class Order:
    """Scalars and signs of one order of the residual binariser: float32 (rows, 1), (rows, 1) and (rows, columns)."""

    mean: Tensor
    scale: Tensor
    sign: Tensor


@dataclass(frozen=True)
class BlockMasks:
    """Boolean (rows, columns) masks that partition a block: concentrated, sparse, salient (whole columns)."""

    concentrated: Tensor
    sparse: Tensor
    salient: Tensor


@dataclass(frozen=True)
class OfficialResult:
    """What the released code computes for one weight matrix.

    Attributes:
        quantised: float32 (rows, columns), scalars not rounded.
        salient: bool (columns,).
        sparse: bool (rows, columns), False on salient columns.
        first, second: bool (rows, columns) sign planes, True for +1 (a sign of exactly zero counts as +1); `second`
            is meaningful on salient columns only.
        scalars: float32 (rows, blocks, 7): mean and scale of concentrated, mean and scale of sparse, then of the
            salient columns the merged mean and both scales.
        error: sum of (w - q)^2 / U_jj^2, halved: what the released code prints.
    """

    quantised: Tensor
    salient: Tensor
    sparse: Tensor
    first: Tensor
    second: Tensor
    scalars: Tensor
    error: float


def residual_binarise(x: Tensor, mask: Tensor, order: int) -> tuple[Tensor, list[Order]]:
    """Residual binariser R_k: per row, k times on what is left of the masked entries,

        mean = average(r),  scale = average |r - mean|,  approximation += mean + scale * sign(r - mean).

    Args:
        x: float32 (rows, columns).
        mask: bool (rows, columns); rows with no entry give zeros.
        order: k, at least 1.

    Returns:
        the approximation, zero outside the mask, and each order's scalars and signs (sign(0) = 0).
    """
    count = mask.sum(1, keepdim=True).clamp(min=1)
    target = x * mask
    approximation = torch.zeros_like(target)
    orders = []
    for _ in range(order):
        residual = target - approximation
        mean = residual.sum(1, keepdim=True) / count
        centred = residual - mean
        scale = (centred.abs() * mask).sum(1, keepdim=True) / count
        sign = torch.sign(centred)
        approximation = approximation + (sign * scale + mean) * mask
        orders.append(Order(mean, scale, sign))
    return approximation, orders


def search_salient_columns(saliency: Tensor, limit: int = SALIENT_LIMIT) -> Tensor:
    """Salient columns of a block: the first k in the order of column sums of |S|, k = 1 ... limit - 1, of least error.

    error(k) = mean (S - R_2(S, top k) - R_2(S, others))^2; the first k wins ties.

    Args:
        saliency: float32 (rows, columns).
        limit: number of candidate columns; clamped to the block's width.

    Returns:
        bool (columns,).
    """
    columns = saliency.shape[1]
    limit = min(limit, columns)
    scores = saliency.abs().sum(0)
    ranked = torch.topk(scores, limit).indices
    best_error, best = float("inf"), 1
    for count in promising_counts(saliency, ranked) if limit > 1 else []:
        mask = torch.zeros_like(saliency, dtype=torch.bool)
        mask[:, ranked[:count]] = True
        inside, _ = residual_binarise(saliency, mask, 2)
        outside, _ = residual_binarise(saliency, ~mask, 2)
        error = float(((saliency - (outside + inside)) ** 2).mean())
        if error < best_error:
            best_error, best = error, count
    salient = torch.zeros(columns, dtype=torch.bool, device=saliency.device)
    if columns > 1:
        salient[torch.topk(scores, best).indices] = True
    return salient


def split_candidates(magnitude: Tensor) -> Tensor:
    """The 81 quantiles 0.10 ... 0.90 of all entries of `magnitude`: float32 (81,). numpy's linear interpolation."""
    grid = torch.linspace(0.10, 0.90, SPLIT_QUANTILES).numpy()
    values = np.quantile(magnitude.reshape(-1).cpu().numpy(), q=grid)
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(magnitude.device)


def masks_at(saliency: Tensor, salient: Tensor, split: Tensor) -> BlockMasks:
    """Concentrated {|S| < split}, sparse {|S| >= split}, both without the salient columns (columns,)."""
    rest = ~salient.expand_as(saliency)
    magnitude = (saliency * rest).abs()
    return BlockMasks((magnitude < split) & rest, (magnitude >= split) & rest, ~rest)


def search_split(saliency: Tensor, salient: Tensor) -> Tensor:
    """The split of least mean (S - R_1(S, concentrated) - R_1(S, sparse) - R_2(S, salient))^2; first wins ties."""
    kept, _ = residual_binarise(saliency, salient.expand_as(saliency), 2)
    candidates = split_candidates((saliency * ~salient).abs())
    best_error, best = float("inf"), candidates[0]
    for number in promising_splits(saliency, salient, candidates):
        split = candidates[number]
        masks = masks_at(saliency, salient, split)
        low, _ = residual_binarise(saliency, masks.concentrated, 1)
        high, _ = residual_binarise(saliency, masks.sparse, 1)
        error = float(((saliency - (low + high + kept)) ** 2).mean())
        if error < best_error:
            best_error, best = error, split
    return best


def block_masks(block: Tensor, diagonal: Tensor, salient_metric: str, limit: int = SALIENT_LIMIT) -> BlockMasks:
    """Masks of one block, searched on S = w^2 / d^2 ("hessian") or on S = w ("magnitude").

    Args:
        block: float32 (rows, columns), already compensated for the blocks before it.
        diagonal: d = diag(U) of the block's columns.
        salient_metric: "hessian" or "magnitude".
        limit: see `search_salient_columns`.
    """
    saliency = block**2 / diagonal.reshape(1, -1) ** 2 if salient_metric == "hessian" else block
    salient = search_salient_columns(saliency, limit)
    return masks_at(saliency, salient, search_split(saliency, salient))


def push_error(current: Tensor, scaled: Tensor, upper: Tensor, start: int, end: int) -> None:
    """Let the columns after a block absorb its error, in place: W_later -= ((W_b - Q_b) / diag(U_b)) U_b,later.

    This is the diagonal form of the released code. The exact optimum is (W_b - Q_b) U_bb^-1 U_b,later.

    Args:
        current: float32 (rows, columns).
        scaled: (W_b - Q_b) / diag(U_b), (rows, end - start).
        upper: U, (columns, columns).
        start, end: columns of the block.
    """
    current[:, end:] -= scaled.matmul(upper[start:end, end:])


def official_billm(
    weight: Tensor,
    upper: Tensor,
    *,
    block_size: int = 128,
    salient_metric: str = "hessian",
    limit: int = SALIENT_LIMIT,
    compensate: bool = True,
) -> OfficialResult:
    """Binarise a whole weight matrix block by block, left to right.

    The columns of a block are quantised as they entered it; its error then moves to later blocks (`push_error`).

    Args:
        weight: float32 (rows, columns), dead columns already zero. Not modified.
        upper: U (columns, columns), upper triangular with H^-1 = U^T U.
        block_size: columns per block; the last may be narrower.
        salient_metric: see `block_masks`.
        limit: candidate columns of the salient search.
        compensate: False leaves later blocks alone (round to nearest).
    """
    rows, columns = weight.shape
    current = weight.clone()
    blocks = -(-columns // block_size)
    salient = torch.zeros(columns, dtype=torch.bool, device=weight.device)
    sparse = torch.zeros(rows, columns, dtype=torch.bool, device=weight.device)
    first, second = torch.zeros_like(sparse), torch.zeros_like(sparse)
    scalars = torch.zeros(rows, blocks, 7, device=weight.device)
    error = 0.0
    for number in range(blocks):
        start, end = number * block_size, min((number + 1) * block_size, columns)
        block = current[:, start:end].clone()
        diagonal = torch.diagonal(upper)[start:end]
        masks = block_masks(block, diagonal, salient_metric, limit)
        low, (low_order,) = residual_binarise(block, masks.concentrated, 1)
        high, (high_order,) = residual_binarise(block, masks.sparse, 1)
        kept, (kept_first, kept_second) = residual_binarise(block, masks.salient, 2)
        quantised = low + high + kept
        scaled = (block - quantised) / diagonal
        error += float((scaled**2).sum()) / 2
        current[:, start:end] = quantised
        if compensate:
            push_error(current, scaled, upper, start, end)

        salient[start:end] = masks.salient[0]
        sparse[:, start:end] = masks.sparse
        sign = torch.where(masks.salient, kept_first.sign, torch.where(masks.sparse, high_order.sign, low_order.sign))
        first[:, start:end] = sign >= 0
        second[:, start:end] = kept_second.sign >= 0
        merged = kept_first.mean + kept_second.mean
        parts = (low_order.mean, low_order.scale, high_order.mean, high_order.scale)
        scalars[:, number] = torch.cat([*parts, merged, kept_first.scale, kept_second.scale], 1)
    return OfficialResult(current, salient, sparse, first, second, scalars, error)
