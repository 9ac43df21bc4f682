"""Which functions run as Triton kernels, or compiled on a CPU: plain ones give their work away.

What runs instead lies in a module beside the plain function, under the same name, see `estimators`.
Nothing here imports it, or Triton, until a tensor asks for it.
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
# Every function that has a kernel, by name, with the module of that: scripts/gpu_check.py checks
# them all.
KERNELS: dict[str, tuple[str, Callable[..., Any]]] = {}


@functools.lru_cache(None)
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def uses_triton(x: Tensor) -> bool:
    """Do estimators of this tensor run as Triton kernels?"""
    return x.device.type in GPUS and x.dtype != torch.float64 and triton_installed()


def has_kernel(plain: F) -> F:
    """Mark a plain PyTorch function that `kernel.py` beside it has under the same name.

    Called with a first tensor that `uses_triton`, the kernel runs instead. It takes the same
    arguments and gives the same result up to rounding; for arguments that it cannot take it
    returns NotImplemented, and the plain function runs. That one stays at hand as `.plain`.
    """
    module = _beside(plain, "kernel")
    # Looked up at every call: the scripts that check kernels put another in its place.
    either = _either(plain, module, lambda x: uses_triton(x))
    KERNELS[plain.__name__] = (module, either)
    return either


def has_native(plain: F) -> F:
    """Mark a plain PyTorch function that `native.py` beside it has, compiled, under the same name.

    Called with a first tensor on a CPU, that one runs instead; the rest is as for `has_kernel`,
    which goes on top where a function has both.
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
