"""A stage: items of work whose results are written as they come, and whose failures stay theirs."""

from __future__ import annotations

import faulthandler
import json
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from sparse_patch_eval.base.rows import Row, read_rows

from gpu_checks.device import Device
from gpu_checks.scale import Scale

# Seconds that must be left to begin an item, and that it may take. One that takes longer hangs: its
# process ends, and another goes on after it.
SHORTEST, LONGEST = 5.0, 75.0
# So many times that in a dry run, on a machine that may have other work as well.
INTERPRETED = 5

# Stages that time nothing: they may run in several processes.
COMPARING = ("parity", "methods")

Work = Callable[[], Iterable[Row]]


class OutOfTime(Exception):
    """What was asked for does not fit the time left."""


class Lacking(Exception):
    """A package here is too old for what was asked for."""


class DeviceLost(Exception):
    """After an error in a kernel, no other runs in this process."""


class Stage:
    """What a stage's code is given.

    Every row goes to a file of JSON lines at once. Rows "begin" and "end" enclose those of an item,
    so that it shows where a process died, and the next one goes on after that.

    Attributes:
        name: the stage, with the part of it that this process does.
        device: where to work.
        scale: at which sizes.
    """

    def __init__(
        self, name: str, path: Path, deadline: float, device: Device, scale: Scale, quiet: bool
    ) -> None:
        """deadline: in the time of `time.time`. quiet: print failures only."""
        self.name, self.device, self.scale = name, device, scale
        self._path, self._deadline, self._quiet = path, deadline, quiet
        self._begun = {
            row["item"] for row in read_rows(path) if (row["stage"], row["kind"]) == (name, "begin")
        }

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.time()

    def need(self, seconds: float) -> None:
        """Raise OutOfTime if fewer are left."""
        if self.seconds_left < seconds:
            raise OutOfTime(f"needs {seconds:.0f} s, {max(0, self.seconds_left):.0f} s are left")

    def add(self, kind: str, **row: Any) -> None:
        """Write a row; one `write` a line, since several processes add to the file."""
        line = json.dumps({"stage": self.name, "kind": kind, **row})
        with self._path.open("a") as lines:
            lines.write(line + "\n")

    def run(self, item: str, work: Work) -> None:
        """Do an item and write its rows, each with a "kind".

        An exception becomes a row "error", lack of time, memory or a package a row "skipped"; an
        item that a process before this one began is not done again.

        Raises:
            DeviceLost: the GPU does not answer any more.
        """
        if item in self._begun:
            return
        start = time.time()
        self.add("begin", item=item)
        # A thread without Python ends the process, wherever that waits.
        longest = LONGEST if self.scale.on_gpu else INTERPRETED * LONGEST
        faulthandler.dump_traceback_later(longest, exit=True, file=2)
        try:
            self.need(SHORTEST)
            for row in work():
                self.add(item=item, **row)
            said = "done"
        except (OutOfTime, Lacking, torch.OutOfMemoryError) as reason:
            said = f"skipped: {reason}"
            self.add("skipped", item=item, reason=str(reason))
        except Exception as error:
            said = f"failed: {type(error).__name__}: {error}"
            self.add("error", item=item, error=said, traceback=traceback.format_exc())
        finally:
            faulthandler.cancel_dump_traceback_later()
        seconds = time.time() - start
        self.add("end", item=item, seconds=round(seconds, 3))
        if not self._quiet or said.startswith("failed"):
            print(f"[{self.name}] {item}: {said} ({seconds:.1f} s)", flush=True)
        if said != "done":
            self._recover(item)

    def _recover(self, item: str) -> None:
        """Can the next item run, and has it the memory of this one?"""
        try:
            self.device.synchronize()
            self.device.forget_peak()
        except Exception as error:
            raise DeviceLost(f"{self.name}: the device is lost after {item}: {error}") from error
