"""Write a run: one model setting and one method, in a folder named after them (see `format`).

A folder is found again by its settings, so a stopped run resumes, a finished run is left alone, and
a run with other settings gets a folder of its own.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from sparse_patch import Method
from sparse_patch_eval.base.rows import Row, RowFile, read_rows
from sparse_patch_eval.runs.format import (
    FORMAT,
    KEY_FIELDS,
    RESULTS,
    RUN,
    SAMPLES,
    Key,
    density_of,
    key_of,
    read_object,
)
from sparse_patch_eval.runs.unit import Question, Unit, hash_of


def run_config(model: str, spec: str, method: Method | None, **settings: Any) -> dict[str, Any]:
    """The content of run.json.

    Args:
        model: as the user wrote it.
        spec: the method as the user wrote it.
        method: the parsed method; None for the unpatched model.
        settings: all else that can change a number.
    """
    params = asdict(method) if is_dataclass(method) else {}
    name = spec.partition(":")[0]
    config = {"format": FORMAT, "model": model, "method": spec, "name": name, "params": params}
    plain: dict[str, Any] = json.loads(json.dumps({**config, **settings}, default=str))
    return plain


class RunFolder:
    """One run.

    Args:
        output: parent folder of the runs to compare.
        config: from `run_config`.
        process: number of this process among those that share the work.

    Raises:
        ValueError: the folder holds another run.
    """

    def __init__(self, output: Path, config: Mapping[str, Any], process: int = 0) -> None:
        self.config = dict(config)
        # Spelling does not matter: gamma=.9 and gamma=0.90 are one run.
        identity = {key: value for key, value in config.items() if key != "method"}
        of_method = ("name", "params", "patch")
        settings = {key: identity[key] for key in identity if key not in of_method}
        self.path = _named(_named(output, config["model"], settings), config["method"], identity)
        self.path.mkdir(parents=True, exist_ok=True)
        self._check()
        self._file = RowFile(self.path / f"responses.{process}.jsonl", {})
        self.answered: dict[Key, Row] = {}
        for path in sorted(self.path.glob("responses.*.jsonl")):
            rows = RowFile(path, {}).rows
            _check_rows(path, rows)
            self.take(rows)

    def _check(self) -> None:
        path = self.path / RUN
        if not path.exists():
            _write(path, self.config)
            return
        stored = read_object(path)
        different = [
            key
            for key in {*stored, *self.config} - {"method"}
            if stored.get(key) != self.config.get(key)
        ]
        if different:
            raise ValueError(
                f"{path} belongs to another run ({', '.join(different)} differ): "
                "use another --output"
            )

    def find(self, unit: Unit, question: Question) -> Row | None:
        """The answer to a sample, if there is one."""
        of = {"task": unit.task, "length": unit.length, **vars(question)}
        return self.answered.get(key_of(of))

    def add(self, unit: Unit, question: Question, row: Row, *, write: bool = True) -> None:
        """Store the answer to a sample, on disk at once."""
        whole = {
            "benchmark": unit.benchmark,
            "task": unit.task,
            "length": unit.length,
            "doc_id": question.doc_id,
            "prompt_hash": question.prompt_hash,
            "depth": question.depth,
            **row,
        }
        if write:
            self._file.add(whole)
            whole = self._file.rows[-1]  # with the machine
        self.take([whole])

    def take(self, rows: Iterable[Row]) -> None:
        """Add rows that were answered elsewhere; the last row of a sample counts."""
        for row in rows:
            self.answered[key_of(row)] = row

    def write_scored(self, units: Iterable[Unit]) -> None:
        """Score all answers of these units into samples.jsonl and results.json.

        Samples and results of other units, from earlier calls, stay.
        """
        rows_before = read_rows(self.path / SAMPLES)
        _check_rows(self.path / SAMPLES, rows_before)
        samples = {_place(row): row for row in rows_before}
        better: dict[str, bool] = {}
        official: dict[str, Any] = {}
        results = self.path / RESULTS
        if results.exists():
            earlier = read_object(results, "higher_is_better", "lm_eval")
            better, official = earlier["higher_is_better"], earlier["lm_eval"]
        for unit in units:
            rows = {s.doc_id: row for s in unit.questions() if (row := self.find(unit, s))}
            if not rows:
                continue
            scored = unit.score(rows)
            _drop_stale(samples, rows.values())
            for doc_id, judged in scored.rows.items():
                whole = {k: v for k, v in rows[doc_id].items() if k not in ("responses", "scores")}
                samples[_place(whole)] = {**whole, **judged}
            better |= scored.higher_is_better
            if scored.official is not None:
                official[f"{unit.task}@{unit.length}" if unit.length else unit.task] = (
                    scored.official
                )
        ordered = list(samples.values())
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered)
        _replace(self.path / SAMPLES, text)
        means = {"higher_is_better": better, "tasks": summary(ordered), "lm_eval": official}
        _write(results, means)


def summary(samples: Iterable[Row]) -> list[Row]:
    """Means by task and length, and exact calls by reason, which count as density 1."""
    groups: dict[tuple[str, str, int | None], list[Row]] = {}
    for row in samples:
        groups.setdefault((row["benchmark"], row["task"], row["length"]), []).append(row)
    means = []
    for (benchmark, task, length), rows in groups.items():
        names = dict.fromkeys(name for row in rows for name in row["scores"])
        entry: Row = {"benchmark": benchmark, "task": task, "length": length, "n": len(rows)}
        entry["scores"] = {name: _mean([row["scores"].get(name) for row in rows]) for name in names}
        entry["density"] = _mean([density_of(row) for row in rows])
        for name in ("recall", "prefill_seconds"):
            entry[name] = _mean([row[name] for row in rows])
        exact: Counter[str] = Counter()
        for row in rows:
            exact.update(row["exact"])
        entry["exact"] = dict(exact.most_common())
        means.append(entry)
    return means


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _place(row: Row) -> tuple[str, int | None, int]:
    """A sample's place; a sample with a changed prompt replaces the old one."""
    return row["task"], row["length"], row["doc_id"]


def _check_rows(path: Path, rows: Iterable[Row]) -> None:
    """Raise a ValueError, naming the file, if a row does not identify its sample."""
    for row in rows:
        missing = [name for name in KEY_FIELDS if name not in row]
        strange = [name for name in KEY_FIELDS if isinstance(row.get(name), list | dict)]
        if missing or strange:
            raise ValueError(
                f"{path}: a row has no valid {', '.join(missing + strange)}; move the file away to "
                "run its samples again"
            )


def _drop_stale(samples: dict[tuple[str, int | None, int], Row], current: Iterable[Row]) -> None:
    """Drop all samples of a task of which one prompt changed: they were made in another way."""
    for row in current:
        old = samples.get(_place(row))
        if old is not None and old["prompt_hash"] != row["prompt_hash"]:
            for place in [key for key in samples if key[:2] == _place(row)[:2]]:
                del samples[place]
            return


def _write(path: Path, content: Mapping[str, Any]) -> None:
    _replace(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a file in one step, so that neither a kill nor a reader leaves or sees half of it."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _named(parent: Path, name: str, content: Mapping[str, Any]) -> Path:
    """The folder of this content: the existing one, whatever its name, or a new one."""
    mark = hash_of(content)[:8]
    existing = sorted(parent.glob(f"*-{mark}"))
    return existing[0] if existing else parent / f"{_slug(name)}-{mark}"


def _slug(text: str) -> str:
    """A name that is valid on every file system."""
    return re.sub(r"[^A-Za-z0-9.=_-]+", "_", text).strip("._")[-80:] or "run"
