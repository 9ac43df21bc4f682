"""Several methods against the same dense baseline, sample by sample.

The loop goes over samples first and methods second: every method sees the same prompt within
moments, in turning order, so that times pair as answers do. Dense is the model as it is, without a
patch. What was answered is on disk at once; scoring comes last, and again whenever it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_patch import Method
from sparse_patch.specs import parse_method
from sparse_patch_eval.ask.answer import answer
from sparse_patch_eval.base.console import note, progress
from sparse_patch_eval.runs.folder import RunFolder, run_config
from sparse_patch_eval.runs.format import DENSE
from sparse_patch_eval.runs.unit import How, Question, Unit

# Prompt tokens of the forward, one a method, that comes before anything is timed.
_WARM_UP = 1024


@dataclass(frozen=True)
class Setup:
    """What is evaluated.

    Attributes:
        model: as `--model` takes it.
        methods: specs, as `specs.parse_method` takes them; "dense" is added where it is missing.
        patch_options: for `sparse_patch.patch`, with every method.
        model_settings: all else about the model that can change a number: dtype, device, ...
        seed: chooses the samples of generated tasks.
        chat_template: whether prompts go through the tokenizer's chat template.
        recall_samples: on the first so many samples of a unit recall is measured, which takes
            another prefill each.
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
        return {spec: None if spec == DENSE else parse_method(spec) for spec in specs}


def evaluate(
    setup: Setup, output: Path, lm: Any, build_units: Callable[[Any], Sequence[Unit]]
) -> list[Path]:
    """Ask what is not answered yet, and score everything.

    Args:
        output: runs lie there side by side.
        lm: the model, a `SparsePatchLM` without a method.
        build_units: makes the units, given `lm`.

    Returns:
        The folders of the runs, dense first.

    Raises:
        ValueError: a method, a task or a length does not fit; before anything is prefilled.
    """
    methods = setup.parsed()
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
                # Dense has no patch, so it is one run, whatever the options of the others.
                patch=setup.patch_options if method is not None else {},
            ),
            process=lm.rank,
        )
        for spec, method in methods.items()
    }
    units = build_units(lm)
    todo = _todo(units, runs, lm.rank, lm.world_size)
    if todo:
        _ask(setup, methods, runs, lm, todo)
    elif lm.is_writer:
        note("every sample is answered already")
    for run in runs.values():
        everyone = lm.share(list(run.answered.values()))
        if everyone is not None:
            run.take(everyone)
            run.write_scored(units)
    return [run.path for run in runs.values()]


@dataclass(frozen=True)
class _Todo:
    """One question and the methods that it was not given to yet."""

    number: int
    unit: Unit
    question: Question
    specs: list[str]


def _todo(
    units: Sequence[Unit], runs: dict[str, RunFolder], process: int, processes: int
) -> list[_Todo]:
    """This process's part of what is not answered."""
    found = []
    for unit in units:
        for number, question in enumerate(unit.questions()):
            if number % processes != process:
                continue
            specs = [spec for spec, run in runs.items() if run.find(unit, question) is None]
            if specs:
                # The method that comes first changes, so that none is always behind another.
                turn = number % len(specs)
                found.append(_Todo(number, unit, question, specs[turn:] + specs[:turn]))
    return found


def _ask(
    setup: Setup,
    methods: dict[str, Method | None],
    runs: dict[str, RunFolder],
    lm: Any,
    todo: list[_Todo],
) -> None:
    with progress(disable=not lm.is_writer) as bar:
        task = bar.add_task("warming up", total=sum(len(one.specs) for one in todo))
        for method in methods.values():
            answer(
                lm.model,
                lm.tokenizer,
                [n % 128 for n in range(min(_WARM_UP, lm.max_length))],
                method=method,
                patch_options=setup.patch_options,
            )
        for one in todo:
            place = f"{one.unit.task} {one.unit.length or ''}".strip()
            for spec in one.specs:
                bar.update(task, description=f"{place} #{one.number} {spec}")
                how = How(methods[spec], setup.patch_options, one.number < setup.recall_samples)
                row = one.unit.ask(one.question, how)
                runs[spec].add(one.unit, one.question, row, write=lm.is_writer or lm.world_size > 1)
                bar.advance(task)
