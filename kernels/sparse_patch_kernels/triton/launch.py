"""The one door through which every kernel is launched.

A launcher names a kernel, its arguments and the configurations worth trying; what becomes of that
depends on where we are:

* on a GPU, `triton.autotune` measures the configurations once per shape class and keeps the best;
* under `TRITON_INTERPRET=1`, the first configuration runs in Triton's interpreter, on CPU tensors;
* inside `recording()`, nothing runs and the call is noted. `scripts/compile_kernels.py` compiles
  what it finds there, so what is checked ahead of time is what would be launched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

__all__ = ["INTERPRETED", "Chip", "Launch", "chip_of", "forcing", "launch", "recording", "watching"]

# Read where the kernels are decorated: Triton decides there too, once per process.
INTERPRETED: bool = knobs.runtime.interpret

_recorders: list[tuple[list[Launch], Chip]] = []
_watchers: list[dict[ShapeClass, triton.Config]] = []
_forced: list[int] = []


@dataclass(frozen=True)
class Chip:
    """What configurations depend on.

    Attributes:
        backend: Triton's name for the maker's compiler, "cuda" or "hip".
        shared_bytes: shared memory (LDS) that a program may have.
        arch: compute capability as in sm_90; 0 on AMD.
    """

    backend: str
    shared_bytes: int
    arch: int = 0


# Stands in where there is no GPU: H100, CUDA C++ Programming Guide, compute capability 9.0.
HOPPER = Chip("cuda", 227 * 1024, 90)


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for.

    Attributes:
        kernel: the function under `@triton.jit`.
        grid: programs along each axis.
        arguments: by name, constants included.
        configs: what would be tried; the first is the default.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    configs: tuple[triton.Config, ...]


@dataclass(frozen=True)
class ShapeClass:
    """Launches that share a configuration.

    Attributes:
        kernel: the kernel's name.
        values: the arguments it was tuned on, by name, as text.
    """

    kernel: str
    values: tuple[tuple[str, str], ...]


@contextlib.contextmanager
def recording(chip: Chip = HOPPER) -> Iterator[list[Launch]]:
    """Launch nothing; collect the launches as they would be on `chip`.

    Tensors may be on the meta device.
    """
    launches: list[Launch] = []
    _recorders.append((launches, chip))
    try:
        yield launches
    finally:
        _recorders.pop()


@contextlib.contextmanager
def watching() -> Iterator[dict[ShapeClass, triton.Config]]:
    """Collect the configuration that each shape class launched meanwhile runs with."""
    chosen: dict[ShapeClass, triton.Config] = {}
    _watchers.append(chosen)
    try:
        yield chosen
    finally:
        _watchers.pop()


@contextlib.contextmanager
def forcing(index: int) -> Iterator[None]:
    """Launch with the configuration of that index, the last where there are fewer; tune nothing.

    For checks of each configuration by itself.
    """
    _forced.append(index)
    try:
        yield
    finally:
        _forced.pop()


def chip_of(x: Tensor) -> Chip:
    """The chip that a launch with this tensor runs on, or is recorded for."""
    if _recorders:
        return _recorders[-1][1]
    return HOPPER if INTERPRETED else _chip(x.device)


@lru_cache(None)
def _chip(device: torch.device) -> Chip:
    target = triton.runtime.driver.active.get_current_target()
    index = (
        torch.get_device_module(device).current_device() if device.index is None else device.index
    )
    shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return Chip(target.backend, shared, target.arch if target.backend == "cuda" else 0)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    configs: Sequence[triton.Config],
    tune_on: Sequence[str],
) -> None:
    """Launch a kernel on the device of its tensors.

    Args:
        kernel: the function under `@triton.jit`.
        grid: programs along each axis; must not depend on the configuration.
        arguments: by name, constants included, those of the configurations left out.
        configs: configurations to try, the default first. No other is ever used.
        tune_on: arguments whose values make a shape class: a new class is measured anew. Lengths
            do not belong here.
    """
    if _recorders:
        _recorders[-1][0].append(Launch(kernel, grid, dict(arguments), tuple(configs)))
        return
    if _forced:
        configs = [configs[min(_forced[-1], len(configs) - 1)]]
    config = _run(kernel, grid, arguments, configs, tune_on)
    if _watchers:
        values = tuple((name, str(arguments[name])) for name in tune_on)
        _watchers[-1][ShapeClass(kernel.fn.__name__, values)] = config


def _run(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    configs: Sequence[triton.Config],
    tune_on: Sequence[str],
) -> triton.Config:
    """Launch, and say with which configuration."""
    if INTERPRETED:
        kernel[grid](**arguments, **_flat(configs[0]))
        return configs[0]
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    # Triton launches on the current device, whichever holds the tensors.
    with torch.get_device_module(device).device(device):
        if len(configs) == 1:
            kernel[grid](**arguments, **_flat(configs[0]))
            return configs[0]
        tuner = _tuned(kernel, tuple(configs), tuple(tune_on))
        tuner[grid](**arguments)
        return tuner.best_config


def _flat(config: triton.Config) -> dict[str, Any]:
    return dict(config.kwargs) if INTERPRETED else config.all_kwargs()


@lru_cache(None)
def _tuned(kernel: Any, configs: tuple[triton.Config, ...], tune_on: tuple[str, ...]) -> Any:
    return triton.autotune(list(configs), list(tune_on), cache_results=True)(kernel)
