"""Finished (or half-finished) runs of `sparse-patch eval`, read from their folders (see `format`).

Lines cut short by a kill are left out and listed in `Run.notes`; other faults are errors that name
the file and the line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sparse_patch_eval.base.rows import read_lines
from sparse_patch_eval.runs.format import (
    DENSE,
    RESULTS,
    RUN,
    SAMPLES,
    Key,
    Sample,
    Setting,
    read_object,
    sample_of,
    setting_of,
)

# For scores that no results.json lists.
_LOWER_IS_BETTER = frozenset({"answer_nll", "nll", "kl", "perplexity"})


@dataclass(frozen=True)
class Run(Setting):
    """A run folder.

    Attributes:
        folder: its path.
        samples: in the order of the file; of two with the same key the later one.
        higher_is_better: by score name; scores missing in results.json are filled in.
        finished: does results.json exist?
        notes: samples left out, and why.
    """

    folder: Path
    samples: tuple[Sample, ...]
    higher_is_better: Mapping[str, bool]
    finished: bool = True
    notes: tuple[str, ...] = ()

    @property
    def is_dense(self) -> bool:
        return self.method == DENSE

    @property
    def family(self) -> str:
        """The method's name without parameters."""
        return self.method.partition(":")[0].strip()


def find_runs(paths: Iterable[Path | str]) -> list[Run]:
    """Read the runs in some folders: run folders themselves, or parents of any depth.

    A folder that is named twice, or is in two of the paths, is read once.

    Raises:
        FileNotFoundError: a path does not exist, or holds no run.
        ValueError: a file of a run is invalid; names file, line and fault.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"RUNS: {path} is not a folder")
        inside = sorted(file.parent.resolve() for file in path.rglob(RUN))
        if not inside:
            raise FileNotFoundError(
                f"RUNS: there is no run.json in {path} or below; "
                "name the folder that `sparse-patch eval --output` wrote to"
            )
        folders.update(dict.fromkeys(inside))
    return [read_run(folder) for folder in folders]


def read_run(folder: Path) -> Run:
    """Read one run folder; raises as `find_runs` does."""
    setting = setting_of(read_object(folder / RUN), str(folder / RUN))
    results = folder / RESULTS
    directions = _read_directions(results) if results.exists() else {}
    samples, notes = _read_samples(folder / SAMPLES)
    for name in dict.fromkeys(name for sample in samples for name in sample.scores):
        directions.setdefault(name, name not in _LOWER_IS_BETTER)
    if not results.exists():
        notes.insert(0, "unfinished: no results.json yet")
    return Run(
        **setting,
        folder=folder,
        samples=tuple(samples),
        higher_is_better=directions,
        finished=results.exists(),
        notes=tuple(notes),
    )


def _read_samples(path: Path) -> tuple[list[Sample], list[str]]:
    if not path.exists():
        return [], ["no samples yet"]
    by_key: dict[Key, Sample] = {}
    cut, doubles = [], 0
    for number, row in read_lines(path):
        if row is None:
            cut.append(number)  # a kill cuts a line; a run that goes on starts a new one
            continue
        sample = sample_of(row, f"{path}, line {number}")
        doubles += sample.key in by_key
        by_key[sample.key] = sample
    if cut and not by_key:
        raise ValueError(f"{path}: no line of it is JSON; is this a samples.jsonl?")
    notes = [f"samples.jsonl, line {number}: cut short, left out" for number in cut]
    if doubles:
        notes.append(f"{doubles} samples appear more than once; the last of each counts")
    strange = sum(value != value for s in by_key.values() for value in s.scores.values())
    if strange:
        notes.append(f"{strange} scores are NaN: the model or the method broke on these samples")
    return list(by_key.values()), notes


def _read_directions(path: Path) -> dict[str, bool]:
    directions = read_object(path).get("higher_is_better")
    if not isinstance(directions, dict) or not all(
        isinstance(v, bool) for v in directions.values()
    ):
        raise ValueError(f"{path}: higher_is_better must map each score to true or false")
    return dict(directions)
