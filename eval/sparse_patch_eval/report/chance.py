"""Can a model do a task at all? If not, the task cannot show what a method breaks.

A score on which dense itself is near chance is marked, never shown as a draw: the lower end of
dense's two-sided 95 % interval has to be `MARGIN` above the chance level. The interval is Clopper
and Pearson's exact one (Biometrika 26, 1934) where every sample is right or wrong, a bootstrap
interval where samples are partly right.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparse_patch_eval.base.stats import bootstrap
from sparse_patch_eval.tasks.problem import CANDIDATES

SEED = 0
# A method can lose at most dense's distance above chance: a smaller one drowns in noise.
MARGIN = 0.05
_CHANCE = {"string_match": 0.0, "exact_match": 0.0, "rank": 1 / CANDIDATES}
_FOUR_CHOICES = "longbench2"


def chance(task: str, score: str) -> float | None:
    """The score of guessing; None where the score has no chance level."""
    if score == "acc" and task.startswith(_FOUR_CHOICES):
        return 0.25
    return _CHANCE.get(score)


def above_chance(values: Sequence[float], level: float) -> bool:
    """Is the lower end of the mean's 95 % interval more than MARGIN above a chance level?"""
    if all(value in (0, 1) for value in values):
        low = _clopper_pearson_low(int(sum(values)), len(values))
    else:
        low = bootstrap(values, seed=SEED).low
    return low > level + MARGIN


def _clopper_pearson_low(right: int, n: int) -> float:
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise ImportError(
            'a report needs scipy for exact intervals: pip install "sparse-patch[eval]"'
        ) from error
    return float(binomtest(right, n).proportion_ci(0.95, "exact").low)
