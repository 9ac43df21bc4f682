"""The report as one HTML page (see `html`)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_patch_eval.base.html import render
from sparse_patch_eval.report.comparison import Comparison
from sparse_patch_eval.report.figures import figures, overall
from sparse_patch_eval.report.scores import Score
from sparse_patch_eval.report.sections import Section, dense_partners
from sparse_patch_eval.report.text import HOW_TO_READ, NOT_MEASURABLE, difference_text, number
from sparse_patch_eval.runs.format import Sample
from sparse_patch_eval.runs.reading import Run

ANSWERS = 20
_LONGEST_ANSWER = 600


@dataclass(frozen=True)
class Cell:
    """A table cell: text, sort key, small lines below the text, and a CSS class."""

    text: str
    sort: float | str | None = None
    remark: str = ""
    difference: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A sortable table; `filters`: columns whose values can be filtered."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    filters: tuple[int, ...] = ()


@dataclass(frozen=True)
class Differing:
    """Samples on which a method's answer differs from dense's."""

    method: str
    compared: int
    differ: int
    scored: int
    examples: tuple[dict[str, Any], ...]


def page(sections: Sequence[Section], rows: Sequence[Comparison], *, answers: int = ANSWERS) -> str:
    """The HTML text; `answers`: number of differing answers to show per method.

    Raises:
        ImportError: jinja2, matplotlib or scipy is missing.
    """
    return render(
        "report.html.j2",
        scripts=["report.js"],
        styles=["report.css"],
        how_to_read=HOW_TO_READ,
        sections=[
            _section(section, [row for row in rows if row.section is section], answers)
            for section in sections
        ],
    )


def _section(section: Section, rows: list[Comparison], answers: int) -> dict[str, Any]:
    return {
        "model": section.model,
        "settings": section.settings,
        "no_dense": not section.dense,
        "notes": [(label, note) for label, run in section.runs.items() for note in run.notes],
        "warnings": _warnings(rows),
        "unmeasurable": _unmeasurable(rows),
        "overview": _tables([row for group in overall(rows) for row in group]),
        "tables": _tables(rows),
        "figures": figures(section, rows),
        "differing": [
            _differing(section, label, answers)
            for label, run in section.runs.items()
            if section.dense and not run.is_dense
        ],
        "methods": [
            {"label": label, "run": run, "params": _settings(run.params), **_provenance(run)}
            for label, run in section.runs.items()
        ],
        "command": command(section),
    }


def _warnings(rows: Sequence[Comparison]) -> list[tuple[str, list[str]]]:
    """The flags of each method, with the tasks and lengths they apply to."""
    places_of: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for flag in row.flags if not row.is_average else ():
            place = row.task if row.length is None else f"{row.task} at {row.length:,}"
            places_of.setdefault(row.method, {}).setdefault(flag, []).append(place)
    return [
        (method, [f"{flag}: {', '.join(places)}" for flag, places in flags.items()])
        for method, flags in places_of.items()
    ]


def _unmeasurable(rows: Sequence[Comparison]) -> list[tuple[str, str]]:
    """Tasks, and their scores that cannot be measured, with the lengths."""
    scores_of: dict[str, dict[str, dict[str, None]]] = {}
    for row in rows:
        for score in row.scores.values() if not row.is_average else ():
            if score.measurable is False:
                length = "" if row.length is None else f"{row.length:,}"
                scores_of.setdefault(row.task, {}).setdefault(score.name, {})[length] = None
    return [
        (task, "; ".join(_at(name, list(lengths)) for name, lengths in names.items()))
        for task, names in scores_of.items()
    ]


def _at(name: str, lengths: list[str]) -> str:
    return f"{name} at {', '.join(lengths)}" if any(lengths) else name


def _tables(rows: Sequence[Comparison]) -> list[Table]:
    """One table per benchmark, since benchmarks differ in their scores."""
    benchmarks = dict.fromkeys(row.benchmark for row in rows)
    return [_table(name, [row for row in rows if row.benchmark == name]) for name in benchmarks]


def _table(title: str, rows: Sequence[Comparison]) -> Table:
    """A table with one column for the primary score and one for each other score."""
    primary = {row.primary.name for row in rows if row.primary}
    others = list(dict.fromkeys(name for row in rows for name in list(row.scores)[1:]))
    scores = {name: score for row in rows for name, score in row.scores.items()}
    shared = primary.pop() if len(primary) == 1 else None
    head = ["Task", "Length", "Method", "n", _heading(scores[shared]) if shared else "Score"]
    head += [_heading(scores[name]) for name in others]
    head += ["Density", "Recall", "Prefill", "Speed-up", "Exact", "Remarks"]
    lines = tuple(_row(row, others, named=shared is None) for row in rows)
    return Table(title, tuple(head), lines, (0, 1, 2))


def _heading(score: Score) -> str:
    return f"{score.name} {'↑' if score.higher_is_better else '↓'}"


def _row(row: Comparison, others: Sequence[str], *, named: bool) -> tuple[Cell, ...]:
    task = f"{row.benchmark} average" if row.is_average else row.task
    rest = list(row.scores.values())[1:]
    cells = [
        Cell(task, task, kind="average" if row.is_average else "name"),
        Cell(number(row.length, ","), row.length),
        Cell(row.method, row.method, "mostly exact" if row.is_mostly_exact else "", kind="name"),
        Cell(str(row.n), row.n),
        Cell("-") if row.primary is None else _score(row.primary, named=named),
    ]
    cells += [
        next((_score(score) for score in rest if score.name == name), Cell("-")) for name in others
    ]
    cells += [_value(row.density), _value(row.recall), _value(row.prefill_seconds, ".2f", " s")]
    cells += [_value(row.speed_up, ".2f", "x"), _value(row.exact_share, ".0%")]
    flags = "; ".join(row.flags)
    return (*cells, Cell(flags, flags, kind="flag" if row.is_mostly_exact else "text"))


def _value(value: float | None, form: str = ".3f", unit: str = "") -> Cell:
    return Cell("-" if value is None else number(value, form) + unit, value)


def _score(score: Score, *, named: bool = False) -> Cell:
    """The mean; below it the difference to dense, coloured where its interval excludes 0."""
    remarks = [score.name] if named else []
    if score.measurable is False:
        return Cell(number(score.mean), score.mean, NOT_MEASURABLE, kind="unmeasurable")
    if score.tasks is not None and score.tasks[0] < score.tasks[1]:
        remarks.append(f"{score.tasks[0]} of {score.tasks[1]} tasks")
    gap, text, kind = score.difference, "", ""
    if gap is not None:
        text = difference_text(gap).replace("-", "\N{MINUS SIGN}")
        if score.is_clear:
            kind = "better" if (gap.mean > 0) == score.higher_is_better else "worse"
    return Cell(number(score.mean), score.mean, ", ".join(remarks), text, kind)


def _differing(section: Section, label: str, limit: int) -> Differing:
    """Differing answers: first those with another primary score, then the rest, in run order."""
    partners = dense_partners(section, label)
    pairs = [
        (sample, partners[sample.key])
        for sample in section.runs[label].samples
        if sample.answer is not None and sample.key in partners
    ]
    differ = [(own, dense) for own, dense in pairs if own.answer != dense.answer]
    scored = [pair for pair in differ if _primary(pair[0]) != _primary(pair[1])]
    rest = [pair for pair in differ if _primary(pair[0]) == _primary(pair[1])]
    return Differing(
        label, len(pairs), len(differ), len(scored),
        tuple(_example(*pair) for pair in (scored + rest)[:limit]),
    )  # fmt: skip


def _primary(sample: Sample) -> tuple[str, float] | None:
    return next(iter(sample.scores.items()), None)


def _example(own: Sample, dense: Sample) -> dict[str, Any]:
    place = [own.task, "" if own.length is None else f"{own.length:,} tokens"]
    place += [f"document {own.doc_id}", "" if own.depth is None else f"depth {own.depth:.0%}"]
    return {
        "where": ", ".join(filter(None, place)),
        "prompt_hash": own.prompt_hash,
        "answers": [
            ("target", "", _clipped(own.target)),
            ("dense", _score_line(dense), _clipped(dense.answer)),
            ("method", _score_line(own), _clipped(own.answer)),
        ],
    }


def _score_line(sample: Sample) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in sample.scores.items())


def _clipped(text: str | None) -> str:
    if text is None:
        return "-"
    rest = len(text) - _LONGEST_ANSWER
    return text if rest <= 0 else f"{text[:_LONGEST_ANSWER]} … ({rest} more characters)"


def _settings(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in params.items()) or "none"


def _provenance(run: Run) -> dict[str, Any]:
    """Machines, versions and commits behind a run's samples, and its patch settings."""
    names = ("device", "cpu_capability", "threads", "platform")
    tools = ("python", "torch", "transformers", "sparse_patch", "git")
    machines = dict.fromkeys(
        (
            ", ".join(_named(sample, name) for name in names if name in sample.machine),
            ", ".join(f"{name} {sample.machine[name]}" for name in tools if name in sample.machine),
        )
        for sample in run.samples
    )
    return {"machines": list(machines), "patch": _settings(run.patch)}


