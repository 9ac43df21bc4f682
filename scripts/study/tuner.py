"""Methods at equal density: a method's knob, turned until it keeps what a target says.

Methods are compared fairly only where they keep the same share of the causal blocks; their defaults
keep very different shares. So the knob of each (`sparse_patch.Knob`) is turned until its mean
density over all layers meets the target. Layers that run exact count as 1: a method that keeps its
first layers dense pays for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sparse_patch import describe
from sparse_patch.specs import spec_of

TOLERANCE = 0.01
_MOST_STEPS = 24


@dataclass(frozen=True)
class Tuned:
    """A method at, or as near as it gets to, a density.

    Attributes:
        spec: `NAME:key=value,...`.
        density: what it keeps of the tuning prompts, mean over layers and prompts.
        reached: is that the target, within the tolerance?
    """

    spec: str
    density: float
    reached: bool


class Tuner:
    """Turns one method's knob. What was measured for one target is used again for the next."""

    def __init__(
        self,
        name: str,
        measure: Callable[[str], float],
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            measure: density of a method, given as `NAME:key=value,...`.
            extra: parameters that stay as they are, over the knob's own.
        """
        self._name, self._measure, self._extra = name, measure, dict(extra or {})
        self._knob = describe(name).knob
        self._seen: dict[float, Tuned] = {}  # by place
        if self._knob is not None:
            ends = [{**self._knob.params(place), **self._extra} for place in (0.0, 1.0)]
            if ends[0] == ends[1]:
                self._knob = None  # the user has turned it

    @property
    def has_knob(self) -> bool:
        return self._knob is not None

    def tune(self, target: float) -> Tuned:
        """The nearest to `target`; a method without a knob is what it is.

        Bisects the knob, with a straight line through the logarithms of the two bounds' densities
        to guess where the target lies.
        """
        if not self._seen:
            self._look(0.0)
            if self._knob is not None:
                self._look(1.0)
        for step in range(_MOST_STEPS if self._knob is not None else 0):
            low = max((p for p, at in self._seen.items() if at.density <= target), default=0.0)
            above = (p for p, at in self._seen.items() if at.density >= target and p >= low)
            high = min(above, default=low)
            best = self._nearest(target)
            if _meets(best.density, target) or low == high:
                break
            if self._seen[low].spec == self._seen[high].spec:
                break
            self._look(self._guess(low, high, target, halve=step % 3 == 2))
        best = self._nearest(target)
        return Tuned(best.spec, best.density, _meets(best.density, target))

    def _guess(self, low: float, high: float, target: float, *, halve: bool) -> float:
        """A place between two bounds; every third time the middle, should the line bend much."""
        below, above = self._seen[low].density, self._seen[high].density
        share = math.log(target / below) / math.log(above / below) if below > 0 else 0.5
        share = 0.5 if halve else min(max(share, 0.05), 0.95)
        return low + share * (high - low)

    def _look(self, place: float) -> None:
        turned = {} if self._knob is None else self._knob.params(place)
        spec = spec_of(self._name, {**turned, **self._extra})
        same = [at.density for at in self._seen.values() if at.spec == spec]
        density = same[0] if same else self._measure(spec)
        self._seen[place] = Tuned(spec, density, False)

    def _nearest(self, target: float) -> Tuned:
        return min(self._seen.values(), key=lambda at: abs(at.density - target))


def _meets(density: float, target: float) -> bool:
    return abs(density - target) <= TOLERANCE * target
