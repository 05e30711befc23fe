"""How STBLLM shares an N:M budget among decoder layers: the released rule, the paper's, and one that keeps the budget.

All return weights KEPT of every M, one number per block. (The released code counts the weights that go.)
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from whit.methods.allocation import owl_shares, whole_steps

# Of the published runs: outliers exceed six times the mean score, and blocks differ by at most two steps.
OUTLIER_MULTIPLE = 6.0
SPAN = 2.0


def released_kept(outliers: Sequence[float], n: int, m: int) -> list[int]:
    """The released rule: a = 2 (r - min r) / (max r - min r), less its mean, rounded half to even, and 1 becomes 2.

    The step from 1 to 2 breaks the budget: the published LLaMA-2-7B run keeps 52.3 % where "4:8" says 50 %.

    Args:
        outliers: r, share of outliers of each block, in any unit.
        n: kept of every m by name.
        m: group size.
    """
    low, high = min(outliers), max(outliers)
    if high <= low:
        return [n] * len(outliers)
    raw = [SPAN * (value - low) / (high - low) for value in outliers]
    mean = sum(raw) / len(raw)
    steps = [round(value - mean) for value in raw]
    return [min(max(n + (2 if step == 1 else step), 1), m) for step in steps]


def paper_kept(norms: Sequence[float], n: int, m: int) -> list[int]:
    """The paper's rule, N_l / M = alpha_l + (1 - alpha_l) N / M, rounded, alpha_l from the L2 norms of the blocks: here
    a block's share of their sum. It never keeps less than N:M asks for, so it does not hold the budget."""
    total = sum(norms)
    shares = [norm / total if total > 0 else 0.0 for norm in norms]
    return [min(max(round(m * (share + (1 - share) * n / m)), 1), m) for share in shares]


def repaired_kept(outliers: Sequence[float], parameters: Sequence[int], n: int, m: int) -> list[int]:
    """The released rule before its rounding, mean weighted by size, then whole numbers that hold the budget exactly:
    sum(kept * parameters) <= n * sum(parameters), by greedy steps of one (`whole_steps`)."""
    ideal = owl_shares(outliers, parameters, n, SPAN / 2)
    return whole_steps(ideal, parameters, 1, m, Fraction(n))
