"""Times of several calls, taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpu_checks.device import Device


@dataclass(frozen=True)
class Timing:
    """Milliseconds on the device: median and range; and of the host, until a call came back."""

    ms: float
    low: float
    high: float
    host_ms: float
    rounds: int


def interleaved(
    device: Device, calls: Mapping[str, Callable[[], Any]], *, most: int, seconds: float
) -> dict[str, Timing]:
    """Time calls round by round, each round in another order, after one call each to warm up.

    Where the host gets back only when the device is done, its time shows that.

    Args:
        most: rounds; at least 3 (or `most`), and no more than take `seconds`.
    """
    for call in calls.values():
        call()
    device.synchronize()
    names = list(calls)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    start, done, rounds = time.perf_counter(), 0, most
    while done < rounds:
        turn = done % len(names)
        marks = {}
        for name in names[turn:] + names[:turn]:
            device.flush()
            begin, host = device.mark(), time.perf_counter()
            calls[name]()
            host = time.perf_counter() - host
            marks[name] = (begin, device.mark(), host * 1e3)
        device.synchronize()
        for name, (begin, end, host) in marks.items():
            taken[name].append((device.milliseconds(begin, end), host))
        done += 1
        fit = int(seconds * done / (time.perf_counter() - start))
        rounds = max(min(3, most), min(most, fit))
    return {name: _timing(times) for name, times in taken.items()}


def _timing(times: list[tuple[float, float]]) -> Timing:
    ms = [time for time, _ in times]
    host = statistics.median(host for _, host in times)
    return Timing(statistics.median(ms), min(ms), max(ms), host, len(times))
