"""Finished (or half-finished) runs of `sparse-patch eval`, read from their folders.

A run is one model setting and one method: `run.json` says which, `samples.jsonl` holds a line a
sample, `results.json` (there once a run has finished) says which scores are better high. All three
are JSON and read as JSON only. What a kill cut short is left out and said so in `Run.notes`; what
is there but not as it should be is an error that names the file and the line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_patch.strict_json import parse_json, read_json

FORMAT = 1
DENSE = "dense"
# Of scores that no results.json speaks of.
_LOWER_IS_BETTER = frozenset({"answer_nll", "nll", "kl", "perplexity"})

Key = tuple[str, int | None, str, str]

_NUMBER = (int, float)
_RUN_FIELDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "dtype": (str,),
    "device": (str,),
    "method": (str,),
    "params": (dict,),
    "seed": (int,),
    "chat_template": (bool,),
    "patch": (dict,),
}
_NONE = type(None)
# What numbers may be; scores and recall may be NaN too, where a model or a method broke.
_RANGES: dict[str, tuple[float, float]] = {
    "length": (1, math.inf),
    "tokens": (0, math.inf),
    "depth": (0, 1),
    "density": (0, 1 + 1e-6),
    "recall": (0, 1 + 1e-2),  # sums of rounded masses
    "prefill_seconds": (0, math.inf),
    "truncated": (0, math.inf),
    "sparse_calls": (0, math.inf),
}
_SAMPLE_FIELDS: dict[str, tuple[type, ...]] = {
    "benchmark": (str,),
    "task": (str,),
    "length": (int, _NONE),
    "doc_id": (int, str),
    "prompt_hash": (str,),
    "tokens": (int,),
    "depth": (*_NUMBER, _NONE),
    "scores": (dict,),
    "answer": (str, _NONE),
    "target": (str, _NONE),
    "density": (*_NUMBER, _NONE),
    "recall": (*_NUMBER, _NONE),
    "exact": (dict,),
    "prefill_seconds": (*_NUMBER, _NONE),
    "truncated": (int,),
    "machine": (dict,),
}


@dataclass(frozen=True)
class Sample:
    """One prompt, answered after a prefill with the run's method.

    Attributes:
        benchmark, task: what it belongs to.
        length: tokens asked for; None where the task has no lengths.
        doc_id: of the document in its task.
        prompt_hash: of the prompt as the model got it.
        tokens: of the prompt.
        depth: of the needle, 0 (start) to 1 (end); None where there is none.
        scores: by name, the primary one first.
        answer, target: what the model wrote and what it should have; None where nothing is written.
        density: kept / causal blocks, mean over the sparse calls; None if no call ran sparse.
        recall: attention mass kept; None if it was not measured.
        exact: attention calls of the prefill that ran exact, by reason.
        sparse_calls: attention calls of the prefill that ran sparse; None if the run does not say.
        prefill_seconds: of the prefill; None if it was not timed.
        truncated: prompt tokens cut off.
        machine: device, versions and commit.
    """

    benchmark: str
    task: str
    length: int | None
    doc_id: int | str
    prompt_hash: str
    tokens: int
    depth: float | None
    scores: Mapping[str, float]
    answer: str | None
    target: str | None
    density: float | None
    recall: float | None
    exact: Mapping[str, int]
    prefill_seconds: float | None
    truncated: int
    machine: Mapping[str, Any]
    sparse_calls: int | None = None

    @property
    def key(self) -> Key:
        """What samples of several runs are paired by."""
        return (self.task, self.length, str(self.doc_id), self.prompt_hash)

    @property
    def exact_calls(self) -> int:
        """Prefill calls that ran exact; decoding is exact by design and does not count."""
        return sum(calls for reason, calls in self.exact.items() if reason != "decode")

    @property
    def overall_density(self) -> float | None:
        """Density with exact calls counted as 1, where the run says how many calls ran sparse."""
        if self.density is None:
            return 1.0 if self.exact_calls else None
        if not self.sparse_calls:
            return self.density
        kept = self.sparse_calls * self.density + self.exact_calls
        return kept / (self.sparse_calls + self.exact_calls)


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: where it lies.
        method: as the user wrote it; "dense" is the unpatched model.
        params: every parameter of the method.
        patch: settings of `sparse_patch.patch`, such as min_length.
        samples: in the order of the file; of two with the same key the later one.
        higher_is_better: by score name; what results.json does not say is filled in.
        finished: results.json is there.
        notes: what was left out, and why.
        (model, dtype, device, seed, chat_template: what was asked for.)
    """

    folder: Path
    model: str
    dtype: str
    device: str
    method: str
    params: Mapping[str, Any]
    seed: int
    chat_template: bool
    patch: Mapping[str, Any]
    samples: tuple[Sample, ...]
    higher_is_better: Mapping[str, bool]
    finished: bool = True
    notes: tuple[str, ...] = field(default=())

    @property
    def is_dense(self) -> bool:
        return self.method == DENSE

    @property
    def family(self) -> str:
        """The method's name without parameters."""
        return self.method.partition(":")[0].strip()


