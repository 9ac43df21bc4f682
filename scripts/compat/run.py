"""Families in a process of their own that may hang or die, and the rows that come of them."""

from __future__ import annotations

import faulthandler
import json
import subprocess
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from sparse_patch_eval.base.fetch import staged
from sparse_patch_eval.base.rows import Row, RowFile, read_rows

from compat.compare import WRONG, check
from compat.table import verdict


def open_rows(path: Path) -> RowFile:
    """The rows that were made with the versions of here."""
    return RowFile(path, {name: version(name) for name in ("torch", "transformers")})


def forget(path: Path, families: Iterable[str]) -> None:
    """Take all rows of these families out of a file of rows."""
    gone = set(families)
    kept = [row for row in read_rows(path) if row["family"] not in gone]
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as new:
        new.write_text("".join(json.dumps(row) + "\n" for row in kept))


def run(families: list[str], path: Path, command: list[str]) -> None:
    """Let processes check families until each has a row.

    A process ends early where a family takes it along; the next goes on after that one, of which
    the row says how it ended.

    Args:
        path: of the rows.
        command: starts a process that calls `work` for the families that it is given, joined by
            commas, as its last argument.
    """
    while todo := [x for x in families if (x,) not in open_rows(path).keys("family")]:
        ended = subprocess.run([*command, ",".join(todo)], stderr=subprocess.PIPE, text=True)
        rows = open_rows(path)
        done = rows.keys("family")
        if lost := next((x for x in todo if (x,) not in done), None):
            said = " ".join(ended.stderr.split())[-300:]
            wrong = [f"its process: ended with code {ended.returncode}: {said}"]
            row: Row = {"family": lost, "status": WRONG, "wrong": wrong}
            rows.add(row)
            _say(row)


def work(families: Iterable[str], path: Path, seconds: float) -> None:
    """Check families one after the other; one that takes longer than so many seconds ends this
    process, and says where it was on stderr."""
    torch.set_num_threads(1)  # so that an answer is the same, bit for bit, when asked again
    rows = open_rows(path)
    for family in families:
        # A thread without Python ends the process, wherever that waits.
        faulthandler.dump_traceback_later(seconds, exit=True)
        started = time.time()
        row = check(family)
        faulthandler.cancel_dump_traceback_later()
        row["seconds"] = round(time.time() - started, 1)
        rows.add(row)
        _say(row)


def _say(row: Row) -> None:
    print(f"{row['family']}: {verdict(row)}", flush=True)
