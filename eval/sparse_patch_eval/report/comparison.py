"""Runs compared with dense on the same samples: the main table of `eval` and `report`.

Runs of one model setting (model, dtype, device, seed, chat template) make a `Section`; within it
every method is compared with the unpatched model, paired by (task, length, doc_id, prompt_hash).
Intervals are percentile bootstraps over paired samples (`stats`), the seed fixed.

A score on which dense itself is near chance is marked as not measurable (`chance`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

from sparse_patch_eval.report.scores import FEW, Cells, Score, score_columns
from sparse_patch_eval.report.sections import Section, dense_partners, sections
from sparse_patch_eval.runs.format import Sample
from sparse_patch_eval.runs.reading import Run

AVERAGE = "average"
# Share of exact calls above which a run says little about its method.
MOSTLY_EXACT = 0.5


@dataclass(frozen=True)
class Comparison:
    """A row of the main table: one method on one task (or a benchmark's average) at one length.

    Attributes:
        n: number of samples; paired: those that dense has too (0 for dense itself).
        scores: the primary one first; an average has only the scores of all its tasks.
        density: kept / causal blocks, exact calls counted as 1 where the run counts its calls.
        recall: attention mass kept; None if it was not measured.
        prefill_seconds: median.
        speed_up: median over pairs of dense time / method time, on the same machine.
        exact_share: of the prefill's attention calls; None if the run does not count sparse calls.
        exact: exact calls by reason.
        truncated: number of samples with a truncated prompt.
        flags: warnings about the numbers.
    """

    section: Section
    benchmark: str
    task: str
    length: int | None
    method: str
    n: int
    paired: int
    scores: Mapping[str, Score]
    density: float | None
    recall: float | None
    prefill_seconds: float | None
    speed_up: float | None
    exact_share: float | None
    exact: Mapping[str, int]
    truncated: int
    flags: tuple[str, ...]

    @property
    def primary(self) -> Score | None:
        return next(iter(self.scores.values()), None)

    @property
    def is_average(self) -> bool:
        return self.task == AVERAGE

    @property
    def is_mostly_exact(self) -> bool:
        """Did so many calls run exact that the scores are dense's, not the method's?"""
        if self.exact_share is not None:
            return self.exact_share > MOSTLY_EXACT
        return bool(self.exact) and self.density == 1


def comparison_table(runs: Iterable[Run]) -> list[Comparison]:
    """All rows: by section, benchmark, task and length, then method, dense first.

    A benchmark of several tasks ends with its average, at each length.
    """
    return [row for section in sections(runs) for row in compare_section(section)]


def compare_section(section: Section) -> list[Comparison]:
    """The rows of one section."""
    cells = Cells(section)
    rows = []
    for benchmark, tasks in cells.tasks.items():
        for task in tasks:
            for length in _ascending(cells.lengths[benchmark, task]):
                rows += [
                    _compare(cells, benchmark, (task,), length, label)
                    for label in section.runs
                    if cells.samples.get((benchmark, task, length, label))
                ]
        lengths = {length for task in tasks for length in cells.lengths[benchmark, task]}
        for length in _ascending(lengths):
            measured = tuple(task for task in tasks if length in cells.lengths[benchmark, task])
            if len(measured) > 1:
                rows += [
                    _compare(cells, benchmark, measured, length, label)
                    for label in section.runs
                    if all(cells.samples.get((benchmark, task, length, label)) for task in measured)
                ]
    return rows


def _ascending(lengths: Iterable[int | None]) -> list[int | None]:
    return sorted(lengths, key=lambda length: -1 if length is None else length)


def _compare(
    cells: Cells, benchmark: str, tasks: tuple[str, ...], length: int | None, label: str
) -> Comparison:
    run, partners = cells.section.runs[label], cells.partners[label]
    groups = {task: cells.samples[benchmark, task, length, label] for task in tasks}
    samples = [sample for group in groups.values() for sample in group]
    pairs = [] if run.is_dense else [(s, partners[s.key]) for s in samples if s.key in partners]
    calls = Counter[str]()
    for sample in samples:
        calls.update({reason: n for reason, n in sample.exact.items() if reason != "decode" and n})
    seconds = [s.prefill_seconds for s in samples if s.prefill_seconds is not None]
    row = Comparison(
        section=cells.section,
        benchmark=benchmark,
        task=tasks[0] if len(tasks) == 1 else AVERAGE,
        length=length,
        method=label,
        n=len(samples),
        paired=len(pairs),
        scores=score_columns(cells, benchmark, length, groups, label),
        density=_mean(1.0 if run.is_dense else sample.overall_density for sample in samples),
        recall=_mean(sample.recall for sample in samples),
        prefill_seconds=median(seconds) if seconds else None,
        speed_up=_speed_up(pairs),
        exact_share=None if run.is_dense else _exact_share(samples),
        exact={} if run.is_dense else dict(calls.most_common()),
        truncated=sum(sample.truncated > 0 for sample in samples),
        flags=(),
    )
    return _flagged(row, run)


def _flagged(row: Comparison, run: Run) -> Comparison:
    flags = []
    if not run.is_dense:
        flags += _exact_flag(row)
        if row.section.dense and row.paired < row.n:
            flags.append(f"{row.paired} of {row.n} samples paired with dense")
        if 0 < row.paired < FEW:
            flags.append(f"only {row.paired} pairs: intervals too narrow")
    if row.truncated:
        flags.append(f"{row.truncated} of {row.n} prompts truncated")
    return replace(row, flags=tuple(flags))


def _exact_flag(row: Comparison) -> list[str]:
    if not row.is_mostly_exact:
        return []
    how = "no call ran sparse"
    if row.exact_share is not None and row.exact_share < 1:
        how = f"{row.exact_share:.0%} of the attention calls ran dense"
    return [f"mostly exact: {how} ({', '.join(row.exact)})"]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _speed_up(pairs: Sequence[tuple[Sample, Sample]]) -> float | None:
    """Median time ratio of the pairs that ran on one machine."""
    ratios = [
        dense.prefill_seconds / own.prefill_seconds
        for own, dense in pairs
        if own.prefill_seconds and dense.prefill_seconds and _place(own) == _place(dense)
    ]
    return median(ratios) if ratios else None


def speed_ups(section: Section) -> dict[tuple[str, int | None], float]:
    """Speed-ups by method and length, over the samples of all tasks; without dense."""
    ratios = {}
    for label, run in section.runs.items():
        partners = dense_partners(section, label)
        pairs: dict[int | None, list[tuple[Sample, Sample]]] = {}
        for sample in () if run.is_dense else run.samples:
            if sample.key in partners:
                pairs.setdefault(sample.length, []).append((sample, partners[sample.key]))
        for length, members in pairs.items():
            ratio = _speed_up(members)
            if ratio is not None:
                ratios[label, length] = ratio
    return ratios


def _place(sample: Sample) -> tuple[Any, ...]:
    return tuple(sample.machine.get(name) for name in ("device", "threads", "torch"))


def _exact_share(samples: Sequence[Sample]) -> float | None:
    counted = [s for s in samples if s.sparse_calls is not None]
    exact = sum(s.exact_calls for s in counted)
    calls = exact + sum(s.sparse_calls or 0 for s in counted)
    return exact / calls if calls else None
