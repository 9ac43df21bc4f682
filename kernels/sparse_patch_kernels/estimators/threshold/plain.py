"""The largest entries whose sum stays within a limit."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import has_kernel


@has_kernel
def largest_within(mass: Tensor, limit: float) -> Tensor:
    """The largest entries of each row while their running sum is at most `limit`.

    The entry that crosses the limit stays out; of equals the first comes first.

    Args:
        mass: float32 `[rows, n]`, none below 0.

    Returns:
        bool `[rows, n]`.
    """
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    kept = ordered.cumsum(-1) <= limit
    return torch.zeros_like(kept).scatter_(-1, order, kept)
