"""The interval: deterministic, honest about too few windows, and with the coverage it claims."""

from __future__ import annotations

import math

import numpy as np
import pytest

from whit.evaluation.bootstrap import WindowSums


def sums(values: np.ndarray, weights: np.ndarray | None = None) -> WindowSums:
    weights = np.ones(len(values)) if weights is None else weights
    return WindowSums(list(values * weights), list(weights))


def test_value_weighs_windows_by_their_tokens() -> None:
    assert sums(np.array([1.0, 4.0]), np.array([3.0, 1.0])).value == 1.75


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        low, high = sums(generator.normal(3.0, 1.0, size=30)).interval()
        hits += low <= 3.0 <= high
    # Percentile intervals of 30 windows cover a little less than 95 %.
    assert 0.90 <= hits / 300 <= 0.98


def test_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(1).normal(0.0, 2.0, size=400) + 10
    low, high = sums(values).interval()
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(400), rel=0.06)


def test_interval_is_deterministic_and_holds_the_value() -> None:
    item = sums(np.random.default_rng(2).exponential(size=8))
    assert item.interval() == item.interval()
    low, high = item.interval()
    assert low < item.value < high


@pytest.mark.parametrize("values", [[], [2.5]])
def test_fewer_than_two_windows_give_no_interval(values: list[float]) -> None:
    item = sums(np.array(values))
    assert item.interval() == (item.value, item.value) == (sum(values), sum(values))


def test_nothing_over_nothing_is_zero_and_something_over_nothing_infinite() -> None:
    assert WindowSums([0.0], [0.0]).value == 0.0
    assert WindowSums([1.0], [0.0]).value == math.inf
