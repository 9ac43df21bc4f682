"""Counts of a patch in prefills only, as sums that several processes can add up.

A patch's own report counts every call: thousands of exact decode steps and short answers would hide
the prefills. So a hook around the model's forward reads the report before and after each forward
that begins a sequence.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import Cache

from sparse_patch import LayerReport, Patch, Report
from sparse_patch_eval.ask.density import overall_density


@dataclass
class LayerSums:
    """Prefill calls of one layer, and sums over them; a call is one sequence in one forward.

    `density` and `recall` are summed over the sparse calls, `recall` over those measured.
    """

    calls: int = 0
    sparse: int = 0
    density: float = 0.0
    measured: int = 0
    recall: float = 0.0
    exact: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, layer: LayerReport) -> LayerSums:
        sparse = layer.sparse_calls - layer.decode_calls
        measured = 0 if layer.recall is None else sparse
        return cls(
            calls=layer.calls - layer.decode_calls,
            sparse=sparse,
            density=sparse * (layer.density or 0.0),
            measured=measured,
            recall=measured * (layer.recall or 0.0),
            exact=Counter(layer.exact),
        )

    def add(self, other: LayerSums, sign: int = 1) -> None:
        self.calls += sign * other.calls
        self.sparse += sign * other.sparse
        self.density += sign * other.density
        self.measured += sign * other.measured
        self.recall += sign * other.recall
        self.exact.update({why: sign * count for why, count in other.exact.items()})

    def to_dict(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "sparse_calls": self.sparse,
            "density": overall_density(self.density, self.sparse, self.calls - self.sparse),
            "sparse_density": _ratio(self.density, self.sparse),
            "recall": _ratio(self.recall, self.measured),
            "exact": {why: count for why, count in self.exact.most_common() if count},
        }


@dataclass
class Sums:
    """The prefills of one process, or of several together; can be pickled.

    Attributes:
        layers: sums by layer index.
        decode: sparse decode steps, and the sum of their densities.
    """

    layers: dict[int, LayerSums] = field(default_factory=dict)
    decode: tuple[int, float] = (0, 0.0)

    def add(self, report: Report, sign: int = 1) -> None:
        for layer in report.layers:
            self.layers.setdefault(layer.layer, LayerSums()).add(LayerSums.of(layer), sign)

    @classmethod
    def together(cls, parts: Iterable[Sums]) -> Sums:
        total = cls()
        for part in parts:
            for layer, sums in part.layers.items():
                total.layers.setdefault(layer, LayerSums()).add(sums)
            total.decode = (total.decode[0] + part.decode[0], total.decode[1] + part.decode[1])
        return total

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: as `LayerSums.to_dict`, over all layers and for each; and `decode`."""
        total = LayerSums()
        for layer in self.layers.values():
            total.add(layer)
        steps, density = self.decode
        return {
            **total.to_dict(),
            "decode": {"sparse_steps": steps, "density": _ratio(density, steps)},
            "layers": [{"layer": n, **sums.to_dict()} for n, sums in sorted(self.layers.items())],
        }


class Tally:
    """Counts the prefills of a patched model from now on, until `remove`."""

    def __init__(self, patch: Patch) -> None:
        self._patch = patch
        self._sums = Sums()
        self._before: Report | None = None
        self._counting = True
        self._hooks = [
            patch.model.register_forward_pre_hook(self._enter, with_kwargs=True),
            patch.model.register_forward_hook(self._leave),
        ]

    def sums(self) -> Sums:
        report = self._patch.report()
        density = report.decode_calls * (report.decode_density or 0.0)
        return Sums(self._sums.layers, (report.decode_calls, density))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count forwards inside the block."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # Found by type: the argument is `past_key_values`, from Transformers 5.24 on `cache`.
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        begins = cache is None or cache.get_seq_length() == 0
        self._before = self._patch.report() if begins and self._counting else None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._before is not None:
            self._sums.add(self._patch.report())
            self._sums.add(self._before, -1)
            self._before = None


def _ratio(total: float, count: int) -> float | None:
    return total / count if count else None
