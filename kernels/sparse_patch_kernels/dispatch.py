"""Dispatch of plain PyTorch functions to Triton kernels, or to compiled code on a CPU.

The faster function has the same name in a module beside the plain one, see `estimators`. Neither
that module nor Triton is imported until a tensor needs it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["KERNELS", "has_kernel", "has_native", "triton_installed", "uses_triton"]

F = TypeVar("F", bound=Callable[..., Any])

# Device types that Triton has kernels for; AMD cards call themselves "cuda" too.
GPUS = ("cuda", "xpu")
# Every function with a kernel, by name, with the kernel's module: scripts/gpu_check.py checks all.
KERNELS: dict[str, tuple[str, Callable[..., Any]]] = {}


@functools.lru_cache(None)
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def uses_triton(x: Tensor) -> bool:
    """Do estimators of this tensor run as Triton kernels?"""
    return x.device.type in GPUS and x.dtype != torch.float64 and triton_installed()


def has_kernel(plain: F) -> F:
    """Decorator: a plain PyTorch function with a kernel of the same name in `kernel.py` beside it.

    If the first tensor `uses_triton`, the kernel runs instead. It takes the same arguments and
    gives the same result up to rounding; for unsupported arguments it returns NotImplemented, and
    the plain function runs, which stays available as `.plain`.
    """
    module = _beside(plain, "kernel")
    # Looked up at every call, because scripts that check kernels replace it.
    either = _either(plain, module, lambda x: uses_triton(x))
    KERNELS[plain.__name__] = (module, either)
    return either


def has_native(plain: F) -> F:
    """Decorator: a plain PyTorch function with a compiled one of the same name in `native.py`.

    If the first tensor is on a CPU, the compiled one runs instead; otherwise as `has_kernel`, which
    is the outer decorator of a function with both.
    """
    return _either(plain, _beside(plain, "native"), lambda x: x.device.type == "cpu")


def _beside(plain: Callable[..., Any], name: str) -> str:
    return f"{plain.__module__.rpartition('.')[0]}.{name}"


def _either(plain: F, module: str, takes: Callable[[Tensor], bool]) -> F:
    @functools.wraps(plain)
    def either(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if takes(x):
            other = getattr(importlib.import_module(module), plain.__name__)
            result = other(x, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return plain(x, *args, **kwargs)

    either.plain = getattr(plain, "plain", plain)  # type: ignore[attr-defined]
    return cast(F, either)
