"""Dividing a budget of kept weights among blocks: OWL's ratios, then whole steps that never exceed the budget.

Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, arXiv 2310.05175. A block's outlier share is
the part of its weights whose Wanda score |w_ij| ||x_j|| exceeds `multiple` times the mean score of the block; blocks
with more outliers keep more. Kept shares lie in an interval of width 2 `span` around the target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor


def outlier_share(scores: Sequence[Tensor], multiple: float) -> float:
    """Part of all entries of the score matrices of a block that exceed `multiple` times their common mean.

    Raises:
        ValueError: no scores.
    """
    count = sum(part.numel() for part in scores)
    if not count:
        raise ValueError("a block without weights has no outliers")
    limit = multiple * sum(float(part.double().sum()) for part in scores) / count
    return sum(int(torch.count_nonzero(part > limit)) for part in scores) / count


def owl_shares(outliers: Sequence[float], parameters: Sequence[int], kept: float, span: float) -> list[float]:
    """The share of its weights that each block keeps: outlier shares stretched to an interval of width 2 span.

    a_b = 2 span (o_b - min o) / (max o - min o), shares kept + a_b - mean(a), the mean weighted by the blocks' sizes so
    that the whole keeps `kept`. The released code takes the plain mean, which is the same for blocks of equal size.
    """
    low, high = min(outliers), max(outliers)
    if high <= low:
        return [kept] * len(outliers)
    stretched = [2 * span * (value - low) / (high - low) for value in outliers]
    total = sum(parameters)
    mean = sum(value * size for value, size in zip(stretched, parameters, strict=True)) / total
    return [kept + value - mean for value in stretched]


def whole_steps(
    ideal: Sequence[float], parameters: Sequence[int], lowest: int, highest: int, average: Fraction
) -> list[int]:
    """Whole numbers of steps nearest to ideal ones whose weighted sum does not exceed the budget.

    Every block starts from its ideal rounded down, within the limits. Steps are then taken from the block that lies
    furthest above its ideal until the budget holds, and given to the block furthest below it while one more fits.

    Args:
        ideal: steps per block.
        parameters: weights of each block.
        lowest, highest: limits of a block; `lowest` for all must be within the budget.
        average: steps that all blocks together may have per weight, exactly.

    Returns:
        steps with sum(steps * parameters) <= average * sum(parameters).
    """
    steps = [min(max(math.floor(value + 1e-9), lowest), highest) for value in ideal]
    left = average * sum(parameters) - sum(step * size for step, size in zip(steps, parameters, strict=True))
    while left < 0:
        block = max((b for b in range(len(steps)) if steps[b] > lowest), key=lambda b: steps[b] - ideal[b])
        steps[block] -= 1
        left += parameters[block]
    while True:
        fitting = [b for b in range(len(steps)) if steps[b] < highest and parameters[b] <= left]
        if not fitting:
            return steps
        block = max(fitting, key=lambda b: ideal[b] - steps[b])
        steps[block] += 1
        left -= parameters[block]
