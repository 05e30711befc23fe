"""Which candidates of BiLLM's searches can win: their errors in closed form, to spare the exact evaluation of the rest.

The residual binariser leaves, per row and set of n entries, sum r^2 - n (mean^2 + scale^2) after one order, and
n (mean'^2 + scale'^2) less after a second. A scale is a mean absolute deviation, so it follows from the count and the
sum of the set's entries below a threshold. With a row sorted once, prefix sums give these for the sets of the split
search, which are intervals, and for whole rows; for the few salient columns they are summed directly, and the other
columns are the difference. The estimate, in float64, differs from the released code's float32 error by rounding only.
Candidates within a margin much wider than rounding are then evaluated exactly: the choice is that of a full search.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MARGIN = 1e-3

Below = Callable[[Tensor], Tensor]
"""Threshold (rows,) -> count and sum of a set's entries below it, (2, rows), float64."""


def explained(whole: Tensor, below: Below, order: int) -> Tensor:
    """How much of sum r^2 the residual binariser of the given order (1 or 2) takes away, per row: (rows,).

    Args:
        whole: count and sum of the set's entries, (2, rows).
        below: see `Below`.
        order: 1 or 2.
    """
    count, total = whole.unbind(0)
    safe: Tensor = count.clamp(min=1)
    mean = total / safe
    fewer, less = below(mean)
    scale = 2 * (mean * fewer - less) / safe
    gain: Tensor = mean.square() + scale.square()
    if order == 2:
        # What is left is r - (mean + scale) above the mean and r - (mean - scale) below it. Its mean is `shift`; its
        # absolute deviation is that of the upper entries from `high` and of the lower ones from `low`.
        shift = scale * (2 * fewer - count) / safe
        high, low = mean + scale + shift, mean - scale + shift
        part, part_sum = below(torch.maximum(high, mean))
        upper = (total - less - 2 * (part_sum - less)) - high * (count - fewer - 2 * (part - fewer))
        part, part_sum = below(torch.minimum(low, mean))
        lower = (less - 2 * part_sum) - low * (fewer - 2 * part)
        gain = gain + shift.square() + ((upper + lower) / safe).square()
    return gain * count


def prefix_sums(ordered: Tensor, mask: Tensor) -> Tensor:
    """Counts and sums of the masked entries among a row's first t = 0 ... columns: (2, rows, columns + 1)."""
    chosen = mask.double()
    return torch.nn.functional.pad(torch.stack([chosen, chosen * ordered]).cumsum(2), (1, 0))


def _at(prefix: Tensor, place: Tensor) -> Tensor:
    """Prefix sums at one place per row: (2, rows)."""
    return prefix.gather(2, place.reshape(1, -1, 1).expand(2, -1, 1)).squeeze(2)


def promising_counts(values: Tensor, ranked: Tensor) -> list[int]:
    """Column counts k = 1 ... len(ranked) - 1 that may have the least error when the first k of `ranked` are salient.

    Args:
        values: float32 (rows, columns), what the search looks at.
        ranked: column numbers, most salient first.
    """
    ordered = values.double().sort(1).values
    prefix = prefix_sums(ordered, torch.ones_like(ordered, dtype=torch.bool))
    columns = values.T[ranked].double().contiguous()
    gains = []
    for count in range(1, len(ranked)):
        part = columns[:count]

        def inside(threshold: Tensor, part: Tensor = part) -> Tensor:
            chosen = (part < threshold).double()
            return torch.stack([chosen.sum(0), (chosen * part).sum(0)])

        def outside(threshold: Tensor, inside: Below = inside) -> Tensor:
            place = torch.searchsorted(ordered, threshold.unsqueeze(1)).squeeze(1)
            return _at(prefix, place) - inside(threshold)

        whole = torch.stack([torch.full_like(part[0], count), part.sum(0)])
        both = explained(whole, inside, 2) + explained(prefix[:, :, -1] - whole, outside, 2)
        gains.append(both.sum())
    return [number + 1 for number in _promising(ordered.square().sum(), gains)]


def promising_splits(values: Tensor, salient: Tensor, splits: Tensor) -> list[int]:
    """Positions in `splits` that may have the least error; `salient` bool (columns,) marks columns left out."""
    plain, index = values.sort(1)
    ordered = plain.double()
    prefix = prefix_sums(ordered, ~salient[index])
    gains = []
    for split in splits:
        # {|r| < split} is an interval of the sorted row; compared in float32, as the masks are.
        edge = split.expand(len(plain), 1).contiguous()
        first = torch.searchsorted(plain, -edge, right=True).squeeze(1)
        last = torch.maximum(torch.searchsorted(plain, edge).squeeze(1), first)
        start = _at(prefix, first)
        whole = _at(prefix, last) - start

        def low(threshold: Tensor, first: Tensor = first, last: Tensor = last, start: Tensor = start) -> Tensor:
            place = torch.searchsorted(ordered, threshold.unsqueeze(1)).squeeze(1)
            return _at(prefix, place.clamp(first, last)) - start

        def high(threshold: Tensor, low: Below = low) -> Tensor:
            place = torch.searchsorted(ordered, threshold.unsqueeze(1)).squeeze(1)
            return _at(prefix, place) - low(threshold)

        both = explained(whole, low, 1) + explained(prefix[:, :, -1] - whole, high, 1)
        gains.append(both.sum())
    salient_part = values[:, salient].double()
    if salient_part.shape[1]:
        marked = salient_part.sort(1).values
        sums = prefix_sums(marked, torch.ones_like(marked, dtype=torch.bool))

        def kept(threshold: Tensor) -> Tensor:
            return _at(sums, torch.searchsorted(marked, threshold.unsqueeze(1)).squeeze(1))

        shared = explained(sums[:, :, -1], kept, 2).sum()
        gains = [gain + shared for gain in gains]
    return _promising(ordered.square().sum(), gains)


def _promising(total: Tensor, gains: list[Tensor]) -> list[int]:
    """Candidates whose error total - gain is within the margin of the least."""
    errors = total - torch.stack(gains)
    limit = errors.min().clamp(min=0) * (1 + MARGIN) + 1e-9 * total
    return torch.nonzero(errors <= limit).flatten().tolist()
