"""The comparison as text: Markdown for people, two tidy CSV files for programs."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparse_patch_eval.base.console import visible
from sparse_patch_eval.base.markdown import table
from sparse_patch_eval.base.stats import Estimate
from sparse_patch_eval.report.chance import MARGIN
from sparse_patch_eval.report.comparison import Comparison
from sparse_patch_eval.report.scores import Score
from sparse_patch_eval.report.sections import Section
from sparse_patch_eval.runs.format import Sample

NOT_MEASURABLE = "not measurable with this model"
HOW_TO_READ = (
    "Scores are means over samples. In brackets: the difference to dense, mean over the samples "
    "that both runs have (paired by task, length, document and prompt), with its 95 % bootstrap "
    "interval. A difference counts if its interval excludes 0 and "
    "there are at least ten pairs.",
    f"“{NOT_MEASURABLE}”: dense itself is near chance, so a method has nothing to lose. The "
    "rule: the lower end of dense's 95 % interval (Clopper-Pearson where every sample is right or "
    f"wrong, bootstrap otherwise) is not more than {MARGIN} above the score's chance level (rank: "
    "1/8, matches: 0).",
    "Averages are means of task means, over the tasks that can be measured; “2/13”: 2 of 13 tasks.",
    "nll and kl: nats per token; kl is KL(dense || method); perplexity is exp(mean nll). "
    "answer_nll: nats per token of the right answer.",
    "Density: kept / causal blocks, mean over samples; attention calls that ran exact count as 1 "
    "where the run counts its calls. Recall: attention mass kept, on a sample of rows. Prefill: "
    "median. Speed-up: median over pairs of dense time / method time, on the same machine. Exact: "
    "share of the prefill's attention calls that ran dense.",
)
_SUMMARY = (
    "model", "dtype", "device", "seed", "chat_template", "benchmark", "task", "length", "method",
    "score", "primary", "higher_is_better", "n", "mean", "difference", "difference_low",
    "difference_high", "paired", "measurable", "tasks_averaged", "tasks", "density", "recall",
    "prefill_seconds", "speed_up", "exact_share", "exact", "truncated", "flags",
)  # fmt: skip
_SAMPLES = (
    "model", "dtype", "device", "seed", "chat_template", "benchmark", "task", "length", "method",
    "doc_id", "prompt_hash", "tokens", "depth", "score", "value", "density", "recall",
    "exact_calls", "sparse_calls", "prefill_seconds", "truncated",
)  # fmt: skip


def markdown(rows: Sequence[Comparison]) -> str:
    """The main table: a heading per model setting, a table per benchmark, then how to read it."""
    parts = []
    for section in _unique(row.section for row in rows):
        section_rows = [row for row in rows if row.section is section]
        heading = f"## {_plain(section.model)} ({_plain(section.settings)})"
        parts += [heading, *section_notes(section)]
        for benchmark in dict.fromkeys(row.benchmark for row in section_rows):
            benchmark_rows = [row for row in section_rows if row.benchmark == benchmark]
            parts += [f"### {_plain(benchmark)}", "\n".join(_table(benchmark_rows))]
    parts += ["\n".join(f"- {line}" for line in HOW_TO_READ)]
    return "\n\n".join(parts) + "\n"


def section_notes(section: Section) -> list[str]:
    """What a reader of a section must know first."""
    notes = []
    if not section.dense:
        notes.append("No dense run of this setting is here: there are no differences to show.")
    for label, run in section.runs.items():
        notes += [f"{_plain(label)}: {_plain(note)}." for note in run.notes]
    return notes


def _table(rows: list[Comparison]) -> list[str]:
    others = dict.fromkeys(name for row in rows for name in list(row.scores)[1:])
    head = ["task", "length", "method", "n", "primary score", *others]
    head += ["density", "recall", "prefill s", "speed-up", "exact", "remarks"]
    align = "lll" + "r" * (len(head) - 4) + "l"
    lines = ([_plain(cell) for cell in _cells(row, others)] for row in rows)
    return table([_plain(name) for name in head], align, lines)


def _cells(row: Comparison, others: Iterable[str]) -> list[str]:
    primary, rest = row.primary, list(row.scores)[1:]
    cells = [row.task, number(row.length, ","), row.method, str(row.n)]
    cells += ["-" if primary is None else f"{primary.name}: {score_text(primary)}"]
    cells += [score_text(row.scores[name]) if name in rest else "-" for name in others]
    cells += [number(row.density), number(row.recall), number(row.prefill_seconds, ".2f")]
    return [
        *cells,
        number(row.speed_up, ".2f"),
        number(row.exact_share, ".0%"),
        "; ".join(row.flags),
    ]


def score_text(score: Score) -> str:
    """`0.850 (-0.050 [-0.150, 0.050])`, or the mean and that it cannot be measured."""
    mean = number(score.mean)
    if score.tasks is not None and score.tasks[0] < score.tasks[1] and score.measurable:
        mean += f", {score.tasks[0]}/{score.tasks[1]} tasks"
    if score.measurable is False:
        return f"{mean}, {NOT_MEASURABLE}"
    return mean if score.difference is None else f"{mean} ({difference_text(score.difference)})"


def difference_text(gap: Estimate) -> str:
    return f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


def number(value: float | None, form: str = ".3f") -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def write_summary(path: Path, rows: Iterable[Comparison]) -> None:
    """The main table: a line per task, length, method and score; numbers in full."""
    _write(path, _SUMMARY, (line for row in rows for line in _summary_lines(row)))


def _summary_lines(row: Comparison) -> Iterable[dict[str, Any]]:
    shared = {
        **_setting(row.section, row.benchmark, row.task, row.length, row.method),
        "density": row.density,
        "recall": row.recall,
        "prefill_seconds": row.prefill_seconds,
        "speed_up": row.speed_up,
        "exact_share": row.exact_share,
        "exact": "; ".join(f"{reason}: {calls}" for reason, calls in row.exact.items()),
        "truncated": row.truncated,
        "flags": "; ".join(row.flags),
    }
    for score in row.scores.values():
        gap = score.difference
        yield {
            **shared,
            "score": score.name,
            "primary": score is row.primary,
            "higher_is_better": score.higher_is_better,
            "n": score.n,
            "mean": score.mean,
            "difference": gap and gap.mean,
            "difference_low": gap and gap.low,
            "difference_high": gap and gap.high,
            "paired": gap.n if gap else 0,
            "measurable": score.measurable,
            "tasks_averaged": score.tasks and score.tasks[0],
            "tasks": score.tasks and score.tasks[1],
        }


def write_samples(path: Path, sections: Iterable[Section]) -> None:
    """A line per sample and score of every run."""
    lines = (
        {**_sample_line(section, label, sample), "score": name, "value": value}
        for section in sections
        for label, run in section.runs.items()
        for sample in run.samples
        for name, value in sample.scores.items()
    )
    _write(path, _SAMPLES, lines)


def _sample_line(section: Section, label: str, sample: Sample) -> dict[str, Any]:
    names = ("doc_id", "prompt_hash", "tokens", "depth", "density", "recall", "exact_calls",
             "sparse_calls", "prefill_seconds", "truncated")  # fmt: skip
    setting = _setting(section, sample.benchmark, sample.task, sample.length, label)
    return {**setting, **{name: getattr(sample, name) for name in names}}


def _setting(
    section: Section, benchmark: str, task: str, length: int | None, method: str
) -> dict[str, Any]:
    names = ("model", "dtype", "device", "seed", "chat_template")
    return {
        **{name: getattr(section, name) for name in names},
        "benchmark": benchmark,
        "task": task,
        "length": length,
        "method": method,
    }


def _write(path: Path, names: Sequence[str], lines: Iterable[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.DictWriter(file, names, lineterminator="\n")
        table.writeheader()
        table.writerows(lines)


def _plain(text: str) -> str:
    """Text on one line, escaped for Markdown and the HTML in it."""
    safe = visible(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    for mark in "\\|`*":
        safe = safe.replace(mark, f"\\{mark}")
    return safe.replace("](", "]\\(")


def _unique(sections: Iterable[Section]) -> list[Section]:
    return list({id(section): section for section in sections}.values())
