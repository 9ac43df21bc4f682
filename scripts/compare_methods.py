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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from plots import plot
from sparse_patch_eval.base.console import console, note, progress, user_errors
from sparse_patch_eval.base.options import choose_layers, parse_layers, parse_length
from sparse_patch_eval.base.rows import RowFile, describe_machines
from sparse_patch_eval.inputs.models import load
from sparse_patch_eval.inputs.text import long_text
from study.compare import compare, dense_baseline
from study.compare_report import DENSE, Entry, draw, markdown
from study.needles import NeedlePrompt, needle_prompts
from study.tuner import Tuner
from study.tuning import capture_layers, mean_density, tuning_layers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import sparse_patch
from sparse_patch.specs import parse_method, split_list, split_method


@dataclass(frozen=True)
class Lab:
    """What all parts of a run share."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: list[int]
    rows: int


def main(
    output: Annotated[Path, typer.Option(help="Folder for the rows, the table and the plots.")],
    length: Annotated[str, typer.Option(help="Prompt length in tokens.")] = "4k",
    targets: Annotated[str, typer.Option(help="Densities to compare at.")] = "0.15,0.25,0.4",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="`NAME` or `NAME:key=value,...` (parameters beside the knob); may repeat. "
            "Default: all methods."
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts to measure on.")] = 8,
    texts: Annotated[str, typer.Option(help="Their prose, by turns.")] = "kjv,pydoc",
    tuning_prompts: Annotated[int, typer.Option(min=1, help="Prompts to tune on.")] = 4,
    tuning_texts: Annotated[str, typer.Option(help="Their prose, by turns.")] = "kjv,pydoc",
    scored: Annotated[int, typer.Option(min=1, help="Last positions of prose for KL, NLL.")] = 512,
    layers: Annotated[
        str, typer.Option(help="Layers for recall and output error, as in `0,5,-1` or `::3`.")
    ] = "3::8",
    rows: Annotated[int, typer.Option(min=1, help="Query rows judged for recall, about.")] = 512,
    model: Annotated[
        str, typer.Option(help="Hub id, local folder, .gguf file, or `smollm2`.")
    ] = "smollm2",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Chooses prose and numbers.")] = 0,
) -> None:
    """Compare methods at equal density with each other, paired with dense."""
    with user_errors():
        densities = parse_targets(targets)
        specs = list(dict.fromkeys(method or _all_methods()))
        for spec in specs:
            parse_method(spec)
        wanted, n_tokens = parse_layers(layers), parse_length(length)
        named = {"--tuning-texts": split_list(tuning_texts), "--texts": split_list(texts)}
        if empty := [option for option, names in named.items() if not names]:
            raise ValueError(f"{empty[0]}: name at least one text, as in kjv,pydoc")
        prose = {name: long_text(name, option=option) for option in named for name in named[option]}
        lm, tokenizer = load(model, dtype=dtype, device=device, max_length=n_tokens)
        lab = Lab(lm, tokenizer, choose_layers(lm, wanted), rows)
        drawn = _prompts(lab, n_tokens, prompts, texts, prose, scored, seed, held_back=False)
        tuning = _prompts(
            lab, n_tokens, tuning_prompts, tuning_texts, prose, scored, seed, held_back=True
        )
        tuning_layers(len(choose_layers(lm, slice(None))), tuning)
    setup = {"model": model, "dtype": dtype, "device": device, "length": n_tokens}
    setup |= {"scored": scored, "seed": seed}
    tuned = RowFile(
        output / "tuned.jsonl",
        {**setup, "tuning_prompts": tuning_prompts, "tuning_texts": tuning_texts},
    )
    _tune(lab, tuned, specs, densities, tuning)
    chosen = {(row["method"], row["target"]): row for row in tuned.rows}
    entries = [
        Entry(target, spec, chosen[spec, target]["spec"], chosen[spec, target]["has_knob"])
        for target in densities
        for spec in specs
    ]
    file = RowFile(
        output / "rows.jsonl", {**setup, "texts": texts, "layers": lab.layers, "rows": rows}
    )
    _measure(lab, file, list(dict.fromkeys(entry.spec for entry in entries)), drawn)
    measured = [row for row in file.rows if row["prompt"] < prompts]
    table = markdown(entries, measured, seed=seed, about=describe_machines(measured))
    (output / "table.md").write_text(table)
    console.print(table, markup=False)
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


def _all_methods() -> list[str]:
    return [name for name in sparse_patch.list_methods() if name != "dense"]


def _prompts(
    lab: Lab,
    length: int,
    count: int,
    texts: str,
    prose: Mapping[str, str],
    scored: int,
    seed: int,
    *,
    held_back: bool,
) -> list[NeedlePrompt]:
    return needle_prompts(
        lab.tokenizer,
        length,
        count,
        texts={name: prose[name] for name in split_list(texts)},
        scored=scored,
        seed=seed,
        held_back=held_back,
    )


def _tune(
    lab: Lab, file: RowFile, specs: list[str], targets: list[float], prompts: list[NeedlePrompt]
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
        for captured in capture_layers(lab.model, prompts):
            inside.append(captured)
            bar.advance(task)
        for spec, missing in todo.items():
            bar.update(task, description=f"tuning {spec}")
            name, extra = split_method(spec)
            tuner = Tuner(name, lambda tried: mean_density(tried, inside), extra)
            for target in missing:
                found = tuner.tune(target)
                file.add(
                    {"method": spec, "target": target, "has_knob": tuner.has_knob, **asdict(found)}
                )
                bar.advance(task)


def _measure(lab: Lab, file: RowFile, specs: list[str], prompts: list[NeedlePrompt]) -> None:
    """Measure what is not measured yet; a row per method and prompt, dense included."""
    done, estimated = file.keys("method", "prompt"), False
    with progress() as bar:
        task = bar.add_task("", total=len(prompts) * len(specs))
        for index, prompt in enumerate(prompts):
            about = {"prompt": index, "text": prompt.text, "keys": prompt.keys}
            todo = [spec for spec in specs if (spec, index) not in done]
            bar.advance(task, len(specs) - len(todo))
            if not todo and (DENSE, index) in done:
                continue
            bar.update(task, description=f"prompt {index}: dense")
            start = time.perf_counter()
            dense = dense_baseline(lab.model, lab.tokenizer, prompt, lab.layers)
            if not estimated:
                estimated = True
                _estimate(time.perf_counter() - start, bar.tasks[task].remaining, len(prompts))
            if (DENSE, index) not in done:
                file.add({**about, "method": DENSE, **dense.row})
            for spec in todo:
                bar.update(task, description=f"prompt {index}: {spec}")
                row = compare(
                    lab.model, lab.tokenizer, prompt, parse_method(spec), dense, rows=lab.rows
                )
                file.add({**about, "method": spec, **row})
                bar.advance(task)


def _estimate(seconds: float, left: float | None, prompts: int) -> None:
    """Say how long the rest may take, if sparse prefills take about what dense ones do."""
    if left:
        minutes = (left + prompts) * seconds / 60
        note(f"{left:.0f} sparse prefills of about {seconds:.0f} s to do: {minutes:.0f} minutes")


if __name__ == "__main__":
    typer.run(main)
