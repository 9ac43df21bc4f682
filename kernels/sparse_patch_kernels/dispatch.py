"""Which functions run as Triton kernels, or compiled on a CPU: plain ones give their work away.

Nothing here imports Triton until a tensor on a GPU asks for it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

# Device types that Triton has kernels for; AMD cards call themselves "cuda" too.
GPUS = ("cuda", "xpu")
# Every function that has a kernel, by name, with its module: scripts/gpu_check.py checks them all.
KERNELS: dict[str, tuple[str, Callable[..., Any]]] = {}


@functools.lru_cache(None)
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def uses_triton(x: Tensor) -> bool:
    """Do estimators of this tensor run as Triton kernels?"""
    return x.device.type in GPUS and x.dtype != torch.float64 and triton_installed()


def has_kernel(module: str) -> Callable[[F], F]:
    """Mark a plain PyTorch function that `triton/<module>.py` has under the same name.

    Called with a first tensor that `uses_triton`, the kernel runs instead. It takes the same
    arguments and gives the same result up to rounding; for arguments that it cannot take it
    returns NotImplemented, and the plain function runs. That one stays at hand as `.plain`.
    """

    def wrap(plain: F) -> F:
        @functools.wraps(plain)
        def either(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if uses_triton(x):
                kernels = importlib.import_module(f".triton.{module}", __package__)
                result = getattr(kernels, plain.__name__)(x, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            return plain(x, *args, **kwargs)

        either.plain = getattr(plain, "plain", plain)  # type: ignore[attr-defined]
        KERNELS[plain.__name__] = (module, either)
        return cast(F, either)

    return wrap


def has_native(plain: F) -> F:
    """Mark a plain PyTorch function that `cpu/selection.py` has, compiled, under the same name.

    Called with a first tensor on a CPU, that one runs instead; the rest is as for `has_kernel`,
    which goes on top where a function has both.
    """

    @functools.wraps(plain)
    def either(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.device.type == "cpu":
            native = importlib.import_module(".cpu.selection", __package__)
            result = getattr(native, plain.__name__)(x, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return plain(x, *args, **kwargs)

    either.plain = plain  # type: ignore[attr-defined]
    return cast(F, either)
