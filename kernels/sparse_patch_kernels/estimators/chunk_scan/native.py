"""Scans of chunks in C++."""

from __future__ import annotations

from ctypes import Structure, c_void_p
from typing import Any

import torch
from torch import Tensor

from ...cpu import selection


class _Scans(Structure):
    """As in selection.cpp."""

    _fields_ = (
        ("inputs", selection.Inputs),
        *((name, c_void_p) for name in ("best", "starts", "limit", "end")),
        *selection.fields("lists", "n_blocks", "n_rows", "n", "chunk", "kv_len"),
    )


def scan_chunks(
    queries: Tensor, k: Tensor, starts: Tensor, limit: Tensor, end: Tensor, chunk: int
) -> Any:
    """See `plain`."""
    heads, n_blocks, n_rows, dim = queries.shape
    queries, k, starts = queries.contiguous(), k.to(queries.dtype), starts.contiguous()
    inputs = selection.inputs(queries.view(heads, -1, dim), k)
    if inputs is None:
        return NotImplemented
    best = torch.empty(heads, *starts.shape[1:], dtype=torch.float32)
    call = _Scans(
        inputs,
        *(x.data_ptr() for x in (best, starts, limit, end)),
        *(len(starts), n_blocks, n_rows, starts.shape[2], chunk, k.shape[1]),
    )
    selection.run("scan", call)
    return best
