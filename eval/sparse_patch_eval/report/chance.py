"""Can a model do a task at all? If not, the task cannot show what a method breaks.

A score on which dense itself is near chance is marked, never shown as a draw: dense has to be
`MARGIN` above the chance level at the lower end of its two-sided 95 % interval. That is Clopper and
Pearson's exact interval (Biometrika 26, 1934) where every sample is right or wrong, a bootstrap one
where samples are right in part.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparse_patch_eval.base.stats import bootstrap
from sparse_patch_eval.tasks.problem import CANDIDATES

SEED = 0
# A method can lose at most what dense is above chance: less than this is lost in the noise.
MARGIN = 0.05
_CHANCE = {"string_match": 0.0, "exact_match": 0.0, "rank": 1 / CANDIDATES}
_FOUR_CHOICES = "longbench2"


def chance(task: str, score: str) -> float | None:
    """What guessing scores; None where the score has no such level."""
    if score == "acc" and task.startswith(_FOUR_CHOICES):
        return 0.25
    return _CHANCE.get(score)


def above_chance(values: Sequence[float], level: float) -> bool:
    """The lower end of the 95 % interval of the mean is more than MARGIN above a chance level."""
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
