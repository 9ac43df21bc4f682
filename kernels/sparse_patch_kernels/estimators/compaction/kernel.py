"""Index lists of what a mask marks, without a sort and without waiting for a count."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton.launch import launch

__all__ = ["compact"]

# A row of a mask is some hundred to some thousand entries, 4 bytes each to write: nothing to tune.
_CONFIGS = (triton.Config({}, num_warps=4, num_stages=1),)


def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """See `plain.compact`. The list is as wide as the mask, and padded with 0."""
    lists, rows, n = mask.shape
    index = torch.empty(mask.shape, dtype=torch.int32, device=mask.device)
    count = torch.empty(lists, rows, dtype=torch.int32, device=mask.device)
    arguments = {
        "mask": mask.view(torch.uint8),
        "index": index,
        "count": count,
        "stride_list": mask.stride(0),
        "stride_row": mask.stride(1),
        "stride_entry": mask.stride(2),
        "n": n,
        "BLOCK": min(1024, triton.next_power_of_2(n)),
    }
    launch(_compact, (rows, lists), arguments, _CONFIGS, ())
    return index, count


@triton.jit
def _compact(mask, index, count, stride_list, stride_row, stride_entry, n, BLOCK: tl.constexpr):
    """One program per row and list: each marked entry goes to the slot that its rank names."""
    row = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1).to(tl.int64)
    at = which * tl.num_programs(0) + row
    mask += which * stride_list + row * stride_row
    index += at * n
    entries = tl.arange(0, BLOCK)
    kept = 0
    for first in range(0, n, BLOCK):
        entry = first + entries
        marked = tl.load(mask + entry * stride_entry, mask=entry < n, other=0).to(tl.int32)
        tl.store(index + kept + tl.cumsum(marked, 0) - 1, entry, mask=marked != 0)
        kept += tl.sum(marked)
    tl.store(count + at, kept)
    # No slot is written twice: the marked entries have filled those before `kept`.
    for first in range(0, n, BLOCK):
        slot = first + entries
        tl.store(index + slot, tl.zeros_like(slot), mask=(slot >= kept) & (slot < n))
