"""Processes side by side until a deadline, whatever becomes of each."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Exit code of a process that a failed kernel took the GPU from.
LOST = 3
RESTARTS = 4
# How often it is said that a stage goes on.
REPORT_SECONDS = 15.0


@dataclass
class Process:
    """A process, and how it went.

    Attributes:
        command: what to run.
        log: where its stderr goes.
        starts: how often it was started.
        code: its last exit code; None if it was stopped.
    """

    command: list[str]
    log: Path
    starts: int = 0
    code: int | None = None
    _running: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        return self._running is not None

    def start(self) -> None:
        self.starts += 1
        with self.log.open("ab") as log:
            self._running = subprocess.Popen(self.command, stderr=log, start_new_session=True)

    def look(self) -> None:
        """Note its end, and where that is not a good one start the next, which goes on after it."""
        if self._running is None or self._running.poll() is None:
            return
        self.code, self._running = self._running.returncode, None
        if self.code != 0 and self.starts <= RESTARTS:
            self.start()

    def stop(self) -> None:
        """Kill it, with the processes that it started."""
        if self._running is not None:
            os.killpg(self._running.pid, signal.SIGKILL)
            self._running.wait()
            self.code, self._running = None, None

    def error(self) -> str | None:
        """How it ended and what it last said; None if it ended well."""
        if self.code == 0:
            return None
        how = "was stopped, out of time," if self.code is None else f"ended with code {self.code}"
        said = self.log.read_text(errors="replace")[-3000:].strip()
        return f"the process {how} at start {self.starts}; it said: {said}"


def watch(processes: list[Process], deadline: float, report: Callable[[], None]) -> None:
    """Start processes, and wait until all have ended or the deadline (`time.time`) stops them.

    `report` is called now and then.
    """
    told = time.time()
    try:
        for one in processes:
            one.start()
        while any(one.runs for one in processes) and time.time() < deadline:
            if time.time() > told + REPORT_SECONDS:
                told = time.time()
                report()
            for one in processes:
                one.look()
            time.sleep(0.05)
    finally:
        for one in processes:
            one.stop()
