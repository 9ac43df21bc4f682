"""The most memory a computation had: of the process on a CPU, of tensors on a GPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_is_known(device: torch.device) -> bool:
    """On GPUs, and on Linux with glibc."""
    return device.type == "cuda" or (_CLEAR.exists() and hasattr(ctypes.CDLL(None), "malloc_trim"))


def with_peak(work: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What `work()` returns, and the most bytes there were while it ran; None where unknown.

    On a CPU that is the resident memory of the whole process, on a GPU what tensors held.
    """
    if not peak_is_known(device):
        return work(), None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return work(), torch.cuda.max_memory_allocated(device)
    # What was freed before would be used again and not seen: give it back.
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")  # the peak starts anew from here
    return work(), _status("VmHWM")


def resident_bytes() -> int:
    """Resident memory of this process; Linux only."""
    return _status("VmRSS")


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
