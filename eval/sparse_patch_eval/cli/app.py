"""The `sparse-patch` command."""

from __future__ import annotations

import logging
from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

import sparse_patch
from sparse_patch_eval.base.console import fail, plain
from sparse_patch_eval.cli.demo import demo
from sparse_patch_eval.cli.doctor import doctor
from sparse_patch_eval.cli.eval import evaluate, list_tasks
from sparse_patch_eval.cli.inspect import inspect
from sparse_patch_eval.cli.report import report
from sparse_patch_eval.cli.tune import tune

__all__ = ["app"]

app = typer.Typer(
    help="Training-free sparse attention for the prefill of Hugging Face models.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.command("demo")(demo)
app.command("eval")(evaluate)
app.command("tasks")(list_tasks)
app.command("report")(report)
app.command("inspect")(inspect)
app.command("tune")(tune)
app.command("doctor")(doctor)
console = Console()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparse-patch {sparse_patch.__version__}")
        raise typer.Exit


@app.callback()
def main(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print what is loaded, and from where.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version, and end."
        ),
    ] = False,
) -> None:
    """Training-free sparse attention for the prefill of Hugging Face models."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    if not verbose:
        _quiet_transformers()


@app.command()
def methods(
    name: Annotated[
        list[str] | None,
        typer.Argument(help="Methods to describe in full; default: list all, briefly."),
    ] = None,
) -> None:
    """List the methods, or describe the named ones with all their parameters and presets."""
    if not name:
        _list_methods()
        return
    try:
        infos = [sparse_patch.describe(method) for method in name]
    except ValueError as error:
        fail(error)
    for info in infos:
        _show_method(info)


def _list_methods() -> None:
    for name in sparse_patch.list_methods():
        info = sparse_patch.describe(name)
        source = f" ({info.source})" if info.source else ""
        summary = plain(f"{info.summary}{source}")
        console.print(f"[bold]{info.name}[/]: {summary}", highlight=False)
        defaults = ", ".join(f"{row.name}={row.default!r}" for row in info.parameters)
        console.print(Padding(plain(defaults), (0, 0, 0, 4)), style="dim", highlight=False)
        if info.presets:
            names = ", ".join(f"preset={preset}" for preset in info.presets)
            console.print(Padding(names, (0, 0, 0, 4)), highlight=False)
    console.print("\nsparse-patch methods NAME: meaning and allowed values of each parameter")


def _show_method(info: sparse_patch.MethodInfo) -> None:
    title = plain(f"{info.name}: {info.summary}" + (f" ({info.source})" if info.source else ""))
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("parameter", "default", "allowed values", "meaning"):
        table.add_column(column, overflow="fold")
    for row in info.parameters:
        table.add_row(*map(plain, (row.name, repr(row.default), row.allowed, row.help)))
    console.print(table)
    for preset, values in info.presets.items():
        settings = ", ".join(f"{key}={value!r}" for key, value in values.items())
        console.print(f"preset={preset}: {settings}", highlight=False, markup=False)


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
