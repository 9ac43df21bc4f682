"""Which parameter of each method sets how much it keeps, as one knob a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sparse_patch import describe


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
