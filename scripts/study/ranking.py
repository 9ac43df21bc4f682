"""Ranks of methods, and which of them cannot be told apart from the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from sparse_patch_eval.base.stats import bootstrap


def ranks(means: Mapping[str, float], *, lower_is_better: bool) -> dict[str, int]:
    """1 for the best; equals share the better rank."""
    sign = 1 if lower_is_better else -1
    places = rankdata([sign * mean for mean in means.values()], method="min")
    return {name: int(place) for name, place in zip(means, places, strict=True)}


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
