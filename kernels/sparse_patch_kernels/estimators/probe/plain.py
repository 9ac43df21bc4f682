"""Attention of a few queries to each key, each distance and each block."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...dispatch import has_kernel
from ..pooling import pool_sum
from ..token_scores import pooled_rows


@has_kernel
def probe_lines(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of a few last queries, summed along its vertical and its slash lines.

    Args:
        q: `[heads, n_probe, dim]`, the last rows of the sequence.
        k: `[kv_heads, kv_len, dim]`.

    Returns:
        vertical `[heads, kv_len]`: mean probability of each key.
        slash `[heads, kv_len]`: mean probability at each distance; entry `kv_len - 1 - d` is
        distance d. Both sum to 1 per head. Float32.
    """
    heads, n_probe, dim = q.shape
    kv_heads, kv_len, _ = k.shape
    grouped = (q.float() * scale).view(kv_heads, -1, n_probe, dim)
    vertical, slash = (torch.empty(heads, kv_len, device=q.device) for _ in range(2))
    # One head at a time, in the same memory: allocating costs more than computing.
    logits, softmax = (torch.empty(n_probe, kv_len, device=q.device) for _ in range(2))
    # With zeros to the left of each row, row i of the view below is row i shifted right by n_probe
    # - 1 - i, which aligns equal distances in columns.
    width = kv_len + n_probe - 1
    padded = torch.zeros(n_probe, width, device=q.device)
    probs = padded[:, n_probe - 1 :]
    by_distance = padded.as_strided((n_probe, kv_len), (width + 1, 1))
    corner = torch.ones(n_probe, n_probe, dtype=torch.bool, device=q.device).triu(1)
    mean = torch.full((1, n_probe), 1 / n_probe, device=q.device)
    for head in range(heads):
        kv_head, member = divmod(head, heads // kv_heads)
        if member == 0:
            keys = k[kv_head].float().T
        torch.mm(grouped[kv_head, member], keys, out=logits)
        logits[:, kv_len - n_probe :].masked_fill_(corner, float("-inf"))
        probs.copy_(torch.softmax(logits, -1, out=softmax))
        torch.mm(mean, probs, out=vertical[head, None])
        torch.mm(mean, by_distance, out=slash[head, None])
    return vertical, slash


@has_kernel
def key_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Mean attention of a few queries to each key, without a mask: float32 `[heads, kv_len]`.

    Args:
        q: `[heads, n, dim]`.
        k: `[kv_heads, kv_len, dim]`.
    """
    heads, n, dim = q.shape
    kv_heads, kv_len, _ = k.shape
    grouped = (q.float() * scale).view(kv_heads, -1, n, dim)
    result = torch.empty(heads, kv_len, device=q.device)
    logits, probs = (torch.empty(n, kv_len, device=q.device) for _ in range(2))
    mean = torch.full((1, n), 1 / n, device=q.device)
    for head in range(heads):
        kv_head, member = divmod(head, heads // kv_heads)
        if member == 0:
            keys = k[kv_head].float().T
        torch.mm(grouped[kv_head, member], keys, out=logits)
        torch.softmax(logits, -1, out=probs)
        torch.mm(mean, probs, out=result[head, None])
    return result


def probe_mass(q: Tensor, k: Tensor, scale: float, block: int) -> Tensor:
    """True attention mass of each key block, seen by a few last queries, mean over them.

    Args:
        q: `[heads, n_probe, dim]`, the last rows of the sequence.
        k: `[kv_heads, kv_len, dim]`.

    Returns:
        float32 `[heads, blocks]`, summing to 1 per head.
    """
    if dispatch.uses_triton(q):
        return pool_sum(probe_lines(q, k, scale)[0], block)
    rows = torch.arange(q.shape[1], device=q.device)
    seen = rows + k.shape[1] - q.shape[1] + 1
    return pooled_rows(q, k, scale, rows, seen, width=block).mean(1)
