"""The tasks that `--tasks` takes, and their units.

There are three kinds: our own tasks, made offline (`tasks`); perplexity, which lm-eval cannot pair
with dense (`text_unit`); and the benchmarks of the hub (`tasks.hub`). Any other task of lm-eval can
be given by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_patch_eval.inputs.text import long_text
from sparse_patch_eval.runs.known import PERPLEXITY, PERPLEXITY_TEXTS
from sparse_patch_eval.runs.lm_unit import LmUnit, keep_end
from sparse_patch_eval.runs.text_unit import TextUnit, text_parts
from sparse_patch_eval.runs.unit import Unit
from sparse_patch_eval.tasks import OFFLINE, TASKS_FOLDER
from sparse_patch_eval.tasks.hub.benchmarks import HUB, load_tasks, truncate_middle
from sparse_patch_eval.tasks.hub.benchmarks import check as check_hub
from sparse_patch_eval.tasks.hub.data import local_folder
from sparse_patch_eval.tasks.hub.load import without_remote_code


@dataclass(frozen=True)
class Wanted:
    """The tasks to measure.

    Attributes:
        tasks: names, as `--tasks` takes them.
        lengths: of prompts, tokens, for tasks that have lengths.
        limit: samples per task and length; None: all (500 of generated tasks, as in RULER; of a
            text, all its windows).
        seed: chooses the samples of generated tasks.
        model: as `--model` takes it; its tokenizer measures the prompts.
        task_args: more parameters for the generators.
        data_dir: folder with the data of hub benchmarks; None for the hub itself.
        chat_template: whether prompts go through the tokenizer's chat template.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    model: str
    limit: int | None = 20
    seed: int = 0
    task_args: dict[str, Any] = field(default_factory=dict)
    data_dir: Path | None = None
    chat_template: bool = False


def build_units(wanted: Wanted, lm: Any) -> list[Unit]:
    """The units, in the order of `--tasks`, each at every length before the next task.

    Args:
        lm: the model, a `SparsePatchLM`.

    Raises:
        ValueError: a task is unknown, the model or a task does not take a length, or lengths are
            missing.
        FetchError: data of the hub cannot be fetched; says what to download.
        ImportError: a package is missing; says what to install.
    """
    too_long = [length for length in wanted.lengths if length > lm.max_length]
    if too_long:
        raise ValueError(
            f"--lengths {', '.join(map(str, too_long))}: the model takes {lm.max_length} tokens"
        )
    units: list[Unit] = []
    for name in dict.fromkeys(wanted.tasks):
        units += _units(name, wanted, lm)
    return units


def check_names(wanted: Wanted) -> None:
    """Check what needs no model: lengths, packages, texts.

    Raises:
        ValueError: a task lacks lengths, or has no such length; a text cannot be read, or is too
            short.
        FetchError: `--data-dir` is not a folder; the package of a text cannot be fetched.
        ImportError: a package that a task needs is missing; says what to install.
    """
    if not wanted.tasks:
        raise ValueError("--tasks: name at least one; `sparse-patch tasks` lists them")
    for name in wanted.tasks:
        known_lengths = name in OFFLINE or _is_perplexity(name)
        if (known_lengths or (name in HUB and HUB[name].lengths)) and not wanted.lengths:
            raise ValueError(f"--lengths: the task {name!r} needs at least one, as in 4096,8192")
    check_hub([name for name in wanted.tasks if name in HUB], wanted.lengths)
    if wanted.data_dir is not None:
        local_folder(wanted.data_dir)
    for name in filter(_is_perplexity, wanted.tasks):
        for text in _texts(name):
            for length in wanted.lengths:
                text_parts(text, length, wanted.limit, wanted.seed)
    if "haystack" in wanted.task_args and any(name in OFFLINE for name in wanted.tasks):
        long_text(wanted.task_args["haystack"], option="--task-arg haystack")


def _texts(name: str) -> Sequence[str]:
    """The texts of a perplexity task."""
    text = name[len(PERPLEXITY) + 1 :]
    return [text] if text else PERPLEXITY_TEXTS


def _is_perplexity(name: str) -> bool:
    return name == PERPLEXITY or name.startswith(f"{PERPLEXITY}_")


def _units(name: str, wanted: Wanted, lm: Any) -> Iterator[Unit]:
    if _is_perplexity(name):
        for text in _texts(name):
            for length in wanted.lengths:
                yield TextUnit(text, length, lm=lm, limit=wanted.limit, seed=wanted.seed)
    elif name in OFFLINE:
        yield from _offline(name, wanted, lm)
    else:
        yield from _others(name, wanted, lm)


def _offline(name: str, wanted: Wanted, lm: Any) -> Iterator[Unit]:
    tasks = OFFLINE[name].names
    for task in tasks:
        for length in wanted.lengths:
            reserved = {"reserve": _template_tokens(lm) if wanted.chat_template else 0}
            loaded = _manager(wanted, length, defaults=False, **reserved).load([task])["tasks"]
            for task_object in loaded.values():
                yield LmUnit(
                    name, task_object, length, lm=lm, chat_template=wanted.chat_template, limit=None
                )


def _others(name: str, wanted: Wanted, lm: Any) -> Iterator[Unit]:
    """Tasks of the hub, and any other task of lm-eval."""
    known = HUB.get(name)
    truncate = truncate_middle if known and known.truncation == "middle" else keep_end
    for length in wanted.lengths if known and known.lengths else (None,):
        if known:
            loaded = load_tasks(
                [name], data_dir=wanted.data_dir, metadata=_metadata(wanted, length)
            )
        else:
            loaded = _by_name(name, wanted)
        for task in loaded.values():
            yield LmUnit(
                known.name if known else name,
                task,
                length,
                lm=lm,
                chat_template=wanted.chat_template,
                limit=wanted.limit,
                truncate=truncate,
            )


def _by_name(name: str, wanted: Wanted) -> dict[str, Any]:
    manager = _manager(wanted, None, defaults=True)
    if name not in manager.all_tasks:  # lm-eval would also load a file, and run code that it names
        raise ValueError(
            f"--tasks: unknown task {name!r}; `sparse-patch tasks` lists ours, `lm-eval ls tasks` "
            "those of lm-eval"
        )
    without_remote_code()
    loaded: dict[str, Any] = manager.load([name])["tasks"]
    return loaded


def _template_tokens(lm: Any) -> int:
    """Tokens that a chat template adds to a prompt; they count towards its length."""
    empty = lm.apply_chat_template([{"role": "user", "content": ""}])
    return len(lm.encode_context(empty))


def _manager(wanted: Wanted, length: int | None, *, defaults: bool, **more: Any) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(
        include_path=None if defaults else str(TASKS_FOLDER),
        include_defaults=defaults,
        metadata={**_metadata(wanted, length), **more},
    )


def _metadata(wanted: Wanted, length: int | None) -> dict[str, Any]:
    """Settings for the generators of tasks."""
    metadata = {"tokenizer": wanted.model, "seed": wanted.seed, **wanted.task_args}
    if length is not None:
        metadata |= {"max_seq_lengths": [length], "num_samples": wanted.limit or 500}
    return metadata
