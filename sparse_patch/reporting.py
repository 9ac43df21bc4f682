"""Report of a patch by layer: calls, sparse calls, density, recall, exact calls by reason."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .layer import LayerState
from .registry import brief


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


@dataclass(frozen=True, repr=False)
class Report:
    """`print(report)` shows a table, and so does a notebook; `to_dict()` is JSON-ready.

    Attributes:
        method: its repr, with all parameters.
        layers: every patched layer.
        brief: the method with the parameters that are not its defaults.
    """

    method: str
    layers: tuple[LayerReport, ...]
    brief: str = ""

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

    def __repr__(self) -> str:
        parts = [f"{self.sparse_calls} of {self.calls} calls sparse"]
        if self.density is not None:
            parts.append(f"density {self.density:.3f}")
        if self.recall is not None:
            parts.append(f"recall {self.recall:.3f}")
        parts += [f"{count} exact ({reason})" for reason, count in self.exact.items()]
        name = self.brief or self.method
        return f"<Report of {name}, {len(self.layers)} layers: {', '.join(parts)}>"

    def __str__(self) -> str:
        widths = (5, 6, 6, 7, 7)
        lines = [self.brief or self.method]
        for *cells, exact in (_COLUMNS, *self._table()):
            row = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            lines.append(f"{row}  {exact}")
        return "\n".join(line.rstrip() for line in [*lines, *self._remarks()])

    def _repr_html_(self) -> str:
        """For notebooks: one row for all layers, and the layers folded away."""
        *layers, together = self._table()
        head = _html_row("th", _COLUMNS)
        remarks = "".join(f"<p>{html.escape(line)}</p>" for line in self._remarks())
        return (
            f"<p><code>{html.escape(self.brief or self.method)}</code></p>"
            f"<table>{head}{_html_row('td', together)}</table>{remarks}"
            f"<details><summary>{len(layers)} layers</summary>"
            f"<table>{head}{''.join(_html_row('td', layer) for layer in layers)}</table></details>"
        )

    def _table(self) -> list[tuple[str, ...]]:
        """A row per layer and one for all of them, by `_COLUMNS`."""
        together = LayerReport(
            -1, self.calls, self.sparse_calls, self.density, self.recall, self.exact
        )
        return [
            (
                "all" if layer is together else str(layer.layer),
                str(layer.calls),
                str(layer.sparse_calls),
                _share(layer.density),
                _share(layer.recall),
                ", ".join(f"{why} {n}" for why, n in layer.exact.items()),
            )
            for layer in (*self.layers, together)
        ]

    def _remarks(self) -> list[str]:
        if not self.decode_calls:
            return []
        density = _share(self.decode_density)
        return [f"{self.decode_calls} of the sparse calls are decode steps, density {density}"]


_COLUMNS = ("layer", "calls", "sparse", "density", "recall", "exact")


def _html_row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def make_report(method: Any, states: Iterable[LayerState]) -> Report:
    layers = tuple(LayerReport.of(state) for state in states)
    return Report(repr(method), layers, brief(method))
