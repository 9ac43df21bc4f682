"""Means and sums of blocks, and products with means."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import has_kernel


@has_kernel
def pool_mean(x: Tensor, block: int, offset: int = 0) -> Tensor:
    """Mean of each block of rows, float32: `[heads, n, dim]` -> `[heads, blocks, dim]`.

    Row 0 is position `offset`; the grid starts at position 0, so the first block may be partial,
    and the last is averaged over the rows it has.
    """
    lead = min(-offset % block, x.shape[1])
    whole = (x.shape[1] - lead) // block
    end = lead + whole * block
    parts = (
        x[:, None, :lead],
        x[:, lead:end].reshape(x.shape[0], whole, block, x.shape[2]),
        x[:, None, end:],
    )
    return torch.cat([part.mean(2, dtype=torch.float32) for part in parts if part.numel()], 1)


def grouped_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Products of each query head with its KV head: float32 `[heads, m, n]`, times `scale`.

    Args:
        q: `[heads, m, dim]`.
        k: `[kv_heads, n, dim]`; query head h reads KV head `h // (heads // kv_heads)`.
    """
    kv_heads, n, dim = k.shape
    grouped = (q.float() * scale).reshape(kv_heads, -1, dim)
    return (grouped @ k.float().mT).view(q.shape[0], -1, n)


def pool_sum(x: Tensor, block: int) -> Tensor:
    """Sum of each block of the last axis: `[..., n]` -> `[..., ceil(n / block)]`."""
    pad = -x.shape[-1] % block
    if pad:  # even an empty pad would copy
        x = torch.nn.functional.pad(x, (0, pad))
    return x.reshape(*x.shape[:-1], -1, block).sum(-1)
