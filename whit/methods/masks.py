"""Which weights to keep, given a score for each: the lowest scores go, and among equal ones the first columns."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from whit.errors import KnobError

_ROUNDING = 1e-6


def dropped(count: int, sparsity: float) -> int:
    """Weights that go of `count`: floor(count sparsity), at most all but one.

    A product such as 100 * 0.29 = 28.999999999999996 counts as the whole number that is meant.
    """
    return min(int(count * sparsity + _ROUNDING), count - 1)


def keep_in_rows(scores: Tensor, drop: int) -> Tensor:
    """Drop the `drop` lowest of each row of scores (..., columns): bool of the same shape, true where kept."""
    order = torch.sort(scores, dim=-1, stable=True).indices[..., :drop]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, order, False)


def keep_in_matrix(scores: Tensor, drop: int) -> Tensor:
    """Drop the `drop` lowest of all scores (rows, columns): bool (rows, columns)."""
    return keep_in_rows(scores.reshape(1, -1), drop).reshape(scores.shape)


def keep_in_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest of each aligned group of `m` columns of scores (rows, columns): bool (rows, columns)."""
    return keep_in_rows(scores.reshape(scores.shape[0], -1, m), m - n).reshape(scores.shape)


def parse_pattern(pattern: str) -> tuple[int, int]:
    """`"2:4"` -> (2, 4): N weights KEPT of every M, as the hardware counts.

    Raises:
        KnobError: not of this form, or not 1 <= N < M.
    """
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 1 <= n < m:
        raise KnobError(
            f"pattern {pattern!r} is not N:M with 1 <= N < M: N weights KEPT of every M columns, for example 2:4"
        )
    return n, m
