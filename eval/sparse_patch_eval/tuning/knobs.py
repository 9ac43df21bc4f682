"""Methods at equal density: which parameter of each sets how much it keeps, and tuning it.

Methods are compared fairly only where they keep the same share of the causal blocks; their defaults
keep very different shares. So every method gets one knob here, which is turned until its mean
density over all layers meets a target. Layers that run exact count as 1: a method that keeps its
first layers dense pays for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sparse_patch import describe, list_methods

TOLERANCE = 0.01
_MOST_STEPS = 24


@dataclass(frozen=True)
class Knob:
    """How much a method keeps, as one number.

    Attributes:
        make: parameters from the number.
        low, high: its range. Below 1 it is a share, turned in steps of what it leaves out.
        falling: more of it keeps less.
    """

    make: Callable[[float], dict[str, Any]]
    low: float
    high: float
    falling: bool = False

    def params(self, place: float) -> dict[str, Any]:
        """Parameters at `place` 0 (keeps least) to 1 (keeps most), evenly in the logarithm."""
        place = 1 - place if self.falling else place
        if self.high < 1:
            return self.make(1 - (1 - self.low) * ((1 - self.high) / (1 - self.low)) ** place)
        return self.make(self.low * (self.high / self.low) ** place)


def _share(name: str = "gamma", **fixed: Any) -> Knob:
    return Knob(lambda x: {**fixed, name: round(x, 5)}, 0.02, 0.9999)


def _count(name: str, low: int = 16, high: int = 1 << 17, **fixed: Any) -> Knob:
    return Knob(lambda x: {**fixed, name: round(x)}, low, high)


def _minference(x: float) -> dict[str, Any]:
    """Vertical and slash lines, in the proportion of the defaults; it takes 30 and 50 at least."""
    return {"vertical": max(30, round(1000 * x)), "slash": max(50, round(6096 * x))}


def _infinite_hip(x: float) -> dict[str, Any]:
    """What each stage keeps, in the proportion of the defaults."""
    keep = tuple(max(8, round(x * n)) for n in (32768, 8192, 2048))
    return {"sink": 64, "window": 256, "keep": keep, "early_keep": max(8, round(4096 * x))}


def _psa(x: float) -> dict[str, Any]:
    """Its four thresholds, what they leave out in the proportion of the defaults."""
    return {"thresholds": tuple(round(x + n * (1 - x) / 5, 5) for n in range(4))}


def _flashprefill(x: float) -> dict[str, Any]:
    return {"sink_blocks": 1, "local_blocks": 2, "dense_rows": 0, "alpha": float(f"{x:.4g}")}


# What is fixed here are budgets and forced blocks that are made for far longer prompts: at 4k they
# alone would keep a quarter to a half. Sparge's own similarity takes almost every block of a small
# model for unlike itself, and computes it.
KNOBS: dict[str, Knob] = {
    "a_shape": _count("window", sink=64),
    "dhsa": _count("topk", 1, 2048),
    "flashprefill": Knob(_flashprefill, 1e-4, 1.0, falling=True),
    "flexprefill": _share(min_budget=128),
    "hip": _count("mask_k", 8),
    "infinite_hip": Knob(_infinite_hip, 0.004, 16.0),
    "mean_pool": _share(),
    "minference": Knob(_minference, 0.008, 20.0),
    "moba": _count("topk", 1, 2048, chunk_size=64),
    "pbs": _share("tau"),
    "power": _count("local_blocks", 1, 2048, block_size=64),
    "prism": _share(),
    "proxyattn": _share(min_budget=256),
    "psa": Knob(_psa, 0.02, 0.9999),
    "sparge": _share(similarity=0.2),
    "strided": _share(),
    "tri_shape": _count("window", sink=64),
    "xattention": _share(),
}


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


def spec_of(name: str, params: Mapping[str, Any]) -> str:
    """`NAME:key=value,...`, as `parse_method` reads it."""
    texts = {
        key: value.replace(",", "\\,") if isinstance(value, str) else str(value).replace(" ", "")
        for key, value in params.items()
    }
    pairs = ",".join(f"{key}={text}" for key, text in texts.items())
    return f"{name}:{pairs}" if pairs else name


def knob_of(name: str) -> Knob | None:
    """The knob of a method; None if it has none here, or lacks its parameters.

    Raises:
        ValueError: no method has that name.
    """
    knob = KNOBS.get(name)
    known = {one.name for one in describe(name).parameters}
    return knob if knob is not None and knob.params(0).keys() <= known else None


def missing_methods() -> list[str]:
    """Methods with a knob here that the registry does not have."""
    return sorted(KNOBS.keys() - set(list_methods()))


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
        self._knob = knob_of(name)
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
