"""Output on the terminal: tables on stdout, errors and progress on stderr."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

__all__ = ["console", "fail", "note", "progress", "user_errors"]

# Control characters except line feed and tab; direction marks, which can disguise a text; halves of
# surrogate pairs.
_CONTROL = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)
console = Console()
_errors = Console(stderr=True)


def fail(error: Exception | str) -> NoReturn:
    """End the command with a message and exit code 2."""
    _errors.print(Text.assemble(("error:", "bold red"), " ", visible(str(error))), soft_wrap=True)
    raise typer.Exit(2)


def note(message: str) -> None:
    """Print a message to stderr."""
    _errors.print(visible(message), highlight=False, markup=False)


def visible(text: str) -> str:
    """A text whose control characters a terminal shows instead of obeying.

    Line feeds and tabs stay. Other control characters, direction marks and halves of surrogate
    pairs, which cannot be encoded, are written as in Python: `\\x1b`.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def plain(text: str) -> str:
    """Like `visible`, with rich's markup escaped."""
    return escape(visible(text))


@contextmanager
def user_errors() -> Iterator[None]:
    """Print errors about a wrong option or a missing file as a message, not a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        fail(error)


def progress(*, disable: bool = False) -> Progress:
    """A bar with elapsed and remaining time; disabled where another process shows it."""
    # Few refreshes: drawing competes with the prefill for the same cores.
    text = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # the rest of the line's width
    columns = (
        TextColumn(
            "{task.description}", style="progress.description", markup=False, table_column=text
        ),
        *Progress.get_default_columns()[1:],
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=_errors, refresh_per_second=1, disable=disable, expand=True)
