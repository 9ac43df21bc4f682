"""What methods share to tell how much blocks are worth. Blocks are counted from position 0.

Shapes: q `[heads, q_len, dim]`, k `[kv_heads, kv_len, dim]`, block masks
`[heads, q_blocks, k_blocks]`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sparse_patch_kernels import dispatch
from sparse_patch_kernels.dispatch import has_kernel, has_native
from torch import Tensor

# Largest matrix of probabilities a probe holds at a time, in elements (128 MiB in float32).
PROBE_ELEMENTS = 1 << 25
# The same for scores that are pooled as they are made (16 MiB): small tiles stay in the caches.
TILE_ELEMENTS = 1 << 22


@has_kernel("pooling")
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
    if pad:  # a pad of nothing would copy
        x = torch.nn.functional.pad(x, (0, pad))
    return x.reshape(*x.shape[:-1], -1, block).sum(-1)


@has_kernel("probe")
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
    # One head at a time, in the same memory: new memory costs more than what is done in it.
    logits, softmax = (torch.empty(n_probe, kv_len, device=q.device) for _ in range(2))
    # Zeros to the left of each row: row i of the view below is then row i shifted right by
    # n_probe - 1 - i, which lines equal distances up in columns.
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


@has_kernel("probe")
def key_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Mean attention of a few queries to each key, none masked: float32 `[heads, kv_len]`.

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


@has_kernel("token_scores")
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

    Only positions that are multiples of the strides take part (and the last row of a block that
    has none). Works through a few query blocks at a time: nothing of q_len x kv_len is built.

    Args:
        q: `[heads, q_len, dim]`, the last rows of the sequence.
        k: `[kv_heads, kv_len, dim]`.
        block: tokens per block.
        block_k: tokens per key block, where that is another; `stride_k` divides it.
        stride_q, stride_k: keep every so many queries, keys.
        reduce: what a block is worth: the "sum" of its probabilities; their "max"; or the "rms",
            root mean square over the sampled queries of what each gives the block, which puts a
            block that few queries need much above one that many need a little.

    Returns:
        float32 `[heads, rows, blocks]`: a row per block of the position grid that holds a query;
        -inf where no sampled query sees a sampled key.
    """
    offset, kv_len = k.shape[1] - q.shape[1], k.shape[1]
    block_k = block_k or block
    shape = (-(-kv_len // block) - offset // block, -(-kv_len // block_k))
    result = torch.full((q.shape[0], *shape), float("-inf"), device=q.device)
    rows, block_of = _sampled_rows(q.shape[1], offset, block, stride_q, 0, q.device)
    keys, width = k[:, ::stride_k], block_k // stride_k
    seen = (rows + offset) // stride_k + 1
    per_block = -(-block // stride_q)
    step = max(1, TILE_ELEMENTS // (q.shape[0] * shape[1] * per_block))
    for first in range(0, shape[0], step):
        mine = (block_of >= first) & (block_of < first + step)
        pooled = pooled_rows(
            q, keys, scale, rows[mine], seen[mine], width=width, largest=reduce == "max"
        )
        pooled = _by_block(pooled, block_of[mine] - first, reduce)
        result[:, first : first + pooled.shape[1], : pooled.shape[2]] = pooled
    return result


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
        seen: int64 `[n]`, how many of the keys each of them sees; one at least, ascending.
        largest: take the log of the largest probability of `width` keys, not the sum.

    Returns:
        float32 `[heads, n, blocks]`, up to the last block that some row sees; 0 where a row sees
        nothing, or -inf if `largest`.
    """
    heads, dim = q.shape[0], q.shape[2]
    keys = k.float()
    blocks = -(-int(seen.max()) // width)
    result = torch.full(
        (heads, len(rows), blocks), float("-inf") if largest else 0.0, device=q.device
    )
    step = max(1, TILE_ELEMENTS // (heads * k.shape[1]))
    for first in range(0, len(rows), step):
        some = slice(first, first + step)
        near, end = (int(n) for n in seen[some].aminmax())
        end = min(-(-end // width) * width, k.shape[1])  # whole blocks: a pad would copy
        queries = (q[:, rows[some]].float() * scale).reshape(len(k), -1, dim)
        logits = (queries @ keys[:, :end].mT).view(heads, -1, end)
        # Keys before `near` are visible to all of these rows.
        late = torch.arange(near, end, device=q.device) >= seen[some][:, None]
        logits[..., near:].masked_fill_(late, float("-inf"))
        pooled = _largest_of(logits, width) if largest else pool_sum(logits.softmax(-1), width)
        result[:, some, : pooled.shape[2]] = pooled
    return result


def _largest_of(logits: Tensor, width: int) -> Tensor:
    """Log of the largest probability of every `width` keys, of logits `[heads, rows, keys]`.

    In logs throughout: probabilities of a long row underflow, and would tie.
    """
    pad = -logits.shape[2] % width
    padded = torch.nn.functional.pad(logits, (0, pad), value=float("-inf"))
    best = padded.reshape(*padded.shape[:2], -1, width).amax(-1)
    return best - logits.logsumexp(-1, keepdim=True)


def ranking_loss(
    q: Tensor, k: Tensor, scale: float, order: Tensor, *, block_q: int, block_k: int, stride: int
) -> Tensor:
    """What the rows of a sample lose when only the first n of their ranked blocks are kept.

    The sample is every `stride`-th query, half a stride after the multiples of it: rows that a
    ranking made from those multiples has not seen.

    Args:
        q: `[heads, q_len, dim]`, the last rows of the sequence.
        k: `[kv_heads, kv_len, dim]`.
        order: int32 `[lists, rows, blocks]`, as `selection.rank` makes it.
        block_q, block_k: tokens per query block and per key block.
        stride: take every so many queries.

    Returns:
        float32 `[heads, blocks]`: entry n - 1 is the root mean square, over the sampled rows, of
        the attention mass outside of the row's first n ranked blocks.
    """
    (heads, q_len, _), blocks, offset = q.shape, order.shape[2], k.shape[1] - q.shape[1]
    order = order.repeat_interleave(heads // order.shape[0], 0)
    squares = torch.zeros(heads, blocks, device=q.device)
    rows, block_of = _sampled_rows(q_len, offset, block_q, stride, stride // 2, q.device)
    step = max(1, TILE_ELEMENTS // (heads * blocks))
    for first in range(0, len(rows), step):
        some, block = rows[first : first + step], block_of[first : first + step]
        mass = pooled_rows(q, k, scale, some, some + offset + 1, width=block_k)
        # Key blocks past the last of these query blocks are ranked after all that they see.
        end = (offset // block_q + int(block[-1]) + 1) * block_q
        _add_squares(squares, mass, order[:, block, : -(-end // block_k)])
    return (squares / len(rows)).sqrt_()


def _add_squares(squares: Tensor, mass: Tensor, order: Tensor) -> None:
    """Add up squares of what rows of `mass [heads, rows, m]` lose by their first n ranked blocks.

    Args:
        squares: `[heads, blocks]`, by n - 1.
        order: `[heads, rows, n]`, n at least m.
    """
    n = order.shape[2]
    ranked = torch.nn.functional.pad(mass, (0, n - mass.shape[2])).gather(2, order.long())
    squares[:, :n] += (1 - ranked.cumsum(-1)).clamp_(min=0).square_().sum(1)


def scores_and_loss(
    q: Tensor,
    k: Tensor,
    scale: float,
    rank: Callable[[Tensor, slice], Tensor],
    *,
    block: int,
    block_k: int,
    stride: int,
    reduce: str,
) -> tuple[Tensor, Tensor]:
    """`token_scores` of every `stride`-th query, and what a ranking by half of them loses.

    In one pass: the ranking is made from every second row of the sample, and `ranking_loss` is
    that of the rows between.

    Args:
        q, k, scale, block, block_k, reduce: as for `token_scores`; `reduce` is no "max".
        rank: makes a ranking from scores `[heads, n, blocks]` of some rows of blocks, a slice.

    Returns:
        float32 `[heads, rows, blocks]` and `[heads, blocks]`.
    """
    (heads, q_len, _), kv_len, device = q.shape, k.shape[1], q.device
    offset = kv_len - q_len
    shape = heads, -(-kv_len // block) - offset // block, -(-kv_len // block_k)
    samples = [(stride, 0), (2 * stride, 0), (2 * stride, stride)]  # all, to rank by, to test on
    taken = torch.zeros(3, q_len, dtype=torch.bool, device=device)
    for which, (every, shift) in enumerate(samples):
        taken[which, _sampled_rows(q_len, offset, block, every, shift, device)[0]] = True
    rows = taken.any(0).nonzero()[:, 0]
    block_of = (rows + offset) // block - offset // block
    result = torch.full(shape, float("-inf"), device=device)
    squares = torch.zeros(heads, shape[2], device=device)
    step = max(1, TILE_ELEMENTS // (heads * shape[2] * (-(-block // stride) + 1)))
    for first in range(0, shape[1], step):
        some = rows[(block_of >= first) & (block_of < first + step)]
        mass = pooled_rows(q, k, scale, some, some + offset + 1, width=block_k)
        here = slice(first, min(first + step, shape[1]))
        index = (some + offset) // block - offset // block - first
        by_all, by_half = (
            _by_block(mass[:, mine], index[mine], reduce) for mine in taken[:2, some]
        )
        result[:, here, : mass.shape[2]] = by_all
        scores = torch.full_like(result[:, here], float("-inf"))
        scores[..., : mass.shape[2]] = by_half
        tested = taken[2, some]
        end = (offset // block + here.stop) * block
        order = rank(scores, here)[:, index[tested], : -(-end // block_k)]
        _add_squares(squares, mass[:, tested], order)
    return result, (squares / int(taken[2].sum())).sqrt_()


@has_kernel("token_scores")
def antidiagonal_scores(q: Tensor, k: Tensor, scale: float, *, block: int, stride: int) -> Tensor:
    """Log of the attention mass of each block pair, from sums along antidiagonals (XAttention).

    Tokens are cut into groups of `stride`, counted from position 0; where q or k has no row for a
    group's token, that is zero. Query group a sees key groups c <= a, with the logit

        scale / stride * sum_p q[a * stride + stride - 1 - p] . k[c * stride + p]

    and a block is worth the probabilities of its (block / stride) x (block / stride) group pairs.

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
    # A group is one token of stride * dim numbers, so groups are scored as tokens are.
    queries = _groups(q, stride, (k.shape[1] - q.shape[1]) % stride).flatten(2)
    keys = _groups(k, stride, 0).flip(2).flatten(2)
    return token_scores(queries, keys, scale / stride, block=block // stride)


def _groups(x: Tensor, stride: int, before: int) -> Tensor:
    """`[heads, n, dim]` -> `[heads, groups, stride, dim]`, after `before` rows of zeros."""
    after = -(before + x.shape[1]) % stride
    if before or after:  # a pad of nothing would copy
        x = torch.nn.functional.pad(x, (0, 0, before, after))
    return x.reshape(x.shape[0], -1, stride, x.shape[2])


def _sampled_rows(
    q_len: int, offset: int, block: int, stride: int, shift: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows at positions `shift`, `shift + stride`, ..., and the block, from 0, of each."""
    row = torch.arange(q_len, device=device)
    block_of = (row + offset) // block - offset // block
    taken = (row + offset) % stride == shift
    some = torch.zeros(int(block_of[-1]) + 1, dtype=torch.bool, device=device)
    some[block_of[taken]] = True
    ends = torch.ones_like(taken)
    ends[:-1] = block_of[1:] != block_of[:-1]
    taken |= ends & ~some[block_of]
    return row[taken], block_of[taken]


def _by_block(pooled: Tensor, block_of: Tensor, reduce: str) -> Tensor:
    """What `pooled_rows` gives `[heads, rows, n]` -> log mass `[heads, blocks of rows, n]`."""
    heads, _, n = pooled.shape
    shape = heads, int(block_of[-1]) + 1, n
    index = block_of[None, :, None].expand(heads, -1, n)
    if reduce == "max":
        return pooled.new_full(shape, float("-inf")).scatter_reduce_(1, index, pooled, "amax")
    if reduce == "rms":
        return pooled.new_zeros(shape).scatter_add_(1, index, pooled.square_()).log_().div_(2)
    return pooled.new_zeros(shape).scatter_add_(1, index, pooled).log_()