def _named(sample: Sample, name: str) -> str:
    value = str(sample.machine[name])
    return f"{value} threads" if name == "threads" else value


def command(section: Section) -> str:
    """The `sparse-patch eval` command that reproduces the runs."""
    runs = list(section.runs.values())
    samples = [sample for run in runs for sample in run.samples]
    lengths = sorted({sample.length for sample in samples if sample.length is not None})
    counts: dict[tuple[str, str, int | None], int] = {}
    for label, run in section.runs.items():
        for sample in run.samples:
            key = (label, sample.task, sample.length)
            counts[key] = counts.get(key, 0) + 1
    words = ["sparse-patch eval", f"--model {shlex.quote(section.model)}"]
    words += [f"--method {shlex.quote(spec)}" for spec in dict.fromkeys(run.method for run in runs)]
    benchmarks = dict.fromkeys(sample.benchmark for sample in samples)
    if benchmarks:
        words.append(f"--tasks {shlex.quote(','.join(benchmarks))}")
    if lengths:
        words.append(f"--lengths {','.join(map(str, lengths))}")
    if counts:
        words.append(f"--limit {max(counts.values())}")
    words += [f"--seed {section.seed}", f"--dtype {shlex.quote(section.dtype)}"]
    words += [f"--device {shlex.quote(section.device)}"]
    words += ["--chat-template"] if section.chat_template else []
    patch = next((run.patch for run in runs if run.patch), {})
    for name, value in patch.items():
        flag = shlex.quote(f"--{name.replace('_', '-')}")
        words.append(f"{flag} {shlex.quote(str(value))}")
    return " \\\n  ".join(words)
