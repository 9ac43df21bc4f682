"""Means with bootstrap intervals over prompts, ranks, and who wins.

All methods are measured on the same prompts, so comparisons are paired: prompts are drawn anew with
replacement, the same draws for every method, and the interval is the middle 95 % of the means
(percentile bootstrap; Efron and Tibshirani 1993, chapter 13). With a handful of prompts such an
interval is somewhat too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval; `n` prompts are behind it."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean of `values`, one a prompt, and its 95 % interval.

    The same seed and number of values draw the same prompts, whatever the values are.

    Raises:
        ValueError: no values.
    """
    return bootstrap_groups([values], seed=seed)


def bootstrap_groups(groups: Sequence[Sequence[float]], *, seed: int = 0) -> Estimate:
    """Mean over groups (tasks) of each group's mean, and its 95 % interval.

    Prompts are drawn within their group, so every draw has as many of each as there are
    (stratified bootstrap): a task with many prompts weighs no more than another.

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


def ranks(means: Mapping[str, float], *, lower_is_better: bool) -> dict[str, int]:
    """1 for the best; equals share the better rank."""
    sign = 1 if lower_is_better else -1
    return {
        name: 1 + sum(sign * other < sign * mean for other in means.values())
        for name, mean in means.items()
    }


@dataclass(frozen=True)
class Winner:
    """Who has the best mean, and who cannot be told apart from it.

    Attributes:
        name: the best.
        ties: those whose paired difference to it has an interval with 0 in it, best first.
    """

    name: str
    ties: tuple[str, ...]


def winner(
    values: Mapping[str, Sequence[float]], *, lower_is_better: bool, seed: int = 0
) -> Winner:
    """The best of several methods; `values` hold one number a prompt, prompts in the same order."""
    means = {name: float(np.mean(x)) for name, x in values.items()}
    order = sorted(means, key=lambda name: means[name] if lower_is_better else -means[name])
    best, *others = order
    ties = []
    for name in others:
        gap = bootstrap([a - b for a, b in zip(values[name], values[best], strict=True)], seed=seed)
        if gap.low <= 0 <= gap.high:
            ties.append(name)
    return Winner(best, tuple(ties))
