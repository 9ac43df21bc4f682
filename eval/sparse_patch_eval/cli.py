"""The `sparse-patch` command."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.table import Table

import sparse_patch
from sparse_patch_eval.cli_eval import evaluate, list_tasks
from sparse_patch_eval.cli_inspect import inspect
from sparse_patch_eval.cli_report import report
from sparse_patch_eval.cli_tune import tune
from sparse_patch_eval.console import fail, plain, visible
from sparse_patch_eval.demo import STEPS_PER_LENGTH, DemoRow, run_length, warm_up
from sparse_patch_eval.models import load_for_lengths
from sparse_patch_eval.options import parse_lengths, parse_method
from sparse_patch_eval.prefill import machine
from sparse_patch_eval.text import long_text, passkey_prompt

app = typer.Typer(
    help="Training-free sparse attention for the prefill of Hugging Face models.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.command("eval")(evaluate)
app.command("tasks")(list_tasks)
app.command("report")(report)
app.command("inspect")(inspect)
app.command("tune")(tune)
console = Console()
errors = Console(stderr=True)


@app.callback()
def main(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Say what is loaded from where.")
    ] = False,
) -> None:
    """Training-free sparse attention for the prefill of Hugging Face models."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    if not verbose:
        _quiet_transformers()


@app.command()
def methods(
    name: Annotated[
        list[str] | None, typer.Argument(help="Show these in full; default: all, in short.")
    ] = None,
) -> None:
    """List the methods: name, one line, source, parameters, presets; with names, in full."""
    if not name:
        _list_methods()
        return
    try:
        found = [sparse_patch.describe(one) for one in name]
    except ValueError as error:
        fail(error)
    for info in found:
        _show_method(info)


def _list_methods() -> None:
    for one in sparse_patch.list_methods():
        info = sparse_patch.describe(one)
        source = f" ({info.source})" if info.source else ""
        summary = plain(f"{info.summary}{source}")
        console.print(f"[bold]{info.name}[/]: {summary}", highlight=False)
        defaults = ", ".join(f"{row.name}={row.default!r}" for row in info.parameters)
        console.print(Padding(plain(defaults), (0, 0, 0, 4)), style="dim", highlight=False)
        if info.presets:
            names = ", ".join(f"preset={name}" for name in info.presets)
            console.print(Padding(names, (0, 0, 0, 4)), highlight=False)
    console.print("\nsparse-patch methods NAME: what each parameter does and may be")


def _show_method(info: sparse_patch.MethodInfo) -> None:
    title = plain(f"{info.name}: {info.summary}" + (f" ({info.source})" if info.source else ""))
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("parameter", "default", "may be", "meaning"):
        table.add_column(column, overflow="fold")
    for one in info.parameters:
        table.add_row(*map(plain, (one.name, repr(one.default), one.allowed, one.help)))
    console.print(table)
    for preset, values in info.presets.items():
        settings = ", ".join(f"{key}={value!r}" for key, value in values.items())
        console.print(f"preset={preset}: {settings}", highlight=False, markup=False)


@app.command()
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
    the first token of both, what share of the causal blocks was computed (density), what share of
    the attention mass that kept (recall, on a sample of rows), whether the answer is the same, and
    how far the distributions of the first token are apart (KL).

    One run per cell: for figures to quote, use scripts/bench_prefill.py.
    """
    try:
        wanted = parse_lengths(lengths or ("2k,4k" if quick else "2k,4k,8k"))
        chosen = parse_method(method)
        with console.status("loading text and model (the first time from PyPI)"):
            prose = long_text(text)
            models = load_for_lengths(model, wanted, dtype=dtype, device=device)
            first = next(models)
            # All of them, before the first is timed: a text that is too short for the longest one
            # must not cost the others.
            prompts = {n: passkey_prompt(first[2], n, text=prose, seed=seed) for n in wanted}
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    rows = []
    with _progress() as progress:
        task = progress.add_task("warming up", total=1 + STEPS_PER_LENGTH * len(wanted))
        warm_up(first[1], chosen, first[2])

        def step(what: str) -> None:
            progress.update(task, advance=1, description=what)

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
    """What the table cannot say."""
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


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":  # accelerate launch -m sparse_patch_eval.cli eval ...
    app()