def find_runs(paths: Iterable[Path | str]) -> list[Run]:
    """Read the runs in some folders: run folders themselves, or parents of any depth.

    A folder that is named twice, or lies in two of the paths, is read once.

    Raises:
        FileNotFoundError: a path is not there, or holds no run.
        ValueError: a file is not what a run has; says which, where, and what is wrong.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"RUNS: {path} is not a folder")
        found = sorted(file.parent.resolve() for file in path.rglob("run.json"))
        if not found:
            raise FileNotFoundError(
                f"RUNS: there is no run.json in {path} or below; "
                "name the folder that `sparse-patch eval --output` wrote to"
            )
        folders.update(dict.fromkeys(found))
    return [read_run(folder) for folder in folders]


def read_run(folder: Path) -> Run:
    """Read one run folder; raises as `find_runs` does."""
    about = _read_object(folder / "run.json")
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{folder / 'run.json'}: format {about.get('format')!r}, this version reads {FORMAT}"
        )
    _check(about, _RUN_FIELDS, str(folder / "run.json"))
    results = folder / "results.json"
    directions = _read_directions(results) if results.exists() else {}
    samples, notes = _read_samples(folder / "samples.jsonl")
    names = dict.fromkeys(name for sample in samples for name in sample.scores)
    for name in names:
        directions.setdefault(name, name not in _LOWER_IS_BETTER)
    if not results.exists():
        notes.insert(0, "unfinished: no results.json yet")
    return Run(
        folder=folder,
        **{name: about[name] for name in _RUN_FIELDS},
        samples=tuple(samples),
        higher_is_better=directions,
        finished=results.exists(),
        notes=tuple(notes),
    )


def _read_samples(path: Path) -> tuple[list[Sample], list[str]]:
    if not path.exists():
        return [], ["no samples yet"]
    # Not splitlines: a line separator of Unicode inside an answer ends no line of the file.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    by_key: dict[Key, Sample] = {}
    cut, doubles = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = parse_json(line, nan=True)
        except json.JSONDecodeError:
            cut.append(number)  # a kill cuts a line; a run that goes on starts a new one
            continue
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        sample = _sample(entry, where)
        doubles += sample.key in by_key
        by_key[sample.key] = sample
    if cut and not by_key:
        raise ValueError(f"{path}: no line of it is JSON; is this a samples.jsonl?")
    notes = [f"samples.jsonl, line {number}: cut short, left out" for number in cut]
    if doubles:
        notes.append(f"{doubles} samples are there more than once; the last of each counts")
    strange = sum(value != value for s in by_key.values() for value in s.scores.values())
    if strange:
        notes.append(f"{strange} scores are NaN: the model or the method broke on these samples")
    return list(by_key.values()), notes


def _sample(entry: Any, where: str) -> Sample:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be a JSON object")
    _check(entry, _SAMPLE_FIELDS, where)
    for name, value in entry["scores"].items():
        if isinstance(value, bool) or not isinstance(value, (*_NUMBER, _NONE)) or _is_huge(value):
            raise ValueError(f"{where}: score {name!r} must be a number, not {value!r}")
    for reason, calls in entry["exact"].items():
        if isinstance(calls, bool) or not isinstance(calls, int) or calls < 0:
            raise ValueError(f"{where}: exact[{reason!r}] must count calls, not {calls!r}")
    if "sparse_calls" in entry:
        _check(entry, {"sparse_calls": (int, _NONE)}, where)
    for name, (low, high) in _RANGES.items():
        value = entry.get(name)
        if value is not None and not (
            low <= value <= high or (name == "recall" and value != value)
        ):
            raise ValueError(f"{where}: {name} must be {low:g} to {high:g}, not {value!r}")
    known = {name: entry[name] for name in _SAMPLE_FIELDS}
    known["scores"] = {n: float(v) for n, v in entry["scores"].items() if v is not None}
    return Sample(**known, sparse_calls=entry.get("sparse_calls"))


def _is_huge(value: Any) -> bool:
    """A whole number that is none of a computer's."""
    return isinstance(value, int) and abs(value) > 2**63


def _check(entry: Mapping[str, Any], fields: Mapping[str, tuple[type, ...]], where: str) -> None:
    missing = [name for name in fields if name not in entry]
    if missing:
        raise ValueError(f"{where}: lacks {', '.join(missing)}")
    for name, kinds in fields.items():
        value = entry[name]
        # bool is an int to Python, not to us.
        wrong = isinstance(value, bool) and bool not in kinds
        if wrong or not isinstance(value, kinds) or _is_huge(value):
            allowed = " or ".join("null" if kind is _NONE else kind.__name__ for kind in kinds)
            raise ValueError(f"{where}: {name} must be {allowed}, not {value!r}")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path, nan=True)
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return found


def _read_directions(path: Path) -> dict[str, bool]:
    found = _read_object(path).get("higher_is_better")
    if not isinstance(found, dict) or not all(isinstance(v, bool) for v in found.values()):
        raise ValueError(f"{path}: higher_is_better must map each score to true or false")
    return dict(found)
