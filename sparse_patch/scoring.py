"""What block-selecting methods share. Blocks are counted on one grid from position 0.

Shapes: q `[heads, q_len, dim]`, k `[kv_heads, kv_len, dim]`, block masks
`[heads, q_blocks, k_blocks]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Largest matrix of probabilities a probe holds at a time, in elements (128 MiB in float32).
PROBE_ELEMENTS = 1 << 25


def pool_mean(x: Tensor, block: int, offset: int = 0) -> Tensor:
    """Mean of each block of rows, float32: `[heads, n, dim]` -> `[heads, blocks, dim]`.

    Row 0 is position `offset`; the grid starts at position 0, so the first block may be partial,
    and the last is averaged over the rows it has.
    """
    n = x.shape[1]
    block_of = (torch.arange(n, device=x.device) + offset) // block - offset // block
    blocks = int(block_of[-1]) + 1
    sums = x.new_zeros(x.shape[0], blocks, x.shape[2], dtype=torch.float32)
    sums.index_add_(1, block_of, x.float())
    return sums / block_of.bincount(minlength=blocks)[:, None]


def pool_sum(x: Tensor, block: int) -> Tensor:
    """Sum of each block of the last axis: `[..., n]` -> `[..., ceil(n / block)]`."""
    pad = -x.shape[-1] % block
    padded = torch.nn.functional.pad(x, (0, pad))
    return padded.reshape(*x.shape[:-1], -1, block).sum(-1)


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
    heads, n_probe, _ = q.shape
    kv_heads, kv_len, _ = k.shape
    group = heads // kv_heads
    step = max(1, PROBE_ELEMENTS // (group * n_probe * kv_len))
    parts = [
        _probe_lines_of(q[h * group : (h + step) * group], k[h : h + step], scale)
        for h in range(0, kv_heads, step)
    ]
    vertical, slash = zip(*parts, strict=True)
    return torch.cat(vertical), torch.cat(slash)


def _probe_lines_of(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    heads, n_probe, dim = q.shape
    kv_heads, kv_len, _ = k.shape
    grouped = (q.float() * scale).reshape(kv_heads, -1, dim)
    # Zeros to the left of each row: row i of the view below is then row i shifted right by
    # n_probe - 1 - i, which lines equal distances up in columns.
    width = kv_len + n_probe - 1
    padded = torch.empty(heads, n_probe, width, device=q.device)
    padded[..., : n_probe - 1] = 0
    scores = (grouped @ k.float().mT).view(heads, n_probe, kv_len)
    corner = torch.ones(n_probe, n_probe, dtype=torch.bool, device=q.device).triu(1)
    scores[..., kv_len - n_probe :].masked_fill_(corner, float("-inf"))
    probs = padded[..., n_probe - 1 :]
    probs.copy_(scores.softmax(-1))
    by_distance = padded.as_strided(
        (heads, n_probe, kv_len), (n_probe * width, width + 1, 1), padded.storage_offset()
    )
    return probs.sum(1) / n_probe, by_distance.sum(1) / n_probe


def cover(mass: Tensor, share: float) -> Tensor:
    """int64 `[heads]`: size of the smallest top set whose mass is strictly above `share`."""
    running = mass.sort(dim=-1, descending=True).values.cumsum(-1)
    return (running <= share).sum(-1) + 1


def top_mask(scores: Tensor, count: Tensor) -> Tensor:
    """bool like `scores [heads, n]`: the `count [heads]` largest of each row, first of equals."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(scores.shape[-1], device=scores.device) < count[:, None]
    return torch.zeros_like(chosen).scatter_(-1, order, chosen)


def to_query_grid(mask: Tensor, q_len: int, q_offset: int, block: int) -> Tensor:
    """Move a block mask from the grid at position 0 to one that starts at the first query.

    `mask [heads, q_blocks, k_blocks]` has a row per block of the position grid that holds a query.
    A query block that straddles two of them keeps what either keeps.
    """
    if q_offset % block == 0:
        return mask
    first = torch.arange(0, q_len, block, device=mask.device) + q_offset
    last = (first + block).clamp(max=q_offset + q_len) - 1
    base = q_offset // block
    return mask[:, first // block - base] | mask[:, last // block - base]
