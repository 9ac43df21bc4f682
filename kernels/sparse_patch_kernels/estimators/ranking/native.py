"""Rankings in C++."""

from __future__ import annotations

from ctypes import Structure, c_int32, c_void_p
from typing import Any

import torch
from torch import Tensor

from ...cpu import selection


class _Rank(Structure):
    """As in lists.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("scores", "allowed", "forced", "order")),
        *selection.fields("allowed_list", "forced_list", "lists", "rows", "n"),
        ("threads", c_int32),
    )


class _RankAndTest(Structure):
    """As in lists.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("mass", "block", "sample", "allowed", "forced")),
        *((name, c_void_p) for name in ("scores", "squares")),
        *selection.fields("heads", "rows", "m", "blocks", "n"),
        *((name, c_int32) for name in ("squared", "threads")),
    )


def rank(scores: Tensor, allowed: Tensor, forced: Tensor) -> Any:
    """See `plain`."""
    if scores.dtype != torch.float32 or not scores.numel() or not selection.has("lists"):
        return NotImplemented
    lists, rows, n = scores.shape
    scores = scores.contiguous()
    allowed, forced = (x.expand(*x.shape[:-2], rows, n).contiguous() for x in (allowed, forced))
    order = torch.empty(scores.shape, dtype=torch.int32)
    call = _Rank(
        *(x.data_ptr() for x in (scores, allowed, forced, order)),
        *(rows * n if x.ndim == 3 and len(x) > 1 else 0 for x in (allowed, forced)),
        *(lists, rows, n, torch.get_num_threads()),
    )
    selection.run("rank", call, "lists")
    return order


def rank_and_test(
    mass: Tensor, block: Tensor, sample: Tensor, allowed: Tensor, forced: Tensor, *, reduce: str
) -> Any:
    """See `plain`."""
    (heads, rows, m), (blocks, n) = mass.shape, allowed.shape
    if mass.dtype != torch.float32 or m > n or not selection.has("lists"):
        return NotImplemented
    inputs = [x.contiguous() for x in (mass, block, sample, allowed, forced)]
    scores, squares = torch.empty(heads, blocks, n), torch.empty(heads, n)
    call = _RankAndTest(
        *(x.data_ptr() for x in (*inputs, scores, squares)),
        *(heads, rows, m, blocks, n, reduce == "rms", torch.get_num_threads()),
    )
    selection.run("rank_and_test", call, "lists")
    return scores, squares
