"""Index lists of what a mask marks, in C++."""

from __future__ import annotations

from ctypes import Structure, c_int32, c_void_p
from typing import Any

import torch
from torch import Tensor

from ...cpu import selection


class _Compact(Structure):
    """As in lists.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("mask", "index")),
        *selection.fields("rows", "n", "longest"),
        ("threads", c_int32),
    )


def compact(mask: Tensor) -> Any:
    """See `plain`."""
    if not mask.numel() or not selection.has("lists"):
        return NotImplemented
    mask = mask.contiguous()
    count = mask.sum(-1, dtype=torch.int32)
    longest = max(1, int(count.max()))
    index = torch.empty(*count.shape, longest, dtype=torch.int32)
    call = _Compact(
        *(x.data_ptr() for x in (mask, index)),
        *(count.numel(), mask.shape[-1], longest, torch.get_num_threads()),
    )
    selection.run("compact", call, "lists")
    return index, count
