"""What the scripts say on the terminal: tables out, errors and progress beside them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn
from rich.text import Text

console = Console(width=160)
_errors = Console(stderr=True)


def fail(error: Exception | str) -> NoReturn:
    """End the command with a message and exit code 2."""
    _errors.print(Text("error: ", "bold red").append(visible(f"{error}"), "not bold default"))
    raise typer.Exit(2)


def note(message: str) -> None:
    """Say something that belongs to no table."""
    _errors.print(visible(message), highlight=False, markup=False)


def visible(text: str) -> str:
    """A text whose control characters a terminal shows and does not obey.

    Line feeds and tabs stay; all else that acts (escapes, carriage returns, direction marks) or
    cannot be encoded is written as Python would, `\\x1b`.
    """
    return "".join(_shown(one) for one in text)


def plain(text: str) -> str:
    """Like `visible`, for places where rich reads markup: brackets are brackets."""
    return escape(visible(text))


def _shown(one: str) -> str:
    if one in "\n\t" or unicodedata.category(one) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return one
    return one.encode("unicode_escape").decode()


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
