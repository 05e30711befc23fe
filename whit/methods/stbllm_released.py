"""STBLLM as its released code computes it (Dong et al. 2024, arXiv 2408.01803), with the flaw that undoes its mask.

Written from a description of the code. The weights are pruned first; then every block of columns is binarised as in the
released BiLLM, with three regions of the saliency S = w^2 / U_jj^2 instead of two. A pruned weight has S = 0, so it
falls into the lowest region and becomes mean +- scale of that region like any other: nearly all of them end non-zero.
The result is a dense two-stage binarisation, and is stored as that. The released code gathers new second moments on
the pruned network before binarising; here both stages use the same ones.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from whit.methods.billm_official import SALIENT_LIMIT, push_error, residual_binarise, search_salient_columns
from whit.methods.stbllm_refined import StructuredPlanes

QUANTILES = 160


def split_candidates(magnitude: Tensor) -> Tensor:
    """The 160 quantiles of linspace(0.10, 0.90) of all entries of `magnitude`: float32 (160,)."""
    grid = np.linspace(0.10, 0.90, QUANTILES)
    values = np.quantile(magnitude.reshape(-1).cpu().numpy(), q=grid)
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(magnitude.device)


def regions_at(saliency: Tensor, salient: Tensor, split: Tensor) -> list[Tensor]:
    """Masks {|S| < p}, {p <= |S| < 2 p}, {|S| >= 2 p}, bool (rows, columns), all without the salient columns."""
    rest = ~salient.expand_as(saliency)
    magnitude = (saliency * rest).abs()
    low, high = magnitude < split, magnitude >= 2 * split
    return [low & rest, ~low & ~high & rest, high & rest]


def search_trisection(saliency: Tensor, salient: Tensor) -> list[Tensor]:
    """The regions of least mean (S - sum R_1(S, region) - R_2(S, salient))^2 over p with 2 p <= the last quantile."""
    kept, _ = residual_binarise(saliency, salient.expand_as(saliency), 2)
    candidates = split_candidates((saliency * ~salient).abs())
    best_error, best = float("inf"), candidates[0]
    for split in torch.unique(candidates[2 * candidates <= candidates[-1]]):
        approximation = kept
        for region in regions_at(saliency, salient, split):
            approximation = approximation + residual_binarise(saliency, region, 1)[0]
        error = float(((saliency - approximation) ** 2).mean())
        if error < best_error:
            best_error, best = error, split
    return regions_at(saliency, salient, best)


def released_stbllm(pruned: Tensor, upper: Tensor, *, block_size: int = 128) -> StructuredPlanes:
    """Binarise a pruned weight, block by block, left to right.

    Args:
        pruned: float32 (rows, columns), zero where pruned and in dead columns. Not modified.
        upper: U (columns, columns), upper triangular with H^-1 = U^T U.
        block_size: columns per block; the last may be narrower.

    Returns:
        planes with nine scalars, not rounded; a sign of exactly zero counts as +1.
    """
    rows, columns = pruned.shape
    current = pruned.clone()
    blocks = -(-columns // block_size)
    salient = torch.zeros(columns, dtype=torch.bool, device=pruned.device)
    signs = torch.zeros(rows, columns, dtype=torch.bool, device=pruned.device)
    regions = torch.zeros(rows, columns, dtype=torch.int64, device=pruned.device)
    scalars = torch.zeros(rows, blocks, 9, device=pruned.device)
    for number in range(blocks):
        start, end = number * block_size, min((number + 1) * block_size, columns)
        block = current[:, start:end].clone()
        diagonal = torch.diagonal(upper)[start:end]
        saliency = block**2 / diagonal**2
        marks = search_salient_columns(saliency, SALIENT_LIMIT)
        masks = search_trisection(saliency, marks)
        quantised, (first, second) = residual_binarise(block, marks.expand_as(block), 2)
        sign, parts = first.sign, []
        for mask in masks:
            approximation, (order,) = residual_binarise(block, mask, 1)
            quantised = quantised + approximation
            sign = torch.where(mask, order.sign, sign)
            parts += [order.mean, order.scale]
        push_error(current, (block - quantised) / diagonal, upper, start, end)
        salient[start:end] = marks
        signs[:, start:end] = sign >= 0
        region = masks[1].long() + 2 * masks[2].long()
        regions[:, start:end] = torch.where(marks, (second.sign >= 0).long(), region)
        scalars[:, number] = torch.cat([*parts, first.mean + second.mean, first.scale, second.scale], 1)
    return StructuredPlanes(salient, signs, regions, scalars)
