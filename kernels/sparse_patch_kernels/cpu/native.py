"""The compiled kernel of the CPU backend: the C function of `src/attention.cpp`, and its call."""

from __future__ import annotations

import ctypes
import functools
import math
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from ..plan import BlockPlan
from .building import build, load

__all__ = ["attend", "compiled", "products"]


class _Runs(Structure):
    """As in attention.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("start", "count")),
        *((name, c_int64) for name in ("lists", "counts", "listed", "width")),
    )


class _Call(Structure):
    """As in attention.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "out", "lse")),
        *(
            (f"{name}_{what}", c_int64)
            for name in ("q", "k", "v", "out")
            for what in ("head", "row")
        ),
        *((name, c_int64) for name in ("heads", "kv_heads", "q_len", "kv_len", "dim", "v_dim")),
        *((name, c_int64) for name in ("block", "n_blocks", "sink", "window", "units")),
        ("order", c_void_p),
        ("orders", c_int64),
        ("runs", POINTER(_Runs)),
        ("n_runs", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("threads", c_int32),
        ("bfloat16", c_int32),
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor] | None:
    """Same contract as `reference.block_sparse_attention`; None where the kernel is not to be had.

    Args:
        q, k, v: float32 or bfloat16, the last dimension contiguous.
        plan: without pooled runs.
        scale: one that is not positive is not for the kernel, whose largest product is the largest
            score.
    """
    kernel = _kernel()
    if kernel is None or scale <= 0:
        return None
    (heads, q_len, dim), (kv_heads, kv_len, v_dim) = q.shape, v.shape
    out = q.new_empty(q_len, heads, v_dim).transpose(0, 1)
    lse = torch.empty(heads, q_len, dtype=torch.float32, device=q.device)
    lists = [(run.start.contiguous(), run.count.contiguous(), run.width) for run in plan.runs]
    runs = (_Runs * len(lists))(
        *(
            _Runs(start.data_ptr(), count.data_ptr(), len(start), len(count), start.shape[2], width)
            for start, count, width in lists
        )
    )
    order = None if plan.key_order is None else plan.key_order.to(torch.int32).contiguous()
    shared = [n for start, count, _ in lists for n in (len(start), len(count))]
    # A unit is a set of neighbouring query heads with one list and one KV head.
    units = math.lcm(kv_heads, *shared, 1 if order is None else len(order))
    call = _Call(
        *(x.data_ptr() for x in (q, k, v, out, lse)),
        *(x.stride(i) for x in (q, k, v, out) for i in (0, 1)),
        *(heads, kv_heads, q_len, kv_len, dim, v_dim),
        *(plan.block_q, plan.n_q_blocks, plan.sink, plan.window, units),
        None if order is None else order.data_ptr(),
        0 if order is None else len(order),
        runs,
        len(lists),
        scale,
        softcap or 0.0,
        torch.get_num_threads(),
        q.dtype == torch.bfloat16,
    )
    if kernel(ctypes.byref(call)):
        raise MemoryError("block-sparse attention: no memory for a tile of keys")
    return out, lse


def products() -> str:
    """How the CPU backend multiplies bfloat16 here: "AMX tiles", "AVX512-BF16", "float32 vectors"
    or, without the compiled kernel, "PyTorch"."""
    library = _library()
    if library is None:
        return "PyTorch"
    library.sparse_patch_products.restype = ctypes.c_char_p
    return str(library.sparse_patch_products().decode())


@functools.lru_cache(None)
def _library() -> Any:
    return load("attention")


@functools.lru_cache(None)
def _kernel() -> Any:
    """The C function, compiled if need be; None where that is not possible or not wanted."""
    library = _library()
    if library is None:
        return None
    kernel = library.sparse_patch_attention
    kernel.argtypes, kernel.restype = [POINTER(_Call)], ctypes.c_int
    return kernel


@functools.lru_cache(None)
def compiled() -> str | None:
    """The name of the compiled kernel in use, which differs where the kernel would; or None."""
    return None if _kernel() is None else build("attention").name
