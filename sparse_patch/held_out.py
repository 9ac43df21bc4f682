"""What a ranking of blocks loses on rows that it was not made from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sparse_patch_kernels.estimators import TILE_ELEMENTS
from sparse_patch_kernels.estimators.token_scores import by_block, pooled_rows, sampled_rows
from torch import Tensor

# Shares of blocks that a GPU holds at a time: 128 MiB. Small tiles would keep it waiting.
_GPU_ELEMENTS = 1 << 25


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
    sample = q_len, offset, block_q, stride, stride // 2
    rows, block_of = sampled_rows(*sample, q.device)
    known = sampled_rows(*sample, torch.device("cpu"))[1]  # to look at without waiting for a GPU
    at_once = TILE_ELEMENTS if q.device.type == "cpu" else _GPU_ELEMENTS
    step = max(1, at_once // (heads * blocks))
    for first in range(0, len(rows), step):
        some, block = rows[first : first + step], block_of[first : first + step]
        mass = pooled_rows(q, k, scale, some, some + offset + 1, width=block_k)
        # Key blocks past the last of these query blocks are ranked after all that they see.
        end = (offset // block_q + int(known[first : first + step][-1]) + 1) * block_q
        _add_squares(squares, mass, order[:, block, : -(-end // block_k)])
    return (squares / len(rows)).sqrt_()


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
        taken[which, sampled_rows(q_len, offset, block, every, shift, device)[0]] = True
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
        by_all, by_half = (by_block(mass[:, mine], index[mine], reduce) for mine in taken[:2, some])
        result[:, here, : mass.shape[2]] = by_all
        scores = torch.full_like(result[:, here], float("-inf"))
        scores[..., : mass.shape[2]] = by_half
        tested = taken[2, some]
        end = (offset // block + here.stop) * block
        order = rank(scores, here)[:, index[tested], : -(-end // block_k)]
        _add_squares(squares, mass[:, tested], order)
    return result, (squares / int(taken[2].sum())).sqrt_()


def _add_squares(squares: Tensor, mass: Tensor, order: Tensor) -> None:
    """Add up squares of what rows of `mass [heads, rows, m]` lose by their first n ranked blocks.

    Args:
        squares: `[heads, blocks]`, by n - 1.
        order: `[heads, rows, n]`; where n is less than m, no row has mass past n.
    """
    n = order.shape[2]
    ranked = torch.nn.functional.pad(mass, (0, n - mass.shape[2])).gather(2, order.long())
    squares[:, :n] += (1 - ranked.cumsum(-1)).clamp_(min=0).square_().sum(1)
