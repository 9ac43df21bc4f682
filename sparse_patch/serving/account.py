"""What sparse prefill did in an engine's process: a line in its log, metrics, and reports."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..layer import LayerState
from ..reporting import Report, make_report
from .settings import Choice, Settings, options_of

# The method of an engine's workers that returns their reports.
REPORT = "sparse_patch_report"


def report(llm: Any) -> list[Report]:
    """What an engine did so far, layer by layer; a call is one sequence in one step.

    Args:
        llm: vLLM's `LLM`.

    Returns:
        One for each worker process: with tensor parallel each counts its share of the heads.

    Raises:
        RuntimeError: the engine does not run sparse_patch.
    """
    try:
        found = llm.collective_rpc(REPORT)
    except Exception as error:
        raise RuntimeError(
            "report: this engine's workers do not know sparse_patch. Start it with "
            'additional_config={"sparse_patch": {...}}, and without a worker_extension_cls '
            "of your own"
        ) from error
    return [Report.from_dict(content) for content in found]


@dataclass(frozen=True)
class Totals:
    """Sums over all layers of a process."""

    sparse: int = 0
    density: float = 0.0
    exact: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, states: Iterable[LayerState]) -> Totals:
        sparse, density, exact = 0, 0.0, Counter[str]()
        for state in states:
            sparse += state.stats.sparse
            density += float(state.stats.density)
            exact.update(state.stats.exact)
        return cls(sparse, density, exact)

    def __sub__(self, before: Totals) -> Totals:
        return Totals(
            self.sparse - before.sparse,
            self.density - before.density,
            self.exact - before.exact,
        )

    def __str__(self) -> str:
        density = f", density {self.density / self.sparse:.3f}" if self.sparse else ""
        reasons = ", ".join(f"{why} {n}" for why, n in self.exact.most_common())
        exact = f"{self.exact.total()} exact" + (f" ({reasons})" if reasons else "")
        return f"{self.sparse} sparse calls{density}; {exact}"


@dataclass(eq=False)
class Account:
    """The layers of one engine in this process, and what was said of them.

    Attributes:
        settings, choice: what runs.
        log: takes a line; None: another process of the engine says the same.
        interval: seconds between two lines.
        clock: seconds, of any origin.
        tried: shapes of heads that the method was run on, when the engine started.
    """

    settings: Settings
    choice: Choice
    log: Callable[[str], None] | None = None
    interval: float = 10.0
    clock: Callable[[], float] = time.monotonic
    states: dict[int, LayerState] = field(default_factory=dict)
    tried: set[tuple[Any, ...]] = field(default_factory=set)
    _said: Totals = field(default_factory=Totals)
    _next: float = 0.0

    def __post_init__(self) -> None:
        self.options = options_of(self.settings)

    def state(self, layer: int) -> LayerState | None:
        """Of a layer of the model; None: it is not among those asked for."""
        if layer not in self.choice.layers:
            return None
        if layer not in self.states:
            self.states[layer] = LayerState(layer, self.choice.of_layer(layer), self.options)
        return self.states[layer]

    def tick(self) -> None:
        """A layer has run: say what was done since the last line, if it is time."""
        if self.clock() < self._next or _in_a_graph():
            return
        self._next = self.clock() + self.interval
        now = Totals.of(self.states.values())
        since = now - self._said
        if since.sparse or since.exact:
            self._said = now
            count(since)
            if self.log is not None:
                self.log(f"sparse_patch, since the last line: {since}")

    def report(self) -> Report:
        states = (self.states[layer] for layer in sorted(self.states))
        return make_report(self.choice.method, states)


def _in_a_graph() -> bool:
    """Is a CUDA graph being recorded, while which no value can be read?"""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def count(totals: Totals) -> None:
    """Add to the Prometheus counters of this process, if it has that library."""
    counters = _counters()
    if counters is None:
        return
    sparse, density, exact = counters
    sparse.inc(totals.sparse)
    density.inc(totals.density)
    for reason, calls in totals.exact.items():
        exact.labels(reason=reason).inc(calls)


_made: list[Any] = []


def _counters() -> Any:
    """Counters of sparse calls, their densities, and exact calls; made once in a process."""
    if not _made:
        try:
            from prometheus_client import Counter as Metric
        except ImportError:
            return None
        per = "one layer of one sequence in one step each"
        _made[:] = (
            Metric("sparse_patch:sparse_calls", f"Attention calls that ran sparse, {per}."),
            Metric("sparse_patch:density_sum", "Sum of kept / causal over the sparse calls."),
            Metric(
                "sparse_patch:exact_calls", f"Attention calls that ran exact, {per}.", ["reason"]
            ),
        )
    return _made
