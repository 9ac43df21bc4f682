"""The scores of one method: means, differences to dense, and whether dense can do the task.

Differences are over pairs of samples with one key. An average over tasks is the mean of the tasks'
means over those tasks that can be measured; its interval draws samples within each task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, inf
from statistics import fmean

from sparse_patch_eval.base.stats import Estimate, bootstrap_groups
from sparse_patch_eval.report.chance import SEED, above_chance, chance
from sparse_patch_eval.report.sections import Section, dense_partners
from sparse_patch_eval.runs.format import Key, Sample

# With fewer pairs a bootstrap interval says little; with one pair it has no width.
FEW = 10


@dataclass(frozen=True)
class Score:
    """One score of one method.

    Attributes:
        n: number of samples with the score; of an average, in all its tasks.
        mean: over those samples; of an average, the mean of its tasks' means.
        difference: to dense, over the paired samples; None for dense, and without a pair.
        measurable: is dense above chance? None without a chance level or without dense.
        tasks: of an average, the numbers of averaged tasks and of all tasks; else None.
    """

    name: str
    higher_is_better: bool
    n: int
    mean: float
    difference: Estimate | None = None
    measurable: bool | None = None
    tasks: tuple[int, int] | None = None

    @property
    def is_clear(self) -> bool:
        """Is the difference to dense significant: enough pairs, and 0 outside of its interval?"""
        gap = self.difference
        return gap is not None and gap.n >= FEW and not gap.low <= 0 <= gap.high


class Cells:
    """A section's samples by (benchmark, task, length, label), and dense's samples for each."""

    def __init__(self, section: Section) -> None:
        self.section = section
        self.samples: dict[tuple[str, str, int | None, str], list[Sample]] = {}
        self.tasks: dict[str, dict[str, None]] = {}
        self.lengths: dict[tuple[str, str], set[int | None]] = {}
        for label, run in section.runs.items():
            for sample in run.samples:
                benchmark, task, length = sample.benchmark, sample.task, sample.length
                self.samples.setdefault((benchmark, task, length, label), []).append(sample)
                self.tasks.setdefault(benchmark, {})[task] = None
                self.lengths.setdefault((benchmark, task), set()).add(length)
        self.partners = {label: dense_partners(section, label) for label in section.runs}
        self._measurable: dict[tuple[str, str, int | None, str], bool | None] = {}

    def measurable(self, benchmark: str, task: str, length: int | None, score: str) -> bool | None:
        """Is dense above chance? None without a chance level or without dense."""
        key = (benchmark, task, length, score)
        if key not in self._measurable:
            dense_samples: dict[Key, Sample] = {}
            for label in self.section.dense:
                dense_samples.update(
                    {s.key: s for s in self.samples.get((benchmark, task, length, label), ())}
                )
            values = [s.scores[score] for s in dense_samples.values() if score in s.scores]
            level = chance(task, score)
            self._measurable[key] = (
                None if level is None or not values else above_chance(values, level)
            )
        return self._measurable[key]


def score_columns(
    cells: Cells,
    benchmark: str,
    length: int | None,
    groups: Mapping[str, list[Sample]],
    label: str,
) -> dict[str, Score]:
    """A method's scores on a task, or on several (`groups`: samples by task), primary first."""
    names = {task: _names(samples) for task, samples in groups.items()}
    first = [next(iter(found), None) for found in names.values()]
    common = [name for name in next(iter(names.values())) if all(name in n for n in names.values())]
    # Tasks with several primary scores, all better high: suites quote their mean.
    columns = {name: dict.fromkeys(groups, name) for name in common}
    directions = cells.section.runs[label].higher_is_better
    if len(set(first)) > 1 and all(name and directions[name] for name in first):
        mixed = {task: name for task, name in zip(groups, first, strict=True) if name}
        columns = {"primary scores": mixed, **columns}
    found = {
        name: _score(cells, benchmark, length, groups, label, name, of)
        for name, of in columns.items()
    }
    if len(groups) == 1 and "nll" in found:
        nll = found["nll"]
        found["perplexity"] = Score("perplexity", False, nll.n, _exp(nll.mean))
    return found


def _exp(nats: float) -> float:
    return exp(nats) if nats < 700 or nats != nats else inf  # past that a float overflows


def _names(samples: list[Sample]) -> list[str]:
    return list(dict.fromkeys(name for sample in samples for name in sample.scores))


def _score(
    cells: Cells,
    benchmark: str,
    length: int | None,
    groups: Mapping[str, list[Sample]],
    label: str,
    name: str,
    of: Mapping[str, str],
) -> Score:
    """One column: the score `of[task]` of every task that can be measured (all, if none can)."""
    can = {task: cells.measurable(benchmark, task, length, of[task]) for task in groups}
    tasks = [task for task in groups if can[task] is not False] or list(groups)
    known = {can[task] for task in tasks}
    values = {t: [s.scores[of[t]] for s in groups[t] if of[t] in s.scores] for t in tasks}
    run = cells.section.runs[label]
    return Score(
        name=name,
        higher_is_better=run.higher_is_better[of[tasks[0]]],
        n=sum(map(len, values.values())),
        mean=fmean(fmean(task_values) for task_values in values.values()),
        difference=_difference(cells, {t: groups[t] for t in tasks}, label, of),
        measurable=None if None in known else known == {True},
        tasks=(len(tasks), len(groups)) if len(groups) > 1 else None,
    )


def _difference(
    cells: Cells, groups: Mapping[str, list[Sample]], label: str, of: Mapping[str, str]
) -> Estimate | None:
    if cells.section.runs[label].is_dense:
        return None
    partners = cells.partners[label]
    pairs = []
    for task, samples in groups.items():
        name = of[task]
        paired = [(s, partners[s.key]) for s in samples if s.key in partners]
        pairs.append(
            [
                # KL is relative to dense already, and dense may not have a KL of its own.
                s.scores[name] - (d.scores.get(name, 0.0) if name == "kl" else d.scores[name])
                for s, d in paired
                if name in s.scores and (name in d.scores or name == "kl")
            ]
        )
    return bootstrap_groups(pairs, seed=SEED) if all(pairs) else None
