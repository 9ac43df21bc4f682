#!/usr/bin/env python
"""The fair comparison: all methods at the same density, on held-out prompts, paired with dense.

    python scripts/compare_methods.py --length 4k --targets 0.25 --output results/compare_4k

Each method's knob (`sparse_patch.Knob`) is turned until its mean density over all
layers meets the target on tuning prompts. Then every prompt is prefilled densely once and sparsely
with each method, question and answer prefix included, and compared: KL and NLL on text, needles,
recall and output error (`study.compare`). Tuning reads densities only, on prose and numbers
that no measured prompt has.

Writes `tuned.jsonl`, `rows.jsonl` (a line per method and prompt), `table.md`, `kl.png` and
`margin.png` into the output folder. A run that was stopped goes on where it was; methods added
later are tuned and measured on the same prompts.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from bench import grid, options
from bench.plots import plot
from bench.prefills import DENSE
from sparse_patch_eval.base.console import note, progress, user_errors
from sparse_patch_eval.base.options import choose_layers, parse_layers, parse_length
from sparse_patch_eval.base.rows import RowFile, describe_machines
from sparse_patch_eval.inputs.models import load
from sparse_patch_eval.inputs.text import long_text
from study.compare import compare, dense_baseline
from study.needles import NeedlePrompt, needle_prompts
from study.report import Entry, draw, markdown
from study.tuning import Tuner, capture_layers, mean_density, tuning_layers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import sparse_patch
from sparse_patch import get_method
from sparse_patch.spelling import split_list, split_method

TURNS = "kjv,pydoc"


def main(
    output: Annotated[Path, typer.Option(help="Folder for the rows, the table and the plots.")],
    length: options.Length = "4k",
    targets: Annotated[str, typer.Option(help="Densities to compare at.")] = "0.15,0.25,0.4",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="`NAME` or `NAME:key=value,...` (parameters beside the knob); may repeat. "
            "Default: all methods."
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts to measure on.")] = 8,
    texts: Annotated[str, typer.Option(help="Their prose, by turns.")] = TURNS,
    tuning_prompts: Annotated[int, typer.Option(min=1, help="Prompts to tune on.")] = 4,
    tuning_texts: Annotated[str, typer.Option(help="Their prose, by turns.")] = TURNS,
    scored: Annotated[int, typer.Option(min=1, help="Last positions of prose for KL, NLL.")] = 512,
    layers: Annotated[
        str, typer.Option(help="Layers for recall and output error, as in `0,5,-1` or `::3`.")
    ] = "3::8",
    rows: Annotated[int, typer.Option(min=1, help="Query rows judged for recall, about.")] = 512,
    model: options.Model = "smollm2",
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    seed: Annotated[int, typer.Option(help="Chooses prose and numbers.")] = 0,
) -> None:
    """Compare methods at equal density with each other, paired with dense."""
    with user_errors():
        densities = parse_targets(targets)
        all_methods = [name for name in sparse_patch.list_methods() if name != "dense"]
        specs = list(dict.fromkeys(method or all_methods))
        for spec in specs:
            get_method(spec)
        wanted, n_tokens = parse_layers(layers), parse_length(length)
        prose = {
            option: {name: long_text(name, option=option) for name in split_list(names)}
            for option, names in (("--tuning-texts", tuning_texts), ("--texts", texts))
        }
        if empty := [option for option, named in prose.items() if not named]:
            raise ValueError(f"{empty[0]}: name at least one text, as in {TURNS}")
        lm, tokenizer = load(model, dtype=dtype, device=device, max_length=n_tokens)
        chosen = choose_layers(lm, wanted)
        draws = functools.partial(needle_prompts, tokenizer, n_tokens, scored=scored, seed=seed)
        drawn = draws(prompts, texts=prose["--texts"])
        tuning = draws(tuning_prompts, texts=prose["--tuning-texts"], held_back=True)
        tuning_layers(len(choose_layers(lm, slice(None))), tuning)
    setup = {"model": model, "dtype": dtype, "device": device, "length": n_tokens}
    setup |= {"scored": scored, "seed": seed}
    tuned = RowFile(
        output / "tuned.jsonl",
        {**setup, "tuning_prompts": tuning_prompts, "tuning_texts": tuning_texts},
    )
    _tune(lm, tuned, specs, densities, tuning)
    found = {(row["method"], row["target"]): row for row in tuned.rows}
    entries = [
        Entry(target, spec, found[spec, target]["spec"], found[spec, target]["has_knob"])
        for target in densities
        for spec in specs
    ]
    file = RowFile(output / "rows.jsonl", {**setup, "texts": texts, "layers": chosen, "rows": rows})
    tried = list(dict.fromkeys(entry.spec for entry in entries))
    _measure(lm, tokenizer, file, tried, drawn, chosen, rows)
    measured = [row for row in file.rows if row["prompt"] < prompts]
    about = describe_machines(measured)
    grid.publish(output, markdown(entries, measured, seed=seed, about=about))
    for metric in ("kl", "margin"):
        drawing = functools.partial(draw, entries=entries, rows=measured, metric=metric)
        plot(output / f"{metric}.png", drawing, size=(9, 5))


def parse_targets(text: str) -> list[float]:
    """Densities from `0.15,0.25`, ascending.

    Raises:
        ValueError: one is not a number between 0 and 1.
    """
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise ValueError(f"--targets {text!r}: give numbers, as in 0.15,0.25") from error
    if not all(0 < target < 1 for target in found):
        raise ValueError(f"--targets {text!r}: densities lie between 0 and 1")
    return found


def _tune(
    model: PreTrainedModel,
    file: RowFile,
    specs: Sequence[str],
    targets: Sequence[float],
    prompts: Sequence[NeedlePrompt],
) -> None:
    """Tune what is not tuned yet; a row per method and target."""
    done = file.keys("method", "target")
    todo = {spec: [t for t in targets if (spec, t) not in done] for spec in specs}
    if not any(todo.values()):
        return
    with progress() as bar:
        task = bar.add_task(
            "tuning: dense prefills", total=len(prompts) + sum(map(len, todo.values()))
        )
        inside = []
        for captured in capture_layers(model, prompts):
            inside.append(captured)
            bar.advance(task)
        for spec, missing in todo.items():
            bar.update(task, description=f"tuning {spec}")
            name, extra = split_method(spec)
            tuner = Tuner(name, lambda tried: mean_density(tried, inside), extra)
            for target in missing:
                row = {"method": spec, "target": target, "has_knob": tuner.has_knob}
                file.add({**row, **asdict(tuner.tune(target))})
                bar.advance(task)


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: RowFile,
    specs: Sequence[str],
    prompts: Sequence[NeedlePrompt],
    layers: list[int],
    rows: int,
) -> None:
    """Measure what is not measured yet; a row per method and prompt, dense included."""
    done = file.keys("method", "prompt")
    missing = {n: [spec for spec in specs if (spec, n) not in done] for n in range(len(prompts))}
    todo = {n: specs for n, specs in missing.items() if specs or (DENSE, n) not in done}
    with progress() as bar:
        task = bar.add_task("", total=sum(map(len, todo.values())))
        for index, left in todo.items():
            prompt = prompts[index]
            about = {"prompt": index, "text": prompt.text, "keys": prompt.keys}
            bar.update(task, description=f"prompt {index}: dense")
            start = time.perf_counter()
            dense = dense_baseline(model, tokenizer, prompt, layers)
            if index == min(todo):
                _estimate(time.perf_counter() - start, len(todo), sum(map(len, todo.values())))
            if (DENSE, index) not in done:
                file.add({**about, "method": DENSE, **dense.row})
            for spec in left:
                bar.update(task, description=f"prompt {index}: {spec}")
                row = compare(model, tokenizer, prompt, get_method(spec), dense, rows=rows)
                file.add({**about, "method": spec, **row})
                bar.advance(task)


def _estimate(seconds: float, prompts: int, sparse: int) -> None:
    """Say how long the rest may take, if sparse prefills take about what dense ones do."""
    if sparse:
        minutes = (sparse + prompts) * seconds / 60
        note(f"{sparse} sparse prefills of about {seconds:.0f} s to do: {minutes:.0f} minutes")


if __name__ == "__main__":
    typer.run(main)
