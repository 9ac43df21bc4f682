"""`sparse-patch demo`: a real model prefills a long prompt, dense and sparse, side by side."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from sparse_patch import RECOMMENDED, get_method
from sparse_patch_eval.ask.demo import (
    DENSE_STEPS,
    STEPS_PER_METHOD,
    DemoRow,
    run_length,
    verdict,
    warm_up,
)
from sparse_patch_eval.base.console import console, fail, plain, progress, visible
from sparse_patch_eval.base.early import check_device, check_output
from sparse_patch_eval.base.machine import machine
from sparse_patch_eval.base.options import parse_lengths
from sparse_patch_eval.inputs.models import load_for_lengths
from sparse_patch_eval.inputs.text import long_text, passkey_prompt

# Beside the method we recommend: the best known of the published ones.
BESIDE = "flexprefill:gamma=0.9"


def demo(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Shorter prompts (2k, 4k): a few minutes on 2 cores."),
    ] = False,
    model: Annotated[
        str, typer.Option(help="Hub id, folder, .gguf file, or `smollm2`, `gemma3-270m` (PyPI).")
    ] = "smollm2",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="`NAME:key=value,...`; repeatable. Default: what `sparse_patch.patch(model)` does "
            f"({RECOMMENDED}, where it is faster), and {BESIDE}"
        ),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths in tokens; default 2k,4k,8k.")
    ] = None,
    text: Annotated[
        str, typer.Option(help="Prose around the passkey: `kjv`, `stdlib`, or a UTF-8 file.")
    ] = "kjv",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Chooses the prose and the passkey.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for demo.json: all numbers, and the machine.")
    ] = None,
) -> None:
    """Prefill long prompts with a real model, dense and sparse, and compare time and answer.

    A seven-digit passkey is hidden in real prose and asked for at the end. Per length and method:
    the time to the first token, the share of the causal attention that was computed, the share of
    the attention mass that this kept (recall, on a sample of rows), the distance between the
    distributions of the first token (KL), and whether the answer is the same.

    One run per cell: for figures to quote, use scripts/bench_prefill.py.
    """
    try:
        prompt_lengths = parse_lengths(lengths or ("2k,4k" if quick else "2k,4k,8k"))
        patches: dict[str, dict[str, Any]] = {RECOMMENDED: {}, BESIDE: {"method": BESIDE}}
        if method:
            patches = {spec: {"method": spec} for spec in method}
        for spec in patches:
            get_method(spec)
        check_device(device)
        if output is not None:
            check_output(output)
        with console.status("loading text and model (the first time from PyPI)"):
            prose = long_text(text)
            models = load_for_lengths(model, prompt_lengths, dtype=dtype, device=device)
            first = next(models)
            # All prompts before the first is timed: a text too short for the longest prompt must
            # not waste the runs of the others.
            prompts = {
                n: passkey_prompt(first[2], n, text=prose, seed=seed) for n in prompt_lengths
            }
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    rows: list[DemoRow] = []
    with progress() as bar:
        steps = DENSE_STEPS + STEPS_PER_METHOD * len(patches)
        task = bar.add_task("warming up", total=1 + steps * len(prompt_lengths))
        warm_up(first[1], patches, prompts[prompt_lengths[0]])

        def step(description: str) -> None:
            bar.update(task, advance=1, description=description)

        try:
            for length, lm, tokenizer in itertools.chain([first], models):
                rows += run_length(lm, tokenizer, patches, prompts[length], step)
        except (ValueError, OSError) as error:
            fail(error)
        bar.update(task, completed=bar.tasks[0].total, description="done")
    console.print(_demo_table(rows, f"{model}, {dtype}, {device}"))
    for line in _remarks(rows):
        console.print(visible(line), markup=False, highlight=False)
    console.print(visible(verdict(rows)), markup=False, highlight=False, style="bold")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        result = {
            "model": model,
            "dtype": dtype,
            "methods": {spec: repr(get_method(spec)) for spec in patches},
            "seed": seed,
            "machine": machine(),
            "rows": [asdict(row) for row in rows],
        }
        (output / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"wrote {output / 'demo.json'}", markup=False)
    # Not wrapped: a command is there to be copied.
    command = visible(_next_command(model, rows))
    console.print(command, markup=False, highlight=False, soft_wrap=True)


def _next_command(model: str, rows: list[DemoRow]) -> str:
    words = ["sparse-patch", "inspect", "--length", str(rows[-1].tokens)]
    words += ["--model", model] if model != "smollm2" else []
    packages = ("jinja2", "matplotlib")
    ready = all(importlib.util.find_spec(package) for package in packages)
    install = "" if ready else 'pip install "sparse-patch[eval]" && '
    return f"next, what was kept and lost, head by head: {install}{shlex.join(words)}"


def _demo_table(rows: list[DemoRow], title: str) -> Table:
    # A light box: the columns then fit a terminal of 80.
    table = Table(
        title=plain(title),
        title_justify="left",
        caption="computed: share of the causal attention; KL: dense to sparse, nats",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("method", overflow="fold")
    for column in ("seconds", "speed-up", "computed", "recall", "KL"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("answer", no_wrap=True)
    for tokens, group in itertools.groupby(rows, lambda row: row.tokens):
        methods = list(group)
        right = "right" if methods[0].dense_right else "wrong"
        seconds = f"{methods[0].dense_seconds:.2f}"
        table.add_row(f"{tokens:,}", "dense", seconds, "", "", "", "", right)
        for row in methods:
            table.add_row("", *map(plain, _cells(row)))
    return table


def _cells(row: DemoRow) -> tuple[str, ...]:
    return (
        row.method,
        f"{row.sparse_seconds:.2f}",
        f"{row.speed_up:.2f}x",
        f"{row.computed:.3f}",
        "-" if row.recall is None else f"{row.recall:.3f}",
        f"{row.kl:.4f}",
        "same" if row.same_answer else f"differs, {'right' if row.right else 'wrong'}",
    )


def _remarks(rows: list[DemoRow]) -> list[str]:
    """Remarks below the table."""
    lines = []
    for row in rows:
        place = f"{row.tokens:,} tokens, {row.method}"
        if not row.same_answer:
            lines.append(
                f"{place}: dense wrote {row.dense_answer!r}, sparse {row.answer!r}, the passkey is "
                f"{row.expected!r}."
            )
        if row.density is None:
            lines.append(f"{place}: all calls ran exact {row.exact_calls}.")
    if any(not row.dense_right for row in rows):
        lines.append(
            "Where dense is wrong too, the model is too small for the task, not the method."
        )
    return lines
