"""What methods share to tell how much blocks are worth. Blocks are counted from position 0.

Shapes: q `[heads, q_len, dim]`, k `[kv_heads, kv_len, dim]`, block masks
`[heads, q_blocks, k_blocks]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Largest matrix of probabilities a probe holds at a time, in elements (128 MiB in float32).
PROBE_ELEMENTS = 1 << 25
# The same for scores that are pooled as they are made (16 MiB): small tiles stay in the caches.
TILE_ELEMENTS = 1 << 22


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


def probe_mass(q: Tensor, k: Tensor, scale: float, block: int) -> Tensor:
    """True attention mass of each key block, seen by a few last queries, mean over them.

    Args:
        q: `[heads, n_probe, dim]`, the last rows of the sequence.
        k: `[kv_heads, kv_len, dim]`.

    Returns:
        float32 `[heads, blocks]`, summing to 1 per head.
    """
    return pool_sum(probe_lines(q, k, scale)[0], block)


def token_scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    *,
    block: int,
    stride_q: int = 1,
    stride_k: int = 1,
    reduce: str = "sum",
) -> Tensor:
    """Log of the attention mass of each block pair, from real softmax rows of a sample of queries.

    Only positions that are multiples of the strides take part (and the last row of a block that
    has none). Works through a few query blocks at a time: nothing of q_len x kv_len is built.

    Args:
        q: `[heads, q_len, dim]`, the last rows of the sequence.
        k: `[kv_heads, kv_len, dim]`.
        block: tokens per block; `stride_k` divides it.
        stride_q, stride_k: keep every so many queries, keys.
        reduce: "sum" of a block's probabilities, or the "max" of them.

    Returns:
        float32 `[heads, rows, blocks]`: a row per block of the position grid that holds a query;
        -inf where no sampled query sees a sampled key.
    """
    heads, q_len, dim = q.shape
    kv_heads, kv_len, _ = k.shape
    offset = kv_len - q_len
    rows, block_of = _sampled_rows(q_len, offset, block, stride_q, q.device)
    keys = k[:, ::stride_k].float()
    n_rows, n_blocks = int(block_of[-1]) + 1, -(-kv_len // block)
    result = torch.full((heads, n_rows, n_blocks), float("-inf"), device=q.device)
    per_block = -(-block // stride_q)
    step = max(1, TILE_ELEMENTS // (heads * keys.shape[1] * per_block))
    for first in range(0, n_rows, step):
        mine = (block_of >= first) & (block_of < first + step)
        row, of = rows[mine], block_of[mine] - first
        end = min((offset // block + first + step) * block, kv_len)
        n_keys = -(-end // stride_k)
        queries = (q[:, row].float() * scale).reshape(kv_heads, -1, dim)
        scores = (queries @ keys[:, :n_keys].mT).view(heads, len(row), n_keys)
        position = (row + offset)[:, None]
        near = int(position.min()) // stride_k  # earlier keys are visible to all of these rows
        late = torch.arange(near, n_keys, device=q.device) * stride_k > position
        scores[..., near:].masked_fill_(late, float("-inf"))
        pooled = _pool_rows(scores, of, block // stride_k, reduce)
        result[:, first : first + pooled.shape[1], : pooled.shape[2]] = pooled
    return result


def antidiagonal_scores(
    q: Tensor, k: Tensor, scale: float, *, block: int, stride: int, causal: bool = True
) -> Tensor:
    """Log of the attention mass of each block pair, from sums along antidiagonals (XAttention).

    Positions are cut into groups of `stride`. The logit of query group a and key group c is the
    sum of `q[a * stride + stride - 1 - p] . k[c * stride + p]` over p, times scale / stride;
    positions without a row count as zeros. A block pair has the softmax probabilities, over the
    key groups c <= a, of all its group pairs. Works through a few query blocks at a time.

    Args:
        q: `[heads, q_len, dim]`, the last rows of the sequence.
        k: `[kv_heads, kv_len, dim]`.
        block: tokens per block.
        stride: tokens per group; divides `block`.
        causal: False: over all key groups.

    Returns:
        float32 `[heads, rows, blocks]`: a row per block of the position grid that holds a query.
        A group without any query has no mass. -inf where a block pair has none.
    """
    heads, q_len, dim = q.shape
    kv_heads, kv_len, _ = k.shape
    offset, per_block = kv_len - q_len, block // stride
    first, end = offset // stride, -(-kv_len // stride)  # groups that hold a query
    # A key group is one vector of stride * dim numbers; so is one of queries, in reverse order.
    keys = torch.nn.functional.pad(k.float(), (0, 0, 0, end * stride - kv_len))
    keys = keys.reshape(kv_heads, end, -1)
    first_row, n_blocks = offset // block, -(-kv_len // block)
    result = torch.full((heads, n_blocks - first_row, n_blocks), float("-inf"), device=q.device)
    step = max(1, TILE_ELEMENTS // (heads * end * per_block))
    for row in range(first_row, n_blocks, step):
        group = slice(max(first, row * per_block), min(end, (row + step) * per_block))
        queries = _flipped_groups(q, group, stride, offset) * (scale / stride)
        queries = queries.reshape(kv_heads, -1, stride * dim)
        seen = group.stop if causal else end
        logits = (queries @ keys[:, :seen].mT).view(heads, -1, seen)
        if causal:
            late = torch.ones(logits.shape[1], logits.shape[1], dtype=torch.bool, device=q.device)
            logits[..., group.start :].masked_fill_(late.triu(1), float("-inf"))
        mass = pool_sum(logits.softmax(-1), per_block)
        before = group.start - row * per_block  # groups of the first block without a query
        mass = pool_sum(torch.nn.functional.pad(mass.mT, (before, 0)), per_block).mT.log()
        at = row - first_row
        result[:, at : at + mass.shape[1], : mass.shape[2]] = mass
    return result


def _flipped_groups(q: Tensor, group: slice, stride: int, offset: int) -> Tensor:
    """Groups of query positions as vectors, the last position first; row 0 of `q` is `offset`.

    Float32 `[heads, groups, stride * dim]`, zeros at positions that have no row.
    """
    start, stop = group.start * stride - offset, group.stop * stride - offset
    rows = q[:, max(0, start) : stop].float()
    padded = torch.nn.functional.pad(rows, (0, 0, max(0, -start), max(0, stop - q.shape[1])))
    return padded.reshape(len(q), -1, stride, q.shape[2]).flip(2).flatten(2)


def _sampled_rows(
    q_len: int, offset: int, block: int, stride: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows whose position is a multiple of `stride`, and the block, from 0, that each lies in."""
    row = torch.arange(q_len, device=device)
    block_of = (row + offset) // block - offset // block
    taken = (row + offset) % stride == 0
    some = torch.zeros(int(block_of[-1]) + 1, dtype=torch.bool, device=device)
    some[block_of[taken]] = True
    ends = torch.ones_like(taken)
    ends[:-1] = block_of[1:] != block_of[:-1]
    taken |= ends & ~some[block_of]
    return row[taken], block_of[taken]


def _pool_rows(scores: Tensor, block_of: Tensor, width: int, reduce: str) -> Tensor:
    """Logits `[heads, rows, keys]` -> log mass `[heads, blocks of rows, blocks of width keys]`."""
    heads, _, n_keys = scores.shape
    pad = -n_keys % width
    shape = (heads, int(block_of[-1]) + 1, (n_keys + pad) // width)
    index = block_of[None, :, None].expand(heads, -1, shape[2])
    if reduce == "max":
        # In logs throughout: probabilities of a long row underflow, and would tie.
        lse = scores.logsumexp(-1, keepdim=True)
        padded = torch.nn.functional.pad(scores, (0, pad), value=float("-inf"))
        best = padded.reshape(heads, -1, shape[2], width).amax(-1) - lse
        empty = scores.new_full(shape, float("-inf"))
        return empty.scatter_reduce_(1, index, best, "amax")
    mass = pool_sum(scores.softmax(-1), width)
    return scores.new_zeros(shape).scatter_add_(1, index, mass).log()
