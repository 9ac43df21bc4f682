"""What bindings of `src/selection.cpp` and `src/lists.cpp` share: C++ for what costs most when
methods choose.

Bindings lie beside the plain functions that give their work away to them, see `estimators`. Each
has the arguments and the result, up to rounding, of the plain one, and NotImplemented for what it
cannot take. bfloat16 is multiplied as such where the CPU can, and added in float32.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import Structure, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from .building import DTYPES, load


def fields(*names: str) -> list[tuple[str, Any]]:
    """Fields of a structure that are int64."""
    return [(name, c_int64) for name in names]


class Inputs(Structure):
    """As in selection.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k")),
        *fields("q_head", "q_row", "k_head", "k_row", "heads", "kv_heads", "dim"),
        *((name, c_int32) for name in ("threads", "bfloat16")),
    )


def inputs(q: Tensor, k: Tensor) -> Inputs | None:
    """q `[heads, n, dim]` and k `[kv_heads, m, dim]` for C++; None for what it cannot take."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or not has("selection"):
        return None
    if not 0 < q.numel() or not 0 < k.numel() or q.stride(2) != 1 or k.stride(2) != 1:
        return None
    if k.dtype == torch.bfloat16 and q.shape[2] % 2:
        return None
    return Inputs(
        *(x.data_ptr() for x in (q, k)),
        *(x.stride(i) for x in (q, k) for i in (0, 1)),
        *(len(q), len(k), q.shape[2]),
        torch.get_num_threads(),
        k.dtype == torch.bfloat16,
    )


def has(source: str) -> bool:
    """Are the functions of `src/<source>.cpp` to be had?"""
    return _library(source) is not None


@functools.lru_cache(None)
def _library(source: str) -> Any:
    """The C functions; None where they cannot be had or are not wanted."""
    return load(source)


def run(name: str, call: Structure, source: str = "selection") -> None:
    if getattr(_library(source), f"sparse_patch_{name}")(ctypes.byref(call)):
        raise MemoryError(f"{name}: no memory for a tile of scores")
