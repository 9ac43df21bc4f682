"""Build one task of a hub benchmark: lm-eval's definition, our changes, and its data."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from sparse_patch_eval.base.fetch import FetchError
from sparse_patch_eval.inputs.models import code_help
from sparse_patch_eval.tasks.hub import fixes
from sparse_patch_eval.tasks.hub.data import Source, hub_errors, read
from sparse_patch_eval.tasks.hub.tables import (
    BABILONG_LENGTHS,
    ESSAY_TASKS,
    ESSAYS,
    QA_HOSTS,
    Benchmark,
)

_FIXES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "longbench": fixes.longbench,
    "longbench2": fixes.longbench2,
    "infinitebench": fixes.infinitebench,
    "babilong": fixes.babilong,
    "ruler": fixes.ruler,
}


def load_task(
    benchmark: Benchmark, task: str, data_dir: Path | None, metadata: dict[str, Any]
) -> Any:
    """Build one lm-eval task: its definition, our changes, its data.

    Args:
        benchmark: an entry of `HUB` that has the task.
        task: lm-eval's name of it.
        data_dir, metadata: as for `benchmarks.load_tasks`; lengths are already checked.

    Raises:
        FetchError: data cannot be fetched or read.
        ValueError: RULER without a tokenizer.
    """
    source = benchmark.tasks[task]
    if source is None:
        return _load_ruler(benchmark, task, data_dir, metadata)
    data: dict[str, Any] = {"test_split": source.split, "dataset_kwargs": {}}
    if benchmark.folder == "babilong":
        lengths = metadata.get("max_seq_lengths") or [0]
        parts = {n: replace(source, config=BABILONG_LENGTHS[n]) for n in lengths}
        source = parts[lengths[0]]
        data["custom_dataset"] = partial(_joined, parts, data_dir)
    elif benchmark.folder == "infinitebench":
        data["custom_dataset"] = partial(_with_text_answers, source, data_dir)
    elif data_dir is not None:
        data["custom_dataset"] = partial(_plain, source, data_dir)
    with hub_errors(task, source, data_dir):
        return _build(benchmark, task, data, {})


def _load_ruler(
    benchmark: Benchmark, task: str, data_dir: Path | None, metadata: dict[str, Any]
) -> Any:
    if not isinstance(metadata.get("tokenizer"), str):
        raise ValueError(
            f"{task} measures its prompts in tokens: metadata needs a tokenizer's name"
        )
    if metadata["tokenizer"] in ("smollm2", "gemma3-270m"):
        from sparse_patch_eval.inputs.models import packaged

        metadata = {**metadata, "tokenizer": str(packaged(metadata["tokenizer"]))}
    if task == "ruler_vt":
        _check_vt_tokenizer(metadata["tokenizer"])
    needs = _ruler_needs(task)
    if needs and data_dir is not None:
        raise FetchError(f"{task} cannot be read from --data-dir: {needs}")
    with _seeded(f"{metadata.get('seed', 0)}-{task}"):
        if task in ESSAY_TASKS:
            with hub_errors(task, ESSAYS, None, needs):
                return _build(benchmark, task, {}, metadata)
        try:
            return _build(benchmark, task, {}, metadata)
        except OSError as error:
            raise FetchError(f"{task} cannot be made ({error}). {needs}") from error


def without_remote_code() -> None:
    """Make lm-eval's task generators load tokenizers without a repository's code.

    They always allow it, whatever the user set (lm-eval 0.4.13).
    """
    for name in ("lm_eval.tasks.ruler.common_utils", "lm_eval.tasks.babilong.common_utils"):
        vars(import_module(name))["AutoTokenizer"] = _PlainTokenizer


class _PlainTokenizer:
    """Stands in for Transformers' AutoTokenizer."""

    @staticmethod
    def from_pretrained(name: str, **options: Any) -> Any:
        from transformers import AutoTokenizer

        with code_help(name):
            return AutoTokenizer.from_pretrained(name, **{**options, "trust_remote_code": False})


def _check_vt_tokenizer(name: str) -> None:
    """Refuse a tokenizer with which lm-eval's ruler_vt never returns.

    Its worked example of at least 931 characters must fit into 500 tokens.
    """
    text = "The grass is green. The sky is blue. The sun is yellow. Here we go."
    tokens = len(_PlainTokenizer.from_pretrained(name)(text)["input_ids"])
    if len(text) < 2 * tokens:
        raise ValueError(
            f"ruler_vt does not work with the tokenizer {name}, which needs {tokens} tokens for "
            f"{len(text)} characters: lm-eval would never return; use our own `ruler`"
        )


def _ruler_needs(task: str) -> str:
    """What lm-eval fetches for a RULER task, and the alternative; empty if it fetches nothing."""
    instead = "Our own `ruler` tasks need no network."
    if task in ESSAY_TASKS:
        return (
            f"lm-eval reads the dataset {ESSAYS.dataset} from the hub, and NLTK's punkt_tab. Load "
            "the task once with network, after `python -m nltk.downloader punkt_tab`: both then "
            f"stay in their caches. {instead}"
        )
    if task in QA_HOSTS:
        return f"lm-eval downloads {QA_HOSTS[task]} on every run. {instead}"
    return ""


def _build(benchmark: Benchmark, task: str, data: dict[str, Any], metadata: dict[str, Any]) -> Any:
    """The lm-eval task of a definition with our changed fields."""
    import lm_eval.tasks

    without_remote_code()
    from lm_eval.tasks._yaml_loader import load_yaml  # the one reader that resolves `!function`

    folder = Path(lm_eval.tasks.__file__).parent / benchmark.folder
    manager = lm_eval.tasks.TaskManager(
        include_path=folder, include_defaults=False, metadata=metadata
    )
    base = load_yaml(manager.task_index[task].yaml_path)
    fixed = {**base, **_FIXES[benchmark.folder](base), **data}
    return manager.load([fixed])["tasks"][task]


def _plain(source: Source, data_dir: Path, **_: Any) -> dict[str, Any]:
    return {source.split: read(source, data_dir)}


def _joined(parts: dict[int, Source], data_dir: Path | None, **_: Any) -> dict[str, Any]:
    """Several configurations as one split, each document with its length in tokens."""
    import datasets

    loaded = []
    for length, source in parts.items():
        part = read(source, data_dir)
        loaded.append(part.add_column("max_length", [length] * len(part)))
    return {source.split: datasets.concatenate_datasets(loaded)}


def _with_text_answers(source: Source, data_dir: Path | None, **_: Any) -> dict[str, Any]:
    """InfiniteBench's answers as text: some files hold numbers, and lm-eval's scores want text.

    The one file is read alone, because the columns of the twelve differ.
    """
    import datasets

    documents = read(source, data_dir)
    text = datasets.Sequence(datasets.Value("string"))
    for column in {"answer", "options"}.intersection(documents.column_names):
        documents = documents.cast_column(column, text)
    return {source.split: documents}


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """Python's and NumPy's global random state from `seed` inside the block, and back after it."""
    import numpy as np

    # The old global generator of NumPy, because lm-eval draws from it.
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    draw = random.Random(seed)
    random.seed(draw.getrandbits(64))
    np.random.seed(draw.getrandbits(32))  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
