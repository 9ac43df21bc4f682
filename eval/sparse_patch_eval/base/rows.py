"""Measurements as JSON lines, one a measurement, that a run which was stopped goes on from."""

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

    Rows of another set-up may lie in the same file and are left alone. Every line carries the
    set-up, the row and the machine with all versions; a line that a kill cut short is dropped.

    Attributes:
        rows: all rows of this set-up, those of earlier runs included, as written.
    """

    def __init__(self, path: Path, setup: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._setup, self._machine = path, dict(setup), machine()
        _end_last_line(path)
        self.rows = [row for row in read_rows(path) if self._is_ours(row)]

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row, so that it is there whatever happens next."""
        whole = {**self._setup, **row, "machine": self._machine}
        self.rows.append(whole)
        with self._path.open("a") as lines:
            lines.write(json.dumps(whole) + "\n")

    def keys(self, *fields: str) -> set[tuple[Any, ...]]:
        """The values of these fields that rows exist for."""
        return {tuple(row[field] for field in fields) for row in self.rows}

    def _is_ours(self, row: Row) -> bool:
        return {key: row.get(key) for key in self._setup} == self._setup


def describe_machines(rows: list[Row]) -> str:
    """Model, machine, versions and commits behind some rows, in a line for below a table."""
    about = rows[-1]["machine"]
    commits = dict.fromkeys(str(row["machine"]["git"]) for row in rows)
    return (
        f"{rows[-1]['model']}, {rows[-1]['dtype']}, {about['device']}, {about['cpu_capability']}, "
        f"{about['threads']} threads, torch {about['torch']}, "
        f"transformers {about['transformers']}, commit {', '.join(commits)}."
    )


def _end_last_line(path: Path) -> None:
    """A kill may have left half a line: the next one must not be glued to it."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as lines:
            lines.write("\n")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none if there is no file; what a kill left of a line is left out.

    Raises:
        ValueError: a line that is whole is no row; names the file and the line.
    """
    return [row for _, row in read_lines(path) if row is not None] if path.exists() else []


def read_lines(path: Path) -> Iterator[tuple[int, Row | None]]:
    """Number and row of each line of a file that is not blank; None is what a kill left of one.

    Raises:
        ValueError: see `read_rows`.
    """
    # Not splitlines: a line separator of Unicode inside an answer ends no line of the file.
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
