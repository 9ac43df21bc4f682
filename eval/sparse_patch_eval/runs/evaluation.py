"""Several methods against the same dense baseline, sample by sample.

The outer loop is over samples, the inner one over methods: every method gets the same prompt within
moments, in rotating order, so times are paired as answers are. Dense is the unpatched model.
Answers are written at once; scoring comes last, and is repeated on every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_patch import Method, get_method
from sparse_patch_eval.ask.answer import answer
from sparse_patch_eval.ask.expected import keeps_everything
from sparse_patch_eval.base.console import note, progress
from sparse_patch_eval.runs.folder import RunFolder, run_config
from sparse_patch_eval.runs.format import DENSE
from sparse_patch_eval.runs.unit import How, Question, Unit

# Prompt tokens of the warm-up forward of each method, before anything is timed.
_WARM_UP = 1024


@dataclass(frozen=True)
class Setup:
    """An evaluation to run.

    Attributes:
        model: as `--model` takes it.
        methods: as `sparse_patch.get_method` takes them; "dense" is added where it is missing.
        patch_options: for `sparse_patch.patch`, with every method.
        model_settings: all else about the model that can change a number: dtype, device, ...
        seed: chooses the samples of generated tasks.
        chat_template: whether prompts go through the tokenizer's chat template.
        recall_samples: number of first samples of a unit on which recall is measured, by another
            prefill each.
    """

    model: str
    methods: tuple[str, ...]
    patch_options: dict[str, Any] = field(default_factory=dict)
    model_settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    chat_template: bool = False
    recall_samples: int = 1

    def parsed(self) -> dict[str, Method | None]:
        """Methods by spec, dense first.

        Raises:
            ValueError: a method or parameter does not exist.
        """
        specs = dict.fromkeys([DENSE, *self.methods])
        return {spec: None if spec == DENSE else get_method(spec) for spec in specs}


def evaluate(
    setup: Setup, output: Path, lm: Any, build_units: Callable[[Any], Sequence[Unit]]
) -> list[Path]:
    """Ask the questions without an answer, and score everything.

    Args:
        output: folder of the runs.
        lm: the model, a `SparsePatchLM` without a method.
        build_units: makes the units, given `lm`.

    Returns:
        The folders of the runs, dense first.

    Raises:
        ValueError: a method, task or length does not fit; raised before any prefill.
    """
    methods = setup.parsed()
    units = build_units(lm)  # first: a run that is refused leaves no folder
    runs = {
        spec: RunFolder(
            output,
            run_config(
                setup.model,
                spec,
                method,
                **setup.model_settings,
                seed=setup.seed,
                chat_template=setup.chat_template,
                # Dense has no patch, so its run does not depend on the patch options.
                patch=setup.patch_options if method is not None else {},
            ),
            process=lm.rank,
        )
        for spec, method in methods.items()
    }
    todo = _todo(units, runs, lm.rank, lm.world_size)
    if todo:
        if lm.is_writer:
            _say_what_stays_exact(methods, {item.unit.length for item in todo}, setup, lm)
        _ask(setup, methods, runs, lm, todo)
    elif lm.is_writer:
        note("all samples are already answered")
    for run in runs.values():
        everyone = lm.share(list(run.answered.values()))
        if everyone is not None:
            run.take(everyone)
            run.write_scored(units)
    return [run.path for run in runs.values()]


def _say_what_stays_exact(
    methods: Mapping[str, Method | None], lengths: Iterable[int | None], setup: Setup, lm: Any
) -> None:
    """A word before the run where a method will compute all of the attention."""
    least = setup.patch_options.get("min_length", 0)
    for length in sorted(length for length in lengths if length is not None):
        if length < least:
            note(
                f"at {length:,} tokens every method runs exact, below --min-length {least}: "
                "its scores will be dense's"
            )
            continue
        for spec, method in methods.items():
            if method is not None and keeps_everything(method, length, lm.model.config):
                note(
                    f"at {length:,} tokens {spec} runs exact, because it keeps everything of so "
                    "short a prompt: its scores will be dense's"
                )


@dataclass(frozen=True)
class _Todo:
    """One question and the methods that have not answered it."""

    number: int
    unit: Unit
    question: Question
    specs: list[str]


def _todo(
    units: Sequence[Unit], runs: dict[str, RunFolder], process: int, processes: int
) -> list[_Todo]:
    """This process's share of the unanswered questions."""
    todo = []
    for unit in units:
        for number, question in enumerate(unit.questions()):
            if number % processes != process:
                continue
            specs = [spec for spec, run in runs.items() if run.find(unit, question) is None]
            if specs:
                # The order rotates, so that no method always runs after another.
                turn = number % len(specs)
                todo.append(_Todo(number, unit, question, specs[turn:] + specs[:turn]))
    return todo


def _ask(
    setup: Setup,
    methods: dict[str, Method | None],
    runs: dict[str, RunFolder],
    lm: Any,
    todo: list[_Todo],
) -> None:
    with progress(disable=not lm.is_writer) as bar:
        task = bar.add_task("warming up", total=sum(len(item.specs) for item in todo))
        for method in methods.values():
            answer(
                lm.model,
                lm.tokenizer,
                [n % 128 for n in range(min(_WARM_UP, lm.max_length))],
                method=method,
                patch_options=setup.patch_options,
            )
        for item in todo:
            place = f"{item.unit.task} {item.unit.length or ''}".strip()
            for spec in item.specs:
                bar.update(task, description=f"{place} #{item.number} {spec}")
                how = How(methods[spec], setup.patch_options, item.number < setup.recall_samples)
                row = item.unit.ask(item.question, how)
                runs[spec].add(
                    item.unit, item.question, row, write=lm.is_writer or lm.world_size > 1
                )
                bar.advance(task)
