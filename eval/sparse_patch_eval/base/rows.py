"""Measurements as JSON lines, from which a stopped run resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparse_patch.strict_json import parse_json
from sparse_patch_eval.base.machine import machine

__all__ = ["Row", "RowFile", "describe_machines", "read_rows"]

Row = dict[str, Any]


class RowFile:
    """A file of rows that share a set-up.

    Rows of other set-ups in the same file are left alone. Every line holds the set-up, the row and
    the machine with all versions; a line cut short by a kill is dropped.

    Attributes:
        rows: all rows of this set-up, those of earlier runs included, as written.
    """

    def __init__(self, path: Path, setup: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._setup, self._machine = path, dict(setup), machine()
        _end_last_line(path)
        self.rows = [row for row in read_rows(path) if self._is_ours(row)]

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row to the file at once."""
        whole = {**self._setup, **row, "machine": self._machine}
        self.rows.append(whole)
        with self._path.open("a") as lines:
            lines.write(json.dumps(whole) + "\n")

    def keys(self, *fields: str) -> set[tuple[Any, ...]]:
        """The combinations of values of these fields that have rows."""
        return {tuple(row[field] for field in fields) for row in self.rows}

    def _is_ours(self, row: Row) -> bool:
        return {key: row.get(key) for key in self._setup} == self._setup


def describe_machines(rows: list[Row]) -> str:
    """Model, machine, versions and commits of the rows, in one line for below a table."""
    last = rows[-1]["machine"]
    commits = dict.fromkeys(str(row["machine"]["git"]) for row in rows)
    return (
        f"{rows[-1]['model']}, {rows[-1]['dtype']}, {last['device']}, "
        f"{last['cpu_capability']}, {last['threads']} threads, torch {last['torch']}, "
        f"transformers {last['transformers']}, commit {', '.join(commits)}."
    )


def _end_last_line(path: Path) -> None:
    """End a line that a kill cut short, so that the next one is separate."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as lines:
            lines.write("\n")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none if there is no file; a line cut short by a kill is left out.

    Raises:
        ValueError: a complete line is not a row; names the file and the line.
    """
    return [row for _, row in read_lines(path) if row is not None] if path.exists() else []


def read_lines(path: Path) -> Iterator[tuple[int, Row | None]]:
    """Number and row of each non-blank line of a file; the row is None for a line cut short.

    Raises:
        ValueError: see `read_rows`.
    """
    # Not splitlines: a Unicode line separator inside an answer does not end a line of the file.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _parse(line, f"{path}, line {number}")


def _parse(line: str, where: str) -> Row | None:
    try:
        row = parse_json(line, nan=True)
    except json.JSONDecodeError:
        return None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a JSON object, not {line[:80]!r}")
    return row
