"""The format of a run on disk, declared once: `folder` writes it, `reading` reads it.

    run.json          a `Setting`, and all else that can change a number
    responses.N.jsonl answers of the model, one sample per line, written at once by process N
    samples.jsonl     the same, scored: a `Sample` per line
    results.json      means by task and length, and lm-eval's own results

All are JSON, and read as JSON only. The fields here define what a file may hold; a field with a
default may be missing, as in runs of earlier versions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from sparse_patch.strict_json import read_json
from sparse_patch_eval.ask.density import overall_density

FORMAT = 1
DENSE = "dense"
RUN, SAMPLES, RESULTS = "run.json", "samples.jsonl", "results.json"

Key = tuple[str, int | None, str, str]
KEY_FIELDS = ("task", "length", "doc_id", "prompt_hash")


@dataclass(frozen=True)
class Setting:
    """The part of run.json that a report needs.

    Attributes:
        method: as the user wrote it; "dense" is the unpatched model.
        params: every parameter of the method.
        patch: settings of `sparse_patch.patch`, such as min_length.
        (model, dtype, device, seed, chat_template: what was asked for.)
    """

    model: str
    dtype: str
    device: str
    method: str
    params: Mapping[str, Any]
    seed: int
    chat_template: bool
    patch: Mapping[str, Any]


@dataclass(frozen=True)
class Within:
    """The range of a number."""

    low: float
    high: float = math.inf


@dataclass(frozen=True)
class Sample:
    """One prompt, answered after a prefill with the run's method.

    Attributes:
        benchmark, task: that the sample belongs to.
        length: requested tokens; None where the task has no lengths.
        doc_id: of the document in its task.
        prompt_hash: of the prompt as the model got it.
        tokens: length of the prompt.
        depth: of the needle, 0 (start) to 1 (end); None without a needle.
        scores: by name, the primary one first.
        answer, target: text of the model and the right text; None where nothing is generated.
        density: kept / causal blocks, mean over the sparse calls; None if no call ran sparse.
        recall: attention mass kept; None if it was not measured.
        exact: attention calls of the prefill that ran exact, by reason.
        prefill_seconds: None if the prefill was not timed.
        truncated: number of prompt tokens cut off.
        machine: device, versions and commit.
        sparse_calls: attention calls of the prefill that ran sparse; None if the run does not say.
    """

    benchmark: str
    task: str
    length: Annotated[int | None, Within(1)]
    doc_id: int | str
    prompt_hash: str
    tokens: Annotated[int, Within(0)]
    depth: Annotated[float | None, Within(0, 1)]
    scores: Mapping[str, float]
    answer: str | None
    target: str | None
    density: Annotated[float | None, Within(0, 1 + 1e-6)]
    # Sums of rounded masses; NaN where a model or a method broke.
    recall: Annotated[float | None, Within(0, 1 + 1e-2)]
    exact: Mapping[str, int]
    prefill_seconds: Annotated[float | None, Within(0)]
    truncated: Annotated[int, Within(0)]
    machine: Mapping[str, Any]
    sparse_calls: Annotated[int | None, Within(0)] = None

    @property
    def key(self) -> Key:
        """The key by which samples of several runs are paired."""
        return key_of(vars(self))

    @property
    def exact_calls(self) -> int:
        """Prefill calls that ran exact; decoding is exact by design and does not count."""
        return sum(calls for reason, calls in self.exact.items() if reason != "decode")

    @property
    def overall_density(self) -> float | None:
        """Density with exact calls counted as 1, where the run says how many calls ran sparse."""
        return density_of(vars(self))


def key_of(row: Mapping[str, Any]) -> Key:
    """The key of a row's sample."""
    return row["task"], row["length"], str(row["doc_id"]), row["prompt_hash"]


def density_of(row: Mapping[str, Any]) -> float | None:
    """See `Sample.overall_density`."""
    density, sparse = row["density"], row.get("sparse_calls") or 0
    if density is not None and not sparse:
        return float(density)
    exact = sum(calls for reason, calls in row["exact"].items() if reason != "decode")
    return overall_density(sparse * (density or 0.0), sparse, exact)


def setting_of(about: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a `Setting`, checked.

    Raises:
        ValueError: the format is another one, or a field is missing or wrong; names `where`.
    """
    if about.get("format") != FORMAT:
        raise ValueError(f"{where}: format {about.get('format')!r}, this version reads {FORMAT}")
    return _checked(Setting, about, where)


def sample_of(row: Mapping[str, Any], where: str) -> Sample:
    """A line of samples.jsonl, checked; scores that are null are left out.

    Raises:
        ValueError: a field is missing or wrong; names `where`.
    """
    values = _checked(Sample, row, where)
    for name, value in row["scores"].items():
        number = isinstance(value, int | float | NoneType) and not isinstance(value, bool)
        if not number or _is_huge(value):
            raise ValueError(f"{where}: score {name!r} must be a number, not {value!r}")
    for reason, calls in row["exact"].items():
        if isinstance(calls, bool) or not isinstance(calls, int) or calls < 0:
            raise ValueError(f"{where}: exact[{reason!r}] must count calls, not {calls!r}")
    scores = {name: float(value) for name, value in row["scores"].items() if value is not None}
    return Sample(**{**values, "scores": scores})


def read_object(path: Path, *parts: str) -> dict[str, Any]:
    """The JSON object in a file, which must hold objects under these names.

    Raises:
        ValueError: the content is another one; names the file.
    """
    try:
        content = read_json(path, nan=True)
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(p), dict) for p in parts):
        raise ValueError(f"{path}: must be a JSON object{''.join(f', with {p}' for p in parts)}")
    return content


def _checked(kind: type, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a dataclass's fields that an entry has."""
    known = fields(kind)
    missing = [item.name for item in known if item.default is MISSING and item.name not in entry]
    if missing:
        raise ValueError(f"{where}: lacks {', '.join(missing)}")
    hints = _hints(kind)
    values = {item.name: entry[item.name] for item in known if item.name in entry}
    for name, value in values.items():
        kinds = _kinds(hints[name])
        # In Python bool is an int; not here.
        wrong = isinstance(value, bool) and bool not in kinds
        if wrong or not isinstance(value, kinds) or _is_huge(value):
            allowed = " or ".join("null" if k is NoneType else k.__name__ for k in kinds)
            raise ValueError(f"{where}: {name} must be {allowed}, not {value!r}")
    for name, value in values.items():
        for at in () if value is None else getattr(hints[name], "__metadata__", ()):
            if not (at.low <= value <= at.high or (name == "recall" and math.isnan(value))):
                raise ValueError(
                    f"{where}: {name} must be {at.low:g} to {at.high:g}, not {value!r}"
                )
    return values


@functools.cache  # a file may have a hundred thousand lines
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


@functools.cache
def _kinds(hint: Any) -> tuple[type, ...]:
    """The Python types of a field's JSON values."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is Mapping:
        return (dict,)
    if parts := get_args(hint):
        return tuple(kind for part in parts for kind in _kinds(part))
    return (int, float) if hint is float else (hint,)


def _is_huge(value: Any) -> bool:
    """Is it a whole number beyond 64 bits?"""
    return isinstance(value, int) and abs(value) > 2**63
