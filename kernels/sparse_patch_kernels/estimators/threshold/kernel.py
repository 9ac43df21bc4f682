"""The largest entries whose sum stays within a limit, without a sort.

Floats from 0 on are ordered as their bits are, so 31 halvings find the least number that the
entries above it do not pass the limit. A row is read once a halving, by one program; to sort it
would move it as often, with an index beside each entry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton.launch import launch
from ...triton.tiles import power_of_two

__all__ = ["largest_within"]

# Rows are thousands to a million entries: nothing to tune.
_CONFIGS = (triton.Config({}, num_warps=8, num_stages=2),)


def largest_within(mass: Tensor, limit: float) -> Tensor:
    """See `plain.largest_within`."""
    mass = mass.contiguous()
    rows, n = mass.shape
    least, room = (
        torch.empty(rows, dtype=dtype, device=mass.device) for dtype in (torch.float32, torch.int32)
    )
    arguments = {
        "mass": mass,
        "least": least,
        "room": room,
        "n": n,
        "limit": float(limit),
        "BLOCK": power_of_two(n, 16, 4096),
    }
    launch(_least_kept, (rows,), arguments, _CONFIGS, ())
    equal = mass == least[:, None]
    return (mass > least[:, None]) | (equal & (equal.cumsum(-1) <= room[:, None]))


@triton.jit
def _sum_above(mass, n, least, BLOCK: tl.constexpr):
    """Sum of the entries of a row that are above `least`."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        x = tl.load(mass + entry, mask=entry < n, other=0.0)
        total += tl.where(x > least, x, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _least_kept(mass, least, room, n, limit, BLOCK: tl.constexpr):
    """Of a row: the number above which all entries are kept, and how many that equal it."""
    row = tl.program_id(0)
    mass += row.to(tl.int64) * n
    low = 0
    high = 0x7F800000  # infinity, above which there is nothing
    while low < high:
        middle = (low + high) // 2
        if _sum_above(mass, n, tl.cast(middle, tl.float32, bitcast=True), BLOCK) <= limit:
            high = middle
        else:
            low = middle + 1
    number = tl.cast(low, tl.float32, bitcast=True)
    left = limit - _sum_above(mass, n, number, BLOCK)
    # Zeros add nothing: all of them are within the limit.
    fit = tl.where(number > 0, left / tl.where(number > 0, number, 1.0), n * 1.0)
    tl.store(least + row, number)
    tl.store(room + row, tl.minimum(tl.maximum(fit, 0.0), n * 1.0).to(tl.int32))
