"""Scores of the weights of a layer, larger is more important: pure functions shared by methods and allocation.

Sources are named in the files of the methods. Scores are float32 (rows, columns) and compared with each other only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.errors import ModelError


def wanda_score(weight: Tensor, square_sums: Tensor) -> Tensor:
    """|w_ij| sqrt(s_j) (Sun et al. 2023, section 3).

    Args:
        weight: float32 (rows, columns).
        square_sums: s_j = 1/N sum x_j^2 of the inputs over the tokens of N sequences, (columns,).
    """
    return weight.abs() * square_sums.sqrt()


def ria_score(weight: Tensor, square_sums: Tensor, power: float) -> Tensor:
    """(|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) s_j^(power / 2); weights of zero rows and columns score zero.

    Args:
        weight: float32 (rows, columns).
        square_sums: 1/N sum x_j^2 of the inputs, (columns,).
        power: of the norm sqrt(s_j).
    """
    magnitude = weight.abs()
    relative = sum(magnitude / _positive(magnitude.sum(axis, keepdim=True)) for axis in (0, 1))
    return relative * square_sums.pow(power / 2)


def _positive(sums: Tensor) -> Tensor:
    """Sums of magnitudes to divide by: where all of them are zero, one will do."""
    return sums.masked_fill(sums == 0, 1)


def pruner_zero_score(weight: Tensor, gradient: Tensor | None) -> Tensor:
    """w^2 (G - min G) / (max G - min G), extremes of the whole matrix, in float32.

    Args:
        weight: float32 (rows, columns).
        gradient: G = sqrt(sum over sequences of (dL/dW)^2), any positive multiple of it: (rows, columns).

    Raises:
        ModelError: as `PrunerZero.score`.
    """
    what = f"the gradient of the {weight.shape[0]} x {weight.shape[1]} weight"
    if gradient is None:
        raise ModelError(
            f"{what} that 'pruner-zero' ranks by was not measured: the calibration inputs do not reach this layer; "
            "leave it out with --skip, or use another method"
        )
    scaled = gradient.float()
    low, high = (float(value) for value in torch.aminmax(scaled))
    # A sum of two numbers is not finite unless both are, and aminmax hands NaN on.
    if not torch.isfinite(torch.tensor(low + high)):
        raise ModelError(f"{what} holds NaN or Inf: try --dtype float32, or check the model's weights")
    if high == low:
        state = "zero everywhere" if high == 0 else f"{high:g} for every weight"
        raise ModelError(
            f"{what} is {state}, which ranks nothing: leave the layer out with --skip, or use other calibration data"
        )
    return weight.square() * ((scaled - low) / (high - low))
