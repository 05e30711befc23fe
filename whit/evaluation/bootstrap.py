"""Intervals of ratio metrics by the bootstrap over windows (Efron 1979, percentile interval)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 20


@dataclass
class WindowSums:
    """A metric as sum(numerators) / sum(denominators), one pair per window: the unit that is resampled.

    Tokens inside a window depend on one another, windows hardly do; so windows are drawn, never tokens.
    """

    numerators: list[float] = field(default_factory=list)
    denominators: list[float] = field(default_factory=list)

    def add(self, numerator: float, denominator: float) -> None:
        """Add one window."""
        self.numerators.append(numerator)
        self.denominators.append(denominator)

    @property
    def value(self) -> float:
        """The ratio over all windows; 0 / 0 counts as 0 (nothing to differ), x / 0 as infinity."""
        return float(_ratio(np.array(sum(self.numerators)), np.array(sum(self.denominators))))

    def interval(self) -> tuple[float, float]:
        """95 % percentile interval from 2000 seeded resamples; both ends equal the value with fewer than 2 windows."""
        count = len(self.numerators)
        if count < 2:
            return self.value, self.value
        above, below = np.array(self.numerators), np.array(self.denominators)
        # How often each window was drawn: (resamples, windows) counts turn both sums into one product.
        draws = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        ratios = _ratio(draws @ above, draws @ below)
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(ratios, [tail, 1 - tail])
        return float(low), float(high)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(above == 0, 0.0, above / below)
