#!/usr/bin/env python
"""Is a model that is patched with `min_length="auto"` ever slower than the unpatched one?

    python scripts/bench_never_slower.py --output results/never_slower

Two kinds of input: text, on which methods are made to pay, and uniform attention, on which none
can: the same model with its query projections at 0, so that every key weighs the same. A round
draws new prompts, and each runs dense and then patched with every method, in rotating order in one
process. Patches are made anew in every round and see `--prompts` prompts in turn, because what a
patch has seen decides what it tries next: the first prefill of a patch is a row of its own in the
table.

Ratios are dense / patched, medians over rounds; cells below 0.97 are marked. Writes `runs.jsonl` (a
line per prefill, with the machine and versions) and `table.md` into the output folder. A run that
was stopped goes on with the rounds that are not complete.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_prefill import DENSE, WARM_UP_TOKENS, rotated
from sparse_patch_eval.ask.prefill import prefill
from sparse_patch_eval.base.console import console, progress, user_errors
from sparse_patch_eval.base.options import parse_lengths
from sparse_patch_eval.base.rows import Row, RowFile, describe_machines
from sparse_patch_eval.inputs.models import load_for_lengths
from sparse_patch_eval.inputs.text import long_text, passkey_prompt
from torch import Tensor
from transformers import PreTrainedModel

import sparse_patch
from sparse_patch import Method
from sparse_patch.specs import parse_method

TEXT, UNIFORM = "text", "uniform"
LEAST = 0.97
METHODS = ["strided:preset=fine", "flexprefill:gamma=0.95", "mean_pool", "hip"]


@dataclass(frozen=True)
class Cell:
    """A method on one kind of input at a length: medians over rounds.

    Attributes:
        later: is it of prompts after a patch's first?
        ratio: dense / patched; `low`, `high`: its range.
        density: kept / causal of the sparse calls, mean; None without any.
        exact: share of calls that ran exact.
        reasons: exact calls by reason.
    """

    kind: str
    length: int
    method: str
    later: bool
    dense: float
    ratio: float
    low: float
    high: float
    density: float | None
    exact: float
    reasons: dict[str, int]

    @property
    def slower(self) -> bool:
        return self.ratio < LEAST


def main(
    output: Annotated[Path, typer.Option(help="Folder for runs.jsonl and table.md.")],
    model: Annotated[
        str, typer.Option(help="Hub id, local folder, .gguf file, or `smollm2`.")
    ] = "smollm2",
    method: Annotated[
        list[str] | None, typer.Option(help="`NAME:key=value,...`; may repeat.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "2k,4k,8k",
    dtypes: Annotated[str, typer.Option(help="Of the model.")] = "float32,bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds per length.")] = 5,
    prompts: Annotated[int, typer.Option(min=1, help="Prefills of a patch in a round.")] = 2,
    text: Annotated[str, typer.Option(help="`kjv`, `stdlib`, or a UTF-8 file.")] = "kjv",
    seed: Annotated[int, typer.Option(help="Of the first prompt.")] = 0,
) -> None:
    """Time prefills of an unpatched model and of one patched with min_length="auto"."""
    with user_errors():
        methods = {spec: parse_method(spec) for spec in method or METHODS}
        wanted, prose = parse_lengths(lengths), long_text(text)
    tables = []
    for dtype in dtypes.split(","):
        setup = {"model": model, "dtype": dtype, "text": text, "prompts": prompts, "seed": seed}
        file = RowFile(output / "runs.jsonl", setup)
        todo = [
            (length, kind, round_)
            for length in wanted
            for kind in (TEXT, UNIFORM)
            for round_ in range(repeats)
            if not _complete(file.rows, methods, prompts, length=length, kind=kind, round=round_)
        ]
        with progress() as bar:
            task = bar.add_task(f"{dtype} prefills", total=len(todo) * prompts * (1 + len(methods)))
            for row in _measure(todo, methods, prose, setup):
                file.add(row)
                bar.advance(task)
        found = cells(file.rows, wanted, list(methods))
        tables.append(f"{markdown(found)}\n{dtype}: {describe_machines(file.rows)}\n")
    table = "\n".join(tables)
    (output / "table.md").write_text(table)
    console.print(table, markup=False)


def _measure(
    todo: Sequence[tuple[int, str, int]],
    methods: Mapping[str, Method],
    prose: str,
    setup: Mapping[str, Any],
) -> Iterator[Row]:
    """Run the rounds `(length, kind, round)` and yield a row per prefill."""
    warmed = None
    lengths = sorted({length for length, _, _ in todo})
    for length, model, tokenizer in _models(setup, lengths):

        def prompt(tokens: int, number: int, tokenizer: Any = tokenizer) -> Tensor:
            seed = setup["seed"] + number
            return passkey_prompt(tokenizer, tokens, text=prose, seed=seed).input_ids

        if warmed is not model:
            for variant in variants(model, methods).values():
                variant.timed(prompt(WARM_UP_TOKENS, 0))
            warmed = model
        for _, kind, round_ in (item for item in todo if item[0] == length):
            patched = variants(model, methods)
            with uniform_attention(model) if kind == UNIFORM else contextlib.nullcontext():
                for nth in range(setup["prompts"]):
                    ids = prompt(length, round_ * setup["prompts"] + nth)
                    for name in rotated(list(patched), round_ + nth):
                        place = {"length": length, "kind": kind, "round": round_, "nth": nth}
                        yield {**place, "method": name, **patched[name].timed(ids)}


def _models(setup: Mapping[str, Any], lengths: list[int]) -> Iterator[tuple[int, Any, Any]]:
    with user_errors():
        yield from load_for_lengths(setup["model"], lengths, dtype=setup["dtype"], device="cpu")


@dataclass(frozen=True)
class Variant:
    """A model, and its patch if it has one."""

    model: PreTrainedModel
    patch: sparse_patch.Patch | None = None

    def timed(self, ids: Tensor) -> dict[str, Any]:
        """A prefill: its seconds and, of a patched model, what its calls did."""
        if self.patch is None:
            seconds = prefill(self.model, ids).seconds
            return {"seconds": seconds, "sparse": 0, "exact": {}, "density": None}
        before = self.patch.report()
        seconds = prefill(self.model, ids).seconds
        after = self.patch.report()
        sparse = after.sparse_calls - before.sparse_calls
        kept = (after.density or 0) * after.sparse_calls
        kept -= (before.density or 0) * before.sparse_calls
        return {
            "seconds": seconds,
            "sparse": sparse,
            "exact": dict(Counter(after.exact) - Counter(before.exact)),
            "density": kept / sparse if sparse else None,
        }


def variants(model: PreTrainedModel, methods: Mapping[str, Method]) -> dict[str, Variant]:
    """The model as it is, and newly patched twins of it, which have its very weights."""
    found = {DENSE: Variant(model)}
    for name, method in methods.items():
        twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
        found[name] = Variant(twin, sparse_patch.patch(twin, method, min_length="auto"))
    return found


@contextlib.contextmanager
def uniform_attention(model: PreTrainedModel) -> Iterator[None]:
    """Every query is 0 inside, so every key that a row sees weighs the same.

    Raises:
        ValueError: the model has no layers called q_proj.
    """
    weights = [weight for name, weight in model.named_parameters() if ".q_proj." in name]
    if not weights:
        raise ValueError(f"{type(model).__name__} has no layers called q_proj to put at 0")
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
        try:
            yield
        finally:
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


def _complete(rows: Sequence[Row], names: Iterable[str], prompts: int, **place: Any) -> bool:
    mine = [row for row in rows if all(row[key] == value for key, value in place.items())]
    done = {(row["method"], row["nth"]) for row in mine}
    return done >= set(itertools.product([DENSE, *names], range(prompts)))


def cells(rows: Sequence[Row], lengths: Sequence[int], names: Sequence[str]) -> list[Cell]:
    """In the order of the table; what no complete pair of prefills is there for is left out."""
    # A later row of the same place replaces an earlier one: a round that was cut short is run anew.
    fields = ("length", "kind", "round", "nth", "method")
    latest = {tuple(row[field] for field in fields): row for row in rows}
    found = []
    for length, kind, name, later in itertools.product(
        lengths, (TEXT, UNIFORM), names, (False, True)
    ):
        pairs = [
            (dense, row)
            for (*place, method), row in latest.items()
            if (row["length"], row["kind"], method) == (length, kind, name)
            and (row["nth"] > 0) == later
            and (dense := latest.get((*place, DENSE))) is not None
        ]
        if pairs:
            found.append(_cell(kind, length, name, later, pairs))
    return found


def _cell(kind: str, length: int, name: str, later: bool, pairs: list[tuple[Row, Row]]) -> Cell:
    ratios = [dense["seconds"] / row["seconds"] for dense, row in pairs]
    densities = [row["density"] for _, row in pairs if row["density"] is not None]
    reasons: Counter[str] = Counter()
    for _, row in pairs:
        reasons.update(row["exact"])
    exact = reasons.total()
    return Cell(
        kind=kind,
        length=length,
        method=name,
        later=later,
        dense=statistics.median(dense["seconds"] for dense, _ in pairs),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        density=statistics.fmean(densities) if densities else None,
        exact=exact / max(1, exact + sum(row["sparse"] for _, row in pairs)),
        reasons=dict(reasons.most_common()),
    )


def markdown(found: Sequence[Cell]) -> str:
    """The table, with slower cells marked and counted."""
    lines = [
        "| tokens | input | method | prefill of a patch | dense, s | dense / patched (range) "
        "| density | exact calls | |",
        "|---:|---|---|---|---:|---:|---:|---|---|",
    ]
    for cell in found:
        density = "" if cell.density is None else f"{cell.density:.2f}"
        why = ", ".join(f"{reason} {count}" for reason, count in cell.reasons.items())
        lines.append(
            f"| {cell.length:,} | {cell.kind} | {cell.method} "
            f"| {'later' if cell.later else 'first'} | {cell.dense:.2f} "
            f"| {cell.ratio:.2f}x ({cell.low:.2f}-{cell.high:.2f}) | {density} "
            f"| {cell.exact:.0%}{f' ({why})' if why else ''} | {'slower' if cell.slower else ''} |"
        )
    slower = sum(cell.slower for cell in found)
    lines.append(f"\n{slower} of {len(found)} cells are below {LEAST}x.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
