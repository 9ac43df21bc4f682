"""The comparison on a terminal: a table per task and length, that fits into 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table

from sparse_patch_eval.base.console import plain
from sparse_patch_eval.report.comparison import Comparison
from sparse_patch_eval.report.text import NOT_MEASURABLE, difference_text, number

_COLUMNS = ("method", "n", "score", "difference to dense", "density", "recall", "speed-up", "exact")


def tables(rows: Sequence[Comparison]) -> Iterator[Table]:
    """Of every task at every length: the primary score of each method, and what it cost."""

    def place(row: Comparison) -> tuple[Any, ...]:
        return id(row.section), row.benchmark, row.task, row.length

    for _, group in groupby(rows, place):
        yield _table(list(group))


def _table(rows: list[Comparison]) -> Table:
    table = Table(
        title=plain(f"\n{_title(rows[0])}"),
        caption=plain("\n".join(_remarks(rows))) or None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in _COLUMNS:
        first = name == _COLUMNS[0]
        # Only the method gives way where a terminal is narrow: numbers stay whole.
        table.add_column(
            name.replace(" to dense", "\nto dense"),
            justify="left" if first else "right",
            overflow="fold",
            no_wrap=not first,
        )
    for row in rows:
        table.add_row(*map(plain, _cells(row)))
    return table


def _title(row: Comparison) -> str:
    length = "" if row.length is None else f", {row.length:,} tokens"
    task = f"{row.benchmark}, average of its tasks" if row.is_average else row.task
    score = "" if row.primary is None else f": {row.primary.name}"
    return f"{task}{length}{score}"


def _cells(row: Comparison) -> tuple[str, ...]:
    score = row.primary
    gap = score.difference if score is not None and score.measurable is not False else None
    return (
        row.method,
        str(row.n),
        "-" if score is None else number(score.mean),
        "-" if gap is None else difference_text(gap).replace(" ", "\n", 1),
        number(row.density),
        number(row.recall),
        number(row.speed_up, ".2f"),
        number(row.exact_share, ".0%"),
    )


def _remarks(rows: list[Comparison]) -> Iterator[str]:
    if any(row.primary is not None and row.primary.measurable is False for row in rows):
        yield f"{NOT_MEASURABLE}: dense itself is near chance"
    for row in rows:
        yield from (f"{row.method}: {flag}" for flag in row.flags)
