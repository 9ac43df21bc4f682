"""Report of a patch by layer: calls, sparse calls, density, recall, exact calls by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .layer import LayerState


@dataclass(frozen=True)
class LayerReport:
    """One layer. A call is one sequence in one forward.

    Attributes:
        layer: the layer's index in the model.
        calls: sparse and exact calls together.
        sparse_calls: calls that ran the method's plan, decode steps included.
        density: kept / causal, mean over sparse prefill calls; None without any.
        recall: attention mass kept, mean over the prefill calls measured; None if none was.
        exact: exact calls by reason.
        decode_calls: sparse decode steps.
        decode_density: kept / causal, mean over sparse decode steps; None without any.
    """

    layer: int
    calls: int
    sparse_calls: int
    density: float | None
    recall: float | None
    exact: dict[str, int]
    decode_calls: int = 0
    decode_density: float | None = None

    @classmethod
    def of(cls, state: LayerState) -> LayerReport:
        stats = state.stats
        return cls(
            layer=state.layer,
            calls=stats.sparse + stats.decode + stats.exact.total(),
            sparse_calls=stats.sparse + stats.decode,
            density=float(stats.density) / stats.sparse if stats.sparse else None,
            recall=stats.recall / stats.measured if stats.measured else None,
            exact=dict(stats.exact),
            decode_calls=stats.decode,
            decode_density=float(stats.decode_density) / stats.decode if stats.decode else None,
        )


@dataclass(frozen=True)
class Report:
    """`print(report)` shows a table; `to_dict()` is JSON-ready."""

    method: str
    layers: tuple[LayerReport, ...]

    @property
    def calls(self) -> int:
        return sum(layer.calls for layer in self.layers)

    @property
    def sparse_calls(self) -> int:
        return sum(layer.sparse_calls for layer in self.layers)

    @property
    def density(self) -> float | None:
        """Kept / causal over all sparse prefill calls; None without any."""
        return self._mean("density")

    @property
    def recall(self) -> float | None:
        """Attention mass kept, over all sparse prefill calls; None if not measured."""
        return self._mean("recall")

    @property
    def decode_calls(self) -> int:
        return sum(layer.decode_calls for layer in self.layers)

    @property
    def decode_density(self) -> float | None:
        """Kept / causal over all sparse decode steps; None without any."""
        return self._mean("decode_density", decode=True)

    @property
    def exact(self) -> dict[str, int]:
        """Exact calls by reason, over all layers."""
        total: Counter[str] = Counter()
        for layer in self.layers:
            total.update(layer.exact)
        return dict(total.most_common())

    def _mean(self, name: str, decode: bool = False) -> float | None:
        weighted = []
        for layer in self.layers:
            value = getattr(layer, name)
            if value is not None:
                prefill_calls = layer.sparse_calls - layer.decode_calls
                weighted.append((value, layer.decode_calls if decode else prefill_calls))
        calls = sum(weight for _, weight in weighted)
        return sum(value * weight for value, weight in weighted) / calls if calls else None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`."""
        return cls(content["method"], tuple(LayerReport(**layer) for layer in content["layers"]))

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "calls": self.calls,
            "sparse_calls": self.sparse_calls,
            "density": self.density,
            "recall": self.recall,
            "exact": self.exact,
            "decode_calls": self.decode_calls,
            "decode_density": self.decode_density,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        lines = [
            self.method,
            f"{'layer':>5} {'calls':>6} {'sparse':>6} {'density':>7} {'recall':>7}  exact",
        ]
        total = LayerReport(
            -1, self.calls, self.sparse_calls, self.density, self.recall, self.exact
        )
        for layer in (*self.layers, total):
            name = "all" if layer is total else str(layer.layer)
            reasons = ", ".join(f"{why} {n}" for why, n in layer.exact.items())
            lines.append(
                f"{name:>5} {layer.calls:>6} {layer.sparse_calls:>6} "
                f"{_share(layer.density):>7} {_share(layer.recall):>7}  {reasons}"
            )
        if self.decode_calls:
            lines.append(
                f"{self.decode_calls} of the sparse calls are decode steps, "
                f"density {_share(self.decode_density)}"
            )
        return "\n".join(line.rstrip() for line in lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def make_report(method: str, states: Iterable[LayerState]) -> Report:
    return Report(method, tuple(LayerReport.of(state) for state in states))
