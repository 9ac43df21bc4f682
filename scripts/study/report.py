"""Tables and plots of methods compared at equal density, from the rows of compare_methods.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bench.plots import legend_outside, style
from bench.prefills import DENSE
from scipy.stats import rankdata
from sparse_patch_eval.base.markdown import table
from sparse_patch_eval.base.rows import Row
from sparse_patch_eval.base.stats import bootstrap
from sparse_patch_eval.tasks.problem import CANDIDATES

# A method is ranked where it keeps, on the measured prompts, what the target says give or take this
# share: texts differ in density, so that tuning on other prompts does not meet it exactly.
SLACK = 0.1
# Dense must put the right number first at least this often, or the task says nothing.
_MEASURABLE = 2 / CANDIDATES


@dataclass(frozen=True)
class Entry:
    """A method as it is measured for a target.

    Attributes:
        target: density it was tuned for.
        method: as the user named it.
        spec: as it was tuned.
        has_knob: False: it is what it is, whatever the target.
    """

    target: float
    method: str
    spec: str
    has_knob: bool


@dataclass(frozen=True)
class Metric:
    """A column: what a row says, minus what dense says of the same prompt."""

    key: str
    title: str
    lower_is_better: bool


KL = Metric("kl", "KL to dense", True)
NLL = Metric("nll", "NLL - dense", True)
NEEDLE_NLL = Metric("needle_nll", "needle NLL - dense", True)
MARGIN = Metric("margin", "needle margin - dense", False)
RECALL = Metric("recall", "recall - 1", False)
ERROR = Metric("error", "output error", True)


class Group:
    """Methods that share a table, on the prompts that all of them were measured on."""

    def __init__(self, specs: Iterable[str], rows: list[Row], target: float | None) -> None:
        self.specs, self.target = list(dict.fromkeys(specs)), target
        by_key = {(row["method"], row["prompt"]): row for row in rows}
        self.prompts = sorted(
            prompt
            for prompt in {row["prompt"] for row in rows}
            if all((spec, prompt) in by_key for spec in (DENSE, *self.specs))
        )
        self.rows = {
            spec: [by_key[spec, prompt] for prompt in self.prompts] for spec in (DENSE, *self.specs)
        }

    def density(self, spec: str) -> float:
        return fmean(row["density"] for row in self.rows[spec])

    def values(self, spec: str, metric: Metric) -> list[float]:
        """One a prompt: the method's minus dense's."""
        pairs = zip(self.rows[spec], self.rows[DENSE], strict=True)
        return [row[metric.key] - dense[metric.key] for row, dense in pairs]

    def means(self, metric: Metric) -> dict[str, float]:
        """By method, smallest first."""
        means = {spec: fmean(self.values(spec, metric)) for spec in self.specs}
        return dict(sorted(means.items(), key=lambda item: item[1]))

    @property
    def ranked(self) -> list[str]:
        """Those that keep what the target says."""
        return [
            spec
            for spec in self.specs
            if self.target is not None and abs(self.density(spec) / self.target - 1) <= SLACK
        ]

    @property
    def keys(self) -> list[int]:
        """Numbers of keys that the prompts have."""
        return sorted({row["keys"] for row in self.rows[DENSE]})


def groups(entries: list[Entry], rows: list[Row]) -> list[Group]:
    """A group per target, and one of methods without a knob."""
    targets = dict.fromkeys(entry.target for entry in entries)
    found = [
        Group([e.spec for e in entries if e.has_knob and e.target == target], rows, target)
        for target in targets
    ]
    found.append(Group([e.spec for e in entries if not e.has_knob], rows, None))
    return [group for group in found if group.specs and group.prompts]


def markdown(entries: list[Entry], rows: list[Row], *, seed: int, about: str) -> str:
    """Per target: text and attention, needles, who wins; then how to read it."""
    sections = [_section(group, seed) for group in groups(entries, rows)]
    foot = (
        "Means over prompts [95 % bootstrap interval, paired] (rank). KL and NLL: nats, on the "
        "last positions of prose before the question; needles: nats per token of the number, "
        "margin over the best of seven others, all numbers of the prompt among them; greedy: "
        "prompts whose number greedy decoding would write. Density: of all layers, on these "
        f"prompts; not ranked (-) where it is more than {SLACK:.0%} off the target. Recall and "
        f"output error: a sample of layers. {about}"
    )
    return "\n\n".join([*sections, foot]) + "\n"


def _section(group: Group, seed: int) -> str:
    title = "its own density" if group.target is None else f"density {group.target:g}"
    lines, by_kl = [f"## At {title}, {len(group.prompts)} prompts", ""], group.means(KL)
    metrics = (KL, NLL, RECALL, ERROR)
    columns = {metric: _column(group, metric, seed) for metric in (*metrics, NEEDLE_NLL, MARGIN)}
    lines += table(
        ("method", "density", *(metric.title for metric in metrics)),
        "lrrrrr",
        (
            (spec, f"{group.density(spec):.3f}", *(columns[metric][spec] for metric in metrics))
            for spec in by_kl
        ),
    )
    head = ["method", NEEDLE_NLL.title, MARGIN.title]
    head += [f"{what}, {_keys(keys)}" for keys in group.keys for what in ("margin", "greedy")]
    needles = (
        (spec, *(columns[metric].get(spec, "0") for metric in (NEEDLE_NLL, MARGIN)),
         *(cell for keys in group.keys for cell in _needles(group, spec, keys)))
        for spec in (DENSE, *by_kl)
    )  # fmt: skip
    lines += ["", *table(head, "l" + "r" * (len(head) - 1), needles)]
    if group.ranked:
        lines += ["", *(_verdict(group, metric, seed) for metric in (KL, NEEDLE_NLL, MARGIN))]
    return "\n".join([*lines, *_unmeasurable(group)])


def _column(group: Group, metric: Metric, seed: int) -> dict[str, str]:
    """Mean, interval and rank of each method."""
    means, ranked = group.means(metric), group.ranked
    places = ranks({spec: means[spec] for spec in ranked}, metric.lower_is_better)
    return {
        spec: f"{bootstrap(group.values(spec, metric), seed=seed)} ({places.get(spec, '-')})"
        for spec in group.specs
    }


def _needles(group: Group, spec: str, keys: int) -> tuple[str, str]:
    """Margin, and how often right, on prompts with so many keys."""
    mine = [row for row in group.rows[spec] if row["keys"] == keys]
    right = sum(row["right"] for row in mine)
    return f"{fmean(row['margin'] for row in mine):.3f}", f"{right}/{len(mine)}"


def _keys(number: int) -> str:
    return f"{number} key{'s' if number > 1 else ''}"


def _verdict(group: Group, metric: Metric, seed: int) -> str:
    values = {spec: group.values(spec, metric) for spec in group.ranked}
    best, ties = winner(values, metric.lower_is_better, seed)
    others = f"not told apart from it: {', '.join(ties)}" if ties else "told apart from all"
    return f"- {metric.title}: best is {best}; {others}."


def _unmeasurable(group: Group) -> list[str]:
    lines = []
    for keys in group.keys:
        dense = [row for row in group.rows[DENSE] if row["keys"] == keys]
        first = sum(row["margin"] > 0 for row in dense)
        if first < _MEASURABLE * len(dense):
            lines.append(
                f"- Prompts with {_keys(keys)}: not measurable with this model, dense puts the "
                f"right number first in {first} of {len(dense)} prompts."
            )
    return lines


def ranks(means: Mapping[str, float], lower_is_better: bool) -> dict[str, int]:
    """1 for the best; equals share the better rank."""
    sign = 1 if lower_is_better else -1
    places = rankdata([sign * mean for mean in means.values()], method="min")
    return {name: int(place) for name, place in zip(means, places, strict=True)}


def winner(
    values: Mapping[str, Sequence[float]], lower_is_better: bool, seed: int = 0
) -> tuple[str, list[str]]:
    """The method with the best mean, and those that cannot be told apart from it, best first.

    That is, whose paired difference to it has an interval with 0 in it.

    Args:
        values: one number a prompt, prompts in the same order.
    """
    sign = 1 if lower_is_better else -1
    best, *others = sorted(values, key=lambda name: sign * fmean(values[name]))
    ties = []
    for name in others:
        gap = bootstrap([a - b for a, b in zip(values[name], values[best], strict=True)], seed=seed)
        if gap.low <= 0 <= gap.high:
            ties.append(name)
    return best, ties


def draw(axes: Any, entries: list[Entry], rows: list[Row], metric: str) -> None:
    """A metric (`kl` or `margin`) against density, a line per method over its targets."""
    found = groups(entries, rows)
    for number, method in enumerate(dict.fromkeys(entry.method for entry in entries)):
        specs = {entry.spec for entry in entries if entry.method == method}
        points = sorted(
            (group.density(spec), fmean(row[metric] for row in group.rows[spec]))
            for group in found
            for spec in group.specs
            if spec in specs
        )
        if points:
            axes.plot(*zip(*points, strict=True), label=method, **style(number))
    axes.set_xlabel("density: kept / causal, all layers")
    if metric == "kl":
        axes.set_yscale("log")
        axes.set_ylabel("KL(dense || sparse), nats")
    else:
        dense = fmean(row[metric] for row in rows if row["method"] == DENSE)
        axes.axhline(dense, color="gray", linestyle="--", linewidth=1, label=DENSE)
        axes.set_ylabel("needle margin, nats per token")
    legend_outside(axes)
