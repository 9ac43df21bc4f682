"""Rows of attention, pooled, in C++."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_void_p
from typing import Any

import torch
from torch import Tensor

from ...cpu import selection

# Keys of a block lie in a thread's cache until the block's largest logit is known.
_WIDEST = 1024


class _Masses(Structure):
    """As in selection.cpp."""

    _fields_ = (
        ("inputs", selection.Inputs),
        *((name, c_void_p) for name in ("out", "rows", "seen")),
        *selection.fields("n_rows", "width", "blocks"),
        ("scale", c_float),
        ("largest", c_int32),
    )


def pooled_rows(
    q: Tensor,
    k: Tensor,
    scale: float,
    rows: Tensor,
    seen: Tensor,
    *,
    width: int,
    largest: bool = False,
) -> Any:
    """See `plain`."""
    inputs = selection.inputs(q, k)
    if inputs is None or scale <= 0 or width > _WIDEST:
        return NotImplemented
    rows, seen = rows.contiguous(), seen.contiguous()
    blocks = -(-int(seen.max()) // width)
    out = torch.empty(len(q), len(rows), blocks, dtype=torch.float32)
    pointers = (x.data_ptr() for x in (out, rows, seen))
    selection.run("masses", _Masses(inputs, *pointers, len(rows), width, blocks, scale, largest))
    return out
