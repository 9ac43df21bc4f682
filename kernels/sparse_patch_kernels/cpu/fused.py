"""PyTorch's own fused CPU attention, and how the CPU backend feeds it.

The kernel takes `[batch, heads, rows, dim]`, one head size for queries, keys and values, rows of
neighbouring elements, and also returns the log-sum-exp that joins parts of a softmax.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Elements of keys gathered at a time: 8 MiB in float32, about a share of the last-level cache.
_TILE = 1 << 21


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of `q [batch, heads, rows, dim]`, and its log-sum-exp."""
    if scale <= 0:  # the kernel hides keys by -inf before it scales them
        q, scale = q * scale, 1.0
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, scale=scale
    )
    return out, lse


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Each query block against whole key blocks, all of which lie in its past.

    Query blocks with lists of one length run together: few large calls keep all cores busy.

    Args:
        q: `[heads, n_q_blocks, block_q, dim]`.
        k, v: `[kv_heads, n_k_blocks, block_k, dim]`.
        index: int64 `[lists, n_q_blocks, n]`, key blocks.
        count: int64 `[lists, n_q_blocks]`, how many of them hold; `lists` divides the heads.

    Returns:
        `[heads, n_q_blocks * block_q, dim]` and log-sum-exp `[heads, n_q_blocks * block_q]`; 0 and
        -inf where the list is empty.
    """
    heads, n_blocks, block_q, dim = q.shape
    kv_heads, n_k_blocks, block_k, _ = k.shape
    # A unit is a set of neighbouring query heads with one list and one KV head.
    units = math.lcm(index.shape[0], kv_heads)
    unit = torch.arange(units)
    list_of, kv_head = unit * index.shape[0] // units, unit * kv_heads // units
    lengths = count[list_of]
    # Row `kv_head * n_k_blocks + block` of these is one block of one KV head.
    blocks_k, blocks_v = (x.reshape(-1, block_k * dim) for x in (k, v))
    lists = index[list_of] + (kv_head * n_k_blocks)[:, None, None]
    queries = q.reshape(units, -1, n_blocks, block_q, dim)
    out = q.new_zeros(n_blocks * block_q, heads, dim)
    lse = q.new_full((heads, n_blocks * block_q), float("-inf"))
    out_blocks = out.view(n_blocks, block_q, units, -1, dim)
    lse_blocks = lse.view(units, -1, n_blocks, block_q)
    for n in sorted(set(lengths.flatten().tolist()) - {0}):
        entries = (lengths == n).nonzero()
        step = max(1, _TILE // (n * block_k * dim))
        for u, b in (part.unbind(1) for part in entries.split(step)):
            chosen = lists[u, b, :n].flatten()
            keys, values = (
                x.index_select(0, chosen).view(len(u), 1, n * block_k, dim)
                for x in (blocks_k, blocks_v)
            )
            mine = queries[u, :, b]
            # Heads of a unit as rows of one: the kernel is faster on taller queries.
            tall = mine.reshape(len(u), 1, -1, dim)
            part, part_lse = fused(tall, keys, values, scale, causal=False)
            out_blocks[b, :, u] = part.reshape(mine.shape).transpose(1, 2)
            lse_blocks[u, :, b] = part_lse.reshape(mine.shape[:-1])
    return out.transpose(0, 1), lse


def join(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> Tensor:
    """Softmax over two sets of keys from those over each: written into `out`; returns its lse."""
    both = torch.logaddexp(lse, more_lse)
    # Rows that see no key at all: the lowest finite number keeps -inf minus it at -inf, not NaN.
    base = both.clamp(min=torch.finfo(both.dtype).min)
    out.mul_((lse - base).exp_()[..., None]).addcmul_(more, (more_lse - base).exp_()[..., None])
    return both


def pad_to(x: Tensor, rows: int, dim: int) -> Tensor:
    """`x [heads, n, d]` with zeros up to `[heads, rows, dim]`."""
    if x.shape[1:] == (rows, dim):
        return x
    return torch.nn.functional.pad(x, (0, dim - x.shape[2], 0, rows - x.shape[1]))
