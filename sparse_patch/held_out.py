"""Attention that a ranking of blocks loses on rows that it was not made from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sparse_patch_kernels.estimators import TILE_ELEMENTS
from sparse_patch_kernels.estimators.token_scores import by_block, pooled_rows, sampled_rows
from torch import Tensor


def ranking_loss(
    q: Tensor, k: Tensor, scale: float, order: Tensor, *, block_q: int, block_k: int, stride: int
) -> Tensor:
    """What the rows of a sample lose when only the first n of their ranked blocks are kept.

    The sample is every `stride`-th query, half a stride after the multiples: rows that a ranking
    made from the multiples has not seen.

    Args:
        q: `[heads, q_len, dim]`, the last rows of the sequence.
        k: `[kv_heads, kv_len, dim]`.
        order: int32 `[lists, rows, blocks]`, as `selection.rank` makes it.
        block_q, block_k: tokens per query block and per key block.
        stride: step between sampled queries.

    Returns:
        float32 `[heads, blocks]`: entry n - 1 is the root mean square, over the sampled rows, of
        the attention mass outside of the row's first n ranked blocks.
    """
    (heads, q_len, _), blocks, offset = q.shape, order.shape[2], k.shape[1] - q.shape[1]
    order = order.repeat_interleave(heads // order.shape[0], 0)
    squares = torch.zeros(heads, blocks, device=q.device)
    rows, block_of = sampled_rows(q_len, offset, block_q, stride, stride // 2, q.device)
    step = max(1, TILE_ELEMENTS // (heads * blocks))
    for first in range(0, len(rows), step):
        tile, block = rows[first : first + step], block_of[first : first + step]
        mass = pooled_rows(q, k, scale, tile, tile + offset + 1, width=block_k)
        # Key blocks past the last of these query blocks are ranked after all visible ones.
        end = (offset // block_q + int(block[-1]) + 1) * block_q
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

    In one pass: the ranking is made from every second row of the sample and tested on the rows
    between.

    Args:
        q, k, scale, block, block_k, reduce: as for `token_scores`; `reduce` is not "max".
        rank: makes a ranking from scores `[heads, n, blocks]` of some rows of blocks, a slice.

    Returns:
        float32 `[heads, rows, blocks]` and `[heads, blocks]`.
    """
    (heads, q_len, _), kv_len, device = q.shape, k.shape[1], q.device
    offset = kv_len - q_len
    shape = heads, -(-kv_len // block) - offset // block, -(-kv_len // block_k)
    samples = [(stride, 0), (2 * stride, 0), (2 * stride, stride)]  # all, to rank by, to test on
    taken = torch.zeros(3, q_len, dtype=torch.bool, device=device)
    for sample, (spacing, shift) in enumerate(samples):
        taken[sample, sampled_rows(q_len, offset, block, spacing, shift, device)[0]] = True
    rows = taken.any(0).nonzero()[:, 0]
    block_of = (rows + offset) // block - offset // block
    result = torch.full(shape, float("-inf"), device=device)
    squares = torch.zeros(heads, shape[2], device=device)
    step = max(1, TILE_ELEMENTS // (heads * shape[2] * (-(-block // stride) + 1)))
    for first in range(0, shape[1], step):
        tile = rows[(block_of >= first) & (block_of < first + step)]
        mass = pooled_rows(q, k, scale, tile, tile + offset + 1, width=block_k)
        row_blocks = slice(first, min(first + step, shape[1]))
        index = (tile + offset) // block - offset // block - first
        by_all, by_half = (
            by_block(mass[:, chosen], index[chosen], reduce) for chosen in taken[:2, tile]
        )
        result[:, row_blocks, : mass.shape[2]] = by_all
        scores = torch.full_like(result[:, row_blocks], float("-inf"))
        scores[..., : mass.shape[2]] = by_half
        tested = taken[2, tile]
        end = (offset // block + row_blocks.stop) * block
        order = rank(scores, row_blocks)[:, index[tested], : -(-end // block_k)]
        _add_squares(squares, mass[:, tested], order)
    return result, (squares / int(taken[2].sum())).sqrt_()


def _add_squares(squares: Tensor, mass: Tensor, order: Tensor) -> None:
    """Add up squares of what rows of `mass [heads, rows, m]` lose by their first n ranked blocks.

    Args:
        squares: `[heads, blocks]`, by n - 1.
        order: `[heads, rows, n]`, n at least m.
    """
    n = order.shape[2]
    ranked = torch.nn.functional.pad(mass, (0, n - mass.shape[2])).gather(2, order.long())
    squares[:, :n] += (1 - ranked.cumsum(-1)).clamp_(min=0).square_().sum(1)
