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
import functools
import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench import grid, options
from bench.prefills import DENSE, WARM_UP_TOKENS, Prefills
from sparse_patch_eval.ask.prefill import prefill
from sparse_patch_eval.base.console import user_errors
from sparse_patch_eval.base.options import parse_lengths
from sparse_patch_eval.base.rows import Row, RowFile, describe_machines
from sparse_patch_eval.inputs.text import long_text
from torch import Tensor
from transformers import PreTrainedModel

import sparse_patch
from sparse_patch import Method, get_method

TEXT, UNIFORM = "text", "uniform"
LEAST = 0.97
METHODS = ["strided:preset=fine", "flexprefill:gamma=0.95", "mean_pool", "hip"]


def main(
    output: Annotated[Path, typer.Option(help="Folder for runs.jsonl and table.md.")],
    model: options.Model = "smollm2",
    method: options.Methods = None,
    lengths: options.Lengths = "2k,4k,8k",
    dtypes: Annotated[str, typer.Option(help="Of the model.")] = "float32,bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds per length.")] = 5,
    prompts: Annotated[int, typer.Option(min=1, help="Prefills of a patch in a round.")] = 2,
    text: options.Text = "kjv",
    seed: Annotated[int, typer.Option(help="Of the first prompt.")] = 0,
) -> None:
    """Time prefills of an unpatched model and of one patched with min_length="auto"."""
    with user_errors():
        methods = {spec: get_method(spec) for spec in method or METHODS}
        wanted, prose = parse_lengths(lengths), long_text(text)
    places = [{"length": n, "kind": kind} for n in wanted for kind in (TEXT, UNIFORM)]
    whole = set(itertools.product([DENSE, *methods], range(prompts)))

    def complete(place: grid.Place, rows: list[Row]) -> bool:
        return whole <= {(row["method"], row["nth"]) for row in rows}

    tables = []
    for dtype in dtypes.split(","):
        setup = {"model": model, "dtype": dtype, "text": text, "prompts": prompts, "seed": seed}
        file = RowFile(output / "runs.jsonl", setup)
        todo = grid.missing(file.rows, places, range(repeats), complete)
        left = [place["length"] for place, _ in todo]
        with user_errors():
            prefills = Prefills(model, left, prose, dtype=dtype, device="cpu")
            prepare = functools.partial(_prepared, prefills, methods, prompts, seed)
            grid.fill(file, todo, prepare)
        table = report(cells(file.rows, wanted, list(methods)))
        tables.append(f"{table}\n{dtype}: {describe_machines(file.rows)}\n")
    grid.publish(output, "\n".join(tables))


def _prepared(
    prefills: Prefills, methods: Mapping[str, Method], prompts: int, seed: int, place: grid.Place
) -> Callable[[int], Iterator[Row]]:
    """A round is a row for every prefill."""

    def warm_up() -> None:
        for variant in variants(prefills.model, methods).values():
            variant.timed(prefills.prompt(WARM_UP_TOKENS, seed))

    def run(number: int) -> Iterator[Row]:
        patched = variants(prefills.model, methods)
        uniform = place["kind"] == UNIFORM
        with uniform_attention(prefills.model) if uniform else contextlib.nullcontext():
            for nth in range(prompts):
                ids = prefills.prompt(place["length"], seed + number * prompts + nth)
                for name in grid.turns(list(patched), number + nth):
                    yield {"nth": nth, "method": name, **patched[name].timed(ids)}

    prefills.at(place["length"], warm_up)
    return run


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


def cells(rows: Sequence[Row], lengths: Sequence[int], names: Sequence[str]) -> list[grid.Cell]:
    """In the order of the table; what no complete pair of prefills is there for is left out."""
    found = []
    for length, kind in itertools.product(lengths, (TEXT, UNIFORM)):
        place = {"length": length, "kind": kind}
        by_name = grid.pairs(grid.of_place(rows, place), ["round", "nth"], DENSE)
        for name, later in itertools.product(names, (False, True)):
            mine = [pair for pair in by_name.get(name, ()) if (pair[1]["nth"] > 0) == later]
            if mine:
                found.append(_cell({**place, "later": later}, name, mine))
    return found


def _cell(place: grid.Place, name: str, pairs: Sequence[tuple[Row, Row]]) -> grid.Cell:
    """Of prefills of dense and a patched model."""
    ratios = grid.Spread.of([dense["seconds"] / row["seconds"] for dense, row in pairs])
    densities = [row["density"] for _, row in pairs if row["density"] is not None]
    reasons: Counter[str] = Counter()
    for _, row in pairs:
        reasons.update(row["exact"])
    exact, sparse = reasons.total(), sum(row["sparse"] for _, row in pairs)
    facts = {
        "dense": statistics.median(dense["seconds"] for dense, _ in pairs),
        "density": f"{statistics.fmean(densities):.2f}" if densities else "",
        "exact": exact / max(1, exact + sparse),
        "reasons": ", ".join(f"{reason} {count}" for reason, count in reasons.most_common()),
    }
    seconds = statistics.median(row["seconds"] for _, row in pairs)
    return grid.Cell(place, name, seconds, ratios, facts, ("slower",) * (ratios.median < LEAST))


def _exact(cell: grid.Cell) -> str:
    why = cell.facts["reasons"]
    return f"{cell.facts['exact']:.0%}" + (why and f" ({why})")


COLUMNS: list[grid.Column] = [
    ("tokens", "r", lambda cell: f"{cell.place['length']:,}"),
    ("input", "l", lambda cell: cell.place["kind"]),
    ("method", "l", lambda cell: cell.name),
    ("prefill of a patch", "l", lambda cell: "later" if cell.place["later"] else "first"),
    ("dense, s", "r", lambda cell: f"{cell.facts['dense']:.2f}"),
    ("dense / patched (range)", "r", lambda cell: cell.ratio),
    ("density", "r", lambda cell: cell.facts["density"]),
    ("exact calls", "l", _exact),
    ("", "l", lambda cell: ", ".join(cell.missed)),
]


def report(found: Sequence[grid.Cell]) -> str:
    """The table, with slower cells marked and counted."""
    note = f"{grid.missed(found, 'slower')} of {len(found)} cells are below {LEAST}x."
    return grid.markdown(COLUMNS, found, note)


if __name__ == "__main__":
    typer.run(main)
