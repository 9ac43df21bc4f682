"""One grid for all benchmarks: places times rounds, in turns, written as they come.

A place is what is timed together: a shape of tensors, or prompts of a length. Each of its rounds
calls every contender once, in an order that rotates, and becomes rows of a `RowFile`; a run that
was stopped goes on with the rounds that are not complete. Of the rows of a place comes a `Cell` for
each contender: ratios are taken within a round, and the median of the rounds counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_patch_eval.base.console import console, progress
from sparse_patch_eval.base.markdown import table
from sparse_patch_eval.base.rows import Row, RowFile

Place = dict[str, Any]
"""The values of a benchmark's axes, by name; every row of the place has them."""

Todo = list[tuple[Place, list[int]]]
"""Places, each with its rounds that are not complete."""


def turns(names: Sequence[str], by: int) -> list[str]:
    """So that what comes first in one round does not in the next."""
    by %= len(names)
    return [*names[by:], *names[:by]]


def of_place(rows: Iterable[Row], place: Place) -> list[Row]:
    """The rows that have all values of a place."""
    return [row for row in rows if all(row[key] == value for key, value in place.items())]


def of_places(rows: Sequence[Row], places: Iterable[Place]) -> list[Row]:
    """The rows of all of them, place by place."""
    return [row for place in places for row in of_place(rows, place)]


def by_place(rows: Iterable[Row], axes: Iterable[str]) -> list[tuple[Place, list[Row]]]:
    """Rows by the values of these axes, in the order of the rows."""
    axes = list(axes)
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[axis] for axis in axes), []).append(row)
    return [(dict(zip(axes, key, strict=True)), mine) for key, mine in found.items()]


def missing(
    rows: Sequence[Row],
    places: Iterable[Place],
    rounds: Iterable[int],
    complete: Callable[[Place, list[Row]], bool],
    count: str = "round",
) -> Todo:
    """The rounds that are to be run, place by place.

    Args:
        complete: are these rows all of a round of the place?
        count: the field that numbers rounds.
    """
    rounds, todo = list(rounds), []
    for place in places:
        mine = of_place(rows, place)
        left = [n for n in rounds if not complete(place, of_place(mine, {count: n}))]
        if left:
            todo.append((place, left))
    return todo


def fill(
    file: RowFile,
    todo: Todo,
    prepare: Callable[[Place], Callable[[int], Iterable[Row]]],
    count: str = "round",
) -> None:
    """Run the rounds of `todo` and write their rows.

    Args:
        prepare: gets a place ready, warmed up, and returns what runs a round of it and yields its
            rows.
        count: the field that numbers rounds.
    """
    with progress() as bar:
        task = bar.add_task("", total=sum(len(rounds) for _, rounds in todo))
        for place, rounds in todo:
            bar.update(task, description=", ".join(map(str, place.values())))
            run = prepare(place)
            for number in rounds:
                for row in run(number):
                    file.add({**place, count: number, **row})
                bar.advance(task)


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, and their range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        """`1.27x (1.20-1.42)`"""
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


def ratio(rows: Iterable[Row], over: str, name: str) -> Spread | None:
    """Seconds of the call `over` as a multiple of `name`'s, in rows that have both; None without.

    The rows hold the seconds of all calls of a round by name.
    """
    timed = [row["seconds"] for row in rows if {over, name} <= set(row["seconds"])]
    return Spread.of([seconds[over] / seconds[name] for seconds in timed]) if timed else None


@dataclass(frozen=True)
class Cell:
    """A contender at a place: a line of the table.

    Attributes:
        seconds: of a call, median over rounds.
        ratio: of dense's time and its time, whichever way the benchmark's table says.
        facts: all else that the table shows, by name.
        missed: targets that it misses, in words.
    """

    place: Place
    name: str
    seconds: float
    ratio: Spread
    facts: dict[str, Any] = field(default_factory=dict)
    missed: tuple[str, ...] = ()


Column = tuple[str, str, Callable[[Cell], object]]
"""Heading, alignment (see `base.markdown.table`), and what it says of a cell."""


def markdown(columns: Sequence[Column], cells: Iterable[Cell], *notes: str) -> str:
    """A table of the cells, with notes below it."""
    heads, aligns, shown = zip(*columns, strict=True)
    lines = table(heads, "".join(aligns), ([show(cell) for show in shown] for cell in cells))
    return "\n\n".join(["\n".join(lines), *notes]) + "\n"


def missed(cells: Iterable[Cell], target: str) -> int:
    """How many miss a target."""
    return sum(target in cell.missed for cell in cells)


def pairs(
    rows: Iterable[Row], fields: Sequence[str], dense: str
) -> dict[str, list[tuple[Row, Row]]]:
    """Rows by their "method", each beside that of the method `dense` with the same fields.

    A later row takes the place of an earlier one: a round that was cut short is run anew.
    """
    latest = {(row["method"], *(row[field] for field in fields)): row for row in rows}
    found: dict[str, list[tuple[Row, Row]]] = {}
    for (name, *place), row in latest.items():
        if (base := latest.get((dense, *place))) is not None:
            found.setdefault(name, []).append((base, row))
    return found


def made_with(rows: Sequence[Row]) -> str:
    """Machine, torch and commits behind some rows of several settings, in a line."""
    about = rows[-1]["machine"]
    commits = ", ".join(dict.fromkeys(str(row["machine"]["git"]) for row in rows))
    return (
        f"{about['device']}, {about['cpu_capability']}, torch {about['torch']}, commit {commits}."
    )


def publish(output: Path, text: str) -> None:
    """Write `table.md` into a folder, and print it."""
    (output / "table.md").write_text(text)
    console.print(text, markup=False)
