"""Choosing number systems for a layer: scales, and scores of every pair of one system for inputs and one for weights.

Source: Zhang et al. 2023, "Exploring the Potential of Flexible 8-bit Format: Design and Algorithm", arXiv 2310.13513.
Scores are accumulated in float64; a smaller score is better, and of equal ones the first in the order of the menus is
taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from whit.errors import ModelError
from whit.finite import all_finite
from whit.formats.base import Packed
from whit.formats.minifloat import NumberSystem
from whit.formats.scaled_codes import WHOLE_TENSOR, ScaledCodes, join_groups, split_groups

SEARCH_STEPS = 80
TOKENS_AT_A_TIME = 256


def fit_scales(values: Tensor, numbers: NumberSystem, dtype: torch.dtype, *, search: bool, largest: Tensor) -> Tensor:
    """Scales that bring each row of values into a number system's range, in the dtype they are stored in.

    s = max|x| / maximum; with `search`, of max|x| (1 - n/100) / maximum, n = 0..79, the one of least squared error.

    Args:
        values: float32 (k, n); only looked at by the search.
        largest: max|x| of each row, float32 (k,).

    Returns:
        positive, `dtype` (k,); 1 for rows of zeros.

    Raises:
        ModelError: a magnitude is infinite or NaN, or too large for a finite scale.
    """
    best = _positive(largest / numbers.maximum, dtype)
    if not all_finite(best):
        raise ModelError(
            f"a magnitude of {float(largest.max()):.3g} has no finite scale for {numbers.name}: rescale the model, or "
            "try --dtype float32"
        )
    if not search:
        return best
    least = _squared_error(values, numbers, best)
    for step in range(1, SEARCH_STEPS):
        trial = _positive(largest * (1 - step / 100) / numbers.maximum, dtype)
        error = _squared_error(values, numbers, trial)
        best = torch.where(error < least, trial, best)
        least = torch.minimum(error, least)
    return best


def round_weight(weight: Tensor, layout: ScaledCodes, *, search: bool) -> Packed:
    """A weight (rows, columns) in the number system of `layout`, with scales by `fit_scales`."""
    whole = layout.group_size == WHOLE_TENSOR
    values = weight.reshape(1, -1) if whole else split_groups(weight, layout.group_size).flatten(0, 1)
    scales = fit_scales(values, layout.numbers, layout.scale_dtype, search=search, largest=values.abs().amax(1))
    return layout.pack(weight, scales.reshape(layout.scale_shape(*weight.shape)))


def output_scores(
    sample: Tensor, weight: Tensor, inputs: Sequence[Tensor], weights: Iterable[Tensor], p: float = 2.0
) -> Tensor:
    """mean |X W^T - X_a W_w^T|^p / mean |X W^T|^p for every rounding X_a of the inputs and W_w of the weight.

    Args:
        sample: X, float32 (k, columns). weight: W, float32 (rows, columns).
        inputs: rounded samples. weights: rounded weights, float32 (rows, columns); held one at a time.
        p: exponent of the norm.

    Returns:
        float64 (inputs, weights), on the CPU.
    """
    exact = sample @ weight.T
    parts = [slice(start, start + TOKENS_AT_A_TIME) for start in range(0, len(sample), TOKENS_AT_A_TIME)]
    scores = [
        [sum(float(_power_sum(values[part] @ rounded.T - exact[part], p)) for part in parts) for values in inputs]
        for rounded in weights
    ]
    return torch.tensor(scores, dtype=torch.float64).T / (float(_power_sum(exact, p)) or 1.0)


def tensor_score(values: Tensor, rounded: Tensor, p: float = 2.0) -> float:
    """mean |x - Q(x)|^p / mean |x|^p of one tensor."""
    return float(_power_sum(rounded - values, p)) / (float(_power_sum(values, p)) or 1.0)


def resolution_score(values: Tensor, scales: Tensor, group_size: int, numbers: NumberSystem, *, raw: bool) -> float:
    """log2 of the distance between neighbouring numbers at each value, its mean over the values that are not zero.

    sum_x max(floor(log2|x| + h) - h - m, 1 - h - m) with h = bias - log2 s for floats, log2 s for integers. An exact
    zero has no error, whatever the spacing around it, but counted as published (`raw`: all values, the sum and not the
    mean) it speaks for the system with the smallest subnormals.

    Args:
        values: float32 (n, columns). scales: float32, broadcast to (n, groups). group_size: columns that share one.
    """
    grouped = split_groups(values, group_size)
    steps = (numbers.spacing(grouped / scales.unsqueeze(-1)) * scales.unsqueeze(-1)).log2()
    logs = join_groups(steps, values.shape[-1]).double()
    if raw:
        return float(logs.sum())
    present = values != 0
    return float(logs[present].sum()) / max(int(present.sum()), 1)


def choose_pair(
    scores: Tensor, inputs: Sequence[NumberSystem | None], weights: Sequence[NumberSystem], *, limited: bool
) -> tuple[int, int]:
    """Row and column of the smallest score; with `limited`, of those that do not mix integers with floats.

    Args:
        scores: float64 (len(inputs), len(weights)). inputs: None stands for inputs that are left alone.

    Raises:
        ValueError: every pair mixes.
    """
    allowed = torch.tensor([[not limited or may_meet(a, w) for w in weights] for a in inputs])
    if not bool(allowed.any()):
        raise ValueError("every pair mixes integers with floats")
    best = int(torch.argmin(scores.masked_fill(~allowed, torch.inf).flatten()))
    return divmod(best, len(weights))


def may_meet(inputs: NumberSystem | None, weights: NumberSystem) -> bool:
    """Whether a unit that has either integer or float multipliers can multiply the two."""
    return inputs is None or inputs.is_integer == weights.is_integer


def _positive(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype they are stored in; what is zero there becomes one, with which everything rounds to zero."""
    stored = scales.to(dtype)
    return torch.where(stored == 0, torch.ones_like(stored), stored)


def _squared_error(values: Tensor, numbers: NumberSystem, scales: Tensor) -> Tensor:
    factor = scales.float().unsqueeze(1)
    return (numbers.round(values / factor).mul_(factor) - values).square_().sum(1, dtype=torch.float64)


def _power_sum(values: Tensor, p: float) -> Tensor:
    powers = values.square() if p == 2 else values.abs().pow(p)
    return powers.sum(dtype=torch.float64)
