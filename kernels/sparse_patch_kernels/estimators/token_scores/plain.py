"""Attention mass of block pairs: real softmax rows of a sample of queries, or antidiagonal sums."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...dispatch import has_kernel, has_native
from .. import TILE_ELEMENTS
from ..pooling import pool_sum


@has_kernel
def token_scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    *,
    block: int,
    block_k: int | None = None,
    stride_q: int = 1,
    stride_k: int = 1,
    reduce: str = "sum",
) -> Tensor:
    """Log of the attention mass of each block pair, from real softmax rows of a sample of queries.

    Only positions that are multiples of the strides take part (and the last row of a block without
    one). Works on a few query blocks at a time, so memory is never q_len x kv_len.

    Args:
        q: `[heads, q_len, dim]`, the last rows of the sequence.
        k: `[kv_heads, kv_len, dim]`.
        block: tokens per block.
        block_k: tokens per key block, if different; `stride_k` divides it.
        stride_q, stride_k: steps between scored queries, and between scored keys.
        reduce: score of a block: the "sum" of its probabilities; their "max"; or the "rms", root
            mean square over the sampled queries of their mass in the block, which ranks a block
            that few queries need much above one that many need a little.

    Returns:
        float32 `[heads, rows, blocks]`: a row per block of the position grid that holds a query;
        -inf where no sampled query sees a sampled key.
    """
    offset, kv_len = k.shape[1] - q.shape[1], k.shape[1]
    block_k = block_k or block
    shape = (-(-kv_len // block) - offset // block, -(-kv_len // block_k))
    result = torch.full((q.shape[0], *shape), float("-inf"), device=q.device)
    rows, block_of = sampled_rows(q.shape[1], offset, block, stride_q, 0, q.device)
    keys, width = k[:, ::stride_k], block_k // stride_k
    seen = (rows + offset) // stride_k + 1
    per_block = -(-block // stride_q)
    step = max(1, TILE_ELEMENTS // (q.shape[0] * shape[1] * per_block))
    for first in range(0, shape[0], step):
        tile = (block_of >= first) & (block_of < first + step)
        pooled = pooled_rows(
            q, keys, scale, rows[tile], seen[tile], width=width, largest=reduce == "max"
        )
        pooled = by_block(pooled, block_of[tile] - first, reduce)
        result[:, first : first + pooled.shape[1], : pooled.shape[2]] = pooled
    return result


@has_kernel
@has_native
def pooled_rows(
    q: Tensor,
    k: Tensor,
    scale: float,
    rows: Tensor,
    seen: Tensor,
    *,
    width: int,
    largest: bool = False,
) -> Tensor:
    """Attention of some rows to the first keys, pooled over every `width` of them.

    Args:
        q: `[heads, q_len, dim]`.
        k: `[kv_heads, n_keys, dim]`.
        rows: int64 `[n]`, which rows of q, ascending.
        seen: int64 `[n]`, number of first keys that each of them sees; at least one, ascending.
        largest: return the log of the largest probability of `width` keys, not the sum.

    Returns:
        float32 `[heads, n, blocks]`, up to the last block that some row sees, or further; 0 where a
        row sees nothing, or -inf if `largest`.
    """
    heads, dim = q.shape[0], q.shape[2]
    keys = k.float()
    blocks = -(-int(seen.max()) // width)
    result = torch.full(
        (heads, len(rows), blocks), float("-inf") if largest else 0.0, device=q.device
    )
    step = max(1, TILE_ELEMENTS // (heads * k.shape[1]))
    for first in range(0, len(rows), step):
        tile = slice(first, first + step)
        near, end = (int(n) for n in seen[tile].aminmax())
        end = min(-(-end // width) * width, k.shape[1])  # whole blocks, since a pad would copy
        queries = (q[:, rows[tile]].float() * scale).reshape(len(k), -1, dim)
        logits = (queries @ keys[:, :end].mT).view(heads, -1, end)
        # Keys before `near` are visible to all of these rows.
        late = torch.arange(near, end, device=q.device) >= seen[tile][:, None]
        logits[..., near:].masked_fill_(late, float("-inf"))
        pooled = _largest_of(logits, width) if largest else pool_sum(logits.softmax(-1), width)
        result[:, tile, : pooled.shape[2]] = pooled
    return result


def _largest_of(logits: Tensor, width: int) -> Tensor:
    """Log of the largest probability of every `width` keys, of logits `[heads, rows, keys]`.

    Computed in logs, because small probabilities underflow and would tie.
    """
    pad = -logits.shape[2] % width
    padded = torch.nn.functional.pad(logits, (0, pad), value=float("-inf"))
    best = padded.reshape(*padded.shape[:2], -1, width).amax(-1)
    return best - logits.logsumexp(-1, keepdim=True)


@has_kernel
def antidiagonal_scores(q: Tensor, k: Tensor, scale: float, *, block: int, stride: int) -> Tensor:
    """Log of the attention mass of each block pair, from sums along antidiagonals (XAttention).

    Tokens are cut into groups of `stride`, counted from position 0; tokens of a group without a row
    in q or k are zero. Query group a sees key groups c <= a, with the logit

        scale / stride * sum_p q[a * stride + stride - 1 - p] . k[c * stride + p]

    and a block's mass is the sum over its (block / stride) x (block / stride) group pairs.

    Args:
        q: `[heads, q_len, dim]`, the last rows of the sequence.
        k: `[kv_heads, kv_len, dim]`.
        scale: factor that the model puts on its logits.
        block: tokens per block.
        stride: tokens per group; divides `block`.

    Returns:
        float32 `[heads, rows, blocks]`: a row per block of the position grid that holds a query;
        -inf at blocks after it.
    """
    # A group is one token with stride * dim channels, so groups are scored like tokens.
    queries = _groups(q, stride, (k.shape[1] - q.shape[1]) % stride).flatten(2)
    keys = _groups(k, stride, 0).flip(2).flatten(2)
    return token_scores(queries, keys, scale / stride, block=block // stride)


def _groups(x: Tensor, stride: int, before: int) -> Tensor:
    """`[heads, n, dim]` -> `[heads, groups, stride, dim]`, after `before` rows of zeros."""
    after = -(before + x.shape[1]) % stride
    if before or after:  # even an empty pad would copy
        x = torch.nn.functional.pad(x, (0, 0, before, after))
    return x.reshape(x.shape[0], -1, stride, x.shape[2])


@lru_cache(64)  # known from the lengths: nothing is read from a GPU, and little copied to it
def sampled_rows(
    q_len: int, offset: int, block: int, stride: int, shift: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows at positions `shift`, `shift + stride`, ..., and the block, from 0, of each."""
    row = torch.arange(q_len, device="cpu")
    block_of = (row + offset) // block - offset // block
    taken = (row + offset) % stride == shift
    has_sample = torch.zeros(int(block_of[-1]) + 1, dtype=torch.bool, device="cpu")
    has_sample[block_of[taken]] = True
    ends = torch.ones_like(taken)
    ends[:-1] = block_of[1:] != block_of[:-1]
    taken |= ends & ~has_sample[block_of]
    return row[taken].to(device), block_of[taken].to(device)


def by_block(pooled: Tensor, block_of: Tensor, reduce: str) -> Tensor:
    """The result of `pooled_rows`, `[heads, rows, n]`, -> log mass `[heads, blocks of rows, n]`."""
    heads, _, n = pooled.shape
    shape = heads, int(block_of[-1]) + 1, n
    index = block_of[None, :, None].expand(heads, -1, n)
    if reduce == "max":
        return pooled.new_full(shape, float("-inf")).scatter_reduce_(1, index, pooled, "amax")
    if reduce == "rms":
        return pooled.new_zeros(shape).scatter_add_(1, index, pooled.square_()).log_().div_(2)
    return pooled.new_zeros(shape).scatter_add_(1, index, pooled).log_()
