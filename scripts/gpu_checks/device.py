"""The GPU, or in a dry run the CPU: all that differs between them is in this file."""

from __future__ import annotations

import contextlib
import gc
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# More than any cache holds. To write them takes an H100 about 0.4 ms, by which the host gets ahead
# of it: launching takes no time of what comes then, as inside a model.
_FLUSH_BYTES = 1 << 30


class Device:
    """Where tensors lie, how time passes there, and what it is called.

    Attributes:
        on_gpu: is it the current CUDA (or ROCm) device; else the CPU stands in for it.
        torch: the device of tensors.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.torch = torch.device("cuda" if on_gpu else "cpu")

    def describe(self) -> dict[str, Any]:
        """Name, memory and versions: JSON-ready."""
        if not self.on_gpu:
            return {"name": f"dry run on {platform.machine()}"}
        about = torch.cuda.get_device_properties(self.torch)
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm"]
        try:
            smi = subprocess.run(
                [*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
            ).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            smi = ""
        return {
            "name": about.name,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "multiprocessors": about.multi_processor_count,
            "capability": f"{about.major}.{about.minor}",
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "driver_power_clock": smi or None,
        }

    def synchronize(self) -> None:
        """Wait for all that was launched; raises what went wrong in it."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """A point in time between two launches, for `milliseconds`."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Time between two marks; call `synchronize` first."""
        return float(start.elapsed_time(end) if self.on_gpu else (end - start) * 1e3)

    @cached_property
    def _flushed(self) -> Tensor:
        size = _FLUSH_BYTES if self.on_gpu else 1
        return torch.empty(size, dtype=torch.uint8, device=self.torch)

    def flush(self) -> None:
        """Put what the caches hold out of them, and let the host get ahead."""
        self._flushed.zero_()

    def forget_peak(self) -> None:
        """Give cached memory back and count peaks from here."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Most memory that tensors had since `forget_peak`; on the CPU, the process ever."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` compiled for one shape; on the CPU, where that would take too long, itself."""
        if not self.on_gpu:
            return function
        torch.compiler.reset()  # after eight shapes of one function it would give up
        compiled: Callable[..., Any] = torch.compile(function, dynamic=False, fullgraph=True)
        return compiled

    @contextlib.contextmanager
    def sdpa(self, name: str) -> Iterator[None]:
        """Let SDPA use one implementation, "flash" or "cudnn", and no other."""
        wanted = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[name]
        with sdpa_kernel(wanted if self.on_gpu else SDPBackend.MATH):
            yield

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.torch).manual_seed(seed)

    def randn(self, *shape: int, seed: int) -> Tensor:
        """float32, standard normal."""
        return torch.randn(*shape, device=self.torch, generator=self.generator(seed))
