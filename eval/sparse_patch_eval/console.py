"""What the scripts say on the terminal: tables out, errors and progress beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

console = Console(width=160)
_errors = Console(stderr=True)


def fail(error: Exception | str) -> NoReturn:
    """End the command with a message and exit code 2."""
    _errors.print(f"[bold red]error:[/] {error}", highlight=False)
    raise typer.Exit(2)


def note(message: str) -> None:
    """Say something that belongs to no table."""
    _errors.print(message, highlight=False, markup=False)


@contextmanager
def user_errors() -> Iterator[None]:
    """Errors that name a wrong option or a missing file become a message, not a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        fail(error)


def progress(*, disable: bool = False) -> Progress:
    """A bar with the time gone by and to go; without one where another process shows it."""
    # Few refreshes: drawing competes with the prefill for the same cores.
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    return Progress(*columns, console=_errors, refresh_per_second=1, disable=disable)
