"""Scores by which STBLLM chooses the weights to keep: relative importance by default, and others for study.

The paper calls its score Standardized Importance and writes it as z(mu(|W|)) ||X_j||, mu the relative importance. The
released code computes mu (||X_j||)^a with no standardisation at all, which is RIA. The difference is not cosmetic: z
makes everything below average negative, and multiplying by the norm then ranks that half upside down.
"""

from __future__ import annotations

from torch import Tensor

from whit.methods.scores import ria_score, wanda_score

SCORES = ("ria", "wanda", "magnitude", "paper-literal")


def importance(name: str, weight: Tensor, square_sums: Tensor | None, power: float) -> Tensor:
    """Score of every weight, larger is more important: float32 (rows, columns).

    Args:
        name: one of `SCORES`.
        weight: float32 (rows, columns).
        square_sums: 1/N sum x_j^2 of the inputs, (columns,); not needed for "magnitude".
        power: exponent of the input norm in "ria".
    """
    if name == "magnitude":
        return weight.abs()
    assert square_sums is not None
    if name == "wanda":
        return wanda_score(weight, square_sums)
    if name == "ria":
        return ria_score(weight, square_sums, power)
    return paper_literal_score(weight, square_sums)


def paper_literal_score(weight: Tensor, square_sums: Tensor) -> Tensor:
    """z(mu) sqrt(s_j), mu_ij = |w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|, z(mu) = (mu - mean mu) / std mu."""
    relative = ria_score(weight, square_sums, 0.0)
    spread = relative.std(correction=0)
    return (relative - relative.mean()) / spread.clamp(min=1e-30) * square_sums.sqrt()
