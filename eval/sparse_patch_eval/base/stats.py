"""Means with bootstrap intervals over prompts.

All methods are measured on the same prompts, so comparisons are paired: prompts are drawn anew with
replacement, the same draws for every method, and the interval is the middle 95 % of the means
(percentile bootstrap; Efron and Tibshirani 1993, chapter 13). With a handful of prompts such an
interval is somewhat too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Estimate", "bootstrap", "bootstrap_groups"]

DRAWS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` prompts and its interval."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean of `values`, one per prompt, and its 95 % interval.

    The same seed and number of values always draw the same prompts.

    Raises:
        ValueError: no values.
    """
    return bootstrap_groups([values], seed=seed)


def bootstrap_groups(groups: Sequence[Sequence[float]], *, seed: int = 0) -> Estimate:
    """Mean over groups (tasks) of each group's mean, and its 95 % interval.

    Prompts are drawn within their group (stratified bootstrap), so a task with many prompts weighs
    no more than another.

    Raises:
        ValueError: no groups, or one without values.
    """
    if not groups or not all(len(values) for values in groups):
        raise ValueError("bootstrap: no values to take a mean of")
    generator = np.random.default_rng(seed)
    mean, drawn = 0.0, np.zeros(DRAWS)
    for values in groups:
        x = np.asarray(values, dtype=np.float64)
        draws = generator.integers(0, len(x), (DRAWS, len(x)))
        mean += float(x.mean()) / len(groups)
        drawn += x[draws].mean(1) / len(groups)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(mean, float(low), float(high), sum(map(len, groups)))
