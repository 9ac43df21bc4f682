"""`sparse-patch demo`: a real model prefills a long prompt, dense and sparse, side by side."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.table import Table

from sparse_patch import get_method
from sparse_patch_eval.ask.demo import STEPS_PER_LENGTH, DemoRow, run_length, warm_up
from sparse_patch_eval.base.console import fail, plain, visible
from sparse_patch_eval.base.early import check_device, check_output
from sparse_patch_eval.base.machine import machine
from sparse_patch_eval.base.options import parse_lengths
from sparse_patch_eval.inputs.models import load_for_lengths
from sparse_patch_eval.inputs.text import long_text, passkey_prompt

console = Console()
errors = Console(stderr=True)


def demo(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Shorter prompts (2k, 4k): under two minutes on 2 cores."),
    ] = False,
    model: Annotated[
        str, typer.Option(help="Hub id, folder, .gguf file, or `smollm2`, `gemma3-270m` (PyPI).")
    ] = "smollm2",
    method: Annotated[
        str, typer.Option(help="`NAME:key=value,...`; see `sparse-patch methods`.")
    ] = "flexprefill:gamma=0.9",
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

    A seven-digit passkey is hidden in real prose and asked for at the end. Per length: the time to
    the first token of both, the share of the causal blocks that was computed (density), the share
    of the attention mass that this kept (recall, on a sample of rows), whether the answer is the
    same, and the distance between the distributions of the first token (KL).

    One run per cell: for figures to quote, use scripts/bench_prefill.py.
    """
    try:
        prompt_lengths = parse_lengths(lengths or ("2k,4k" if quick else "2k,4k,8k"))
        chosen = get_method(method)
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
    rows = []
    with _progress() as progress:
        task = progress.add_task("warming up", total=1 + STEPS_PER_LENGTH * len(prompt_lengths))
        warm_up(first[1], chosen, first[2])

        def step(description: str) -> None:
            progress.update(task, advance=1, description=description)

        try:
            for length, lm, tokenizer in itertools.chain([first], models):
                rows.append(run_length(lm, tokenizer, chosen, prompts[length], step))
        except (ValueError, OSError) as error:
            fail(error)
        progress.update(task, completed=progress.tasks[0].total, description="done")
    console.print(_demo_table(rows, f"{model}, {dtype}, {chosen}"))
    for line in _remarks(rows):
        console.print(visible(line), markup=False)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        result = {
            "model": model,
            "dtype": dtype,
            "method": repr(chosen),
            "seed": seed,
            "machine": machine(),
            "rows": [asdict(row) for row in rows],
        }
        (output / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"wrote {output / 'demo.json'}", markup=False)


def _demo_table(rows: list[DemoRow], title: str) -> Table:
    # A light box: the eight columns then fit a terminal of 80.
    table = Table(
        title=plain(title),
        title_justify="left",
        caption="KL: dense to sparse, nats",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for column in ("tokens", "dense s", "sparse s", "speed-up", "density", "recall", "KL"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("answer", no_wrap=True)
    for row in rows:
        verdict = "same" if row.same_answer else "differs"
        table.add_row(
            f"{row.tokens:,}",
            f"{row.dense_seconds:.2f}",
            f"{row.sparse_seconds:.2f}",
            f"{row.speed_up:.2f}x",
            "-" if row.density is None else f"{row.density:.3f}",
            "-" if row.recall is None else f"{row.recall:.3f}",
            f"{row.kl:.4f}",
            f"{verdict}, {'right' if row.right else 'wrong'}",
        )
    return table


def _remarks(rows: list[DemoRow]) -> list[str]:
    """Remarks below the table."""
    lines = []
    for row in rows:
        if not row.same_answer:
            lines.append(
                f"{row.tokens:,} tokens: dense wrote {row.dense_answer!r}, sparse {row.answer!r}, "
                f"the passkey is {row.expected!r}."
            )
        if row.density is None:
            lines.append(f"{row.tokens:,} tokens: all calls ran exact {row.exact_calls}.")
    if any(not row.dense_right for row in rows):
        lines.append(
            "Where dense is wrong too, the model is too small for the task, not the method."
        )
    return lines


def _progress() -> Progress:
    # Few refreshes: drawing competes with the prefill for the same cores.
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Elapsed(),
        console=errors,
        refresh_per_second=1,
    )
