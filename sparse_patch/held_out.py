"""Attention that a ranking of blocks loses on rows that it was not made from."""

from __future__ import annotations

import torch
from sparse_patch_kernels.estimators import TILE_ELEMENTS
from sparse_patch_kernels.estimators.ranking import add_losses, rank_and_test
from sparse_patch_kernels.estimators.token_scores import pooled_rows, sampled_rows
from torch import Tensor

# Shares of blocks that a GPU holds at a time: 128 MiB. Small tiles would keep it waiting.
_GPU_ELEMENTS = 1 << 25


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
    sample = q_len, offset, block_q, stride, stride // 2
    rows, block_of = sampled_rows(*sample, q.device)
    known = sampled_rows(*sample, torch.device("cpu"))[1]  # to look at without waiting for a GPU
    at_once = TILE_ELEMENTS if q.device.type == "cpu" else _GPU_ELEMENTS
    step = max(1, at_once // (heads * blocks))
    for first in range(0, len(rows), step):
        tile, block = rows[first : first + step], block_of[first : first + step]
        mass = pooled_rows(q, k, scale, tile, tile + offset + 1, width=block_k)
        # Key blocks past the last of these query blocks are ranked after all visible ones.
        end = (offset // block_q + int(known[first : first + step][-1]) + 1) * block_q
        add_losses(squares, mass, order[:, block, : -(-end // block_k)])
    return (squares / len(rows)).sqrt_()


def scores_and_loss(
    q: Tensor,
    k: Tensor,
    scale: float,
    allowed: Tensor,
    forced: Tensor,
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
        allowed, forced: bool `[rows, blocks]`, as for `rank`.

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
    result = torch.empty(shape, device=device)
    squares = torch.zeros(heads, shape[2], device=device)
    step = max(1, TILE_ELEMENTS // (heads * shape[2] * (-(-block // stride) + 1)))
    for first in range(0, shape[1], step):
        row_blocks = slice(first, first + step)
        tile = rows[(block_of >= first) & (block_of < first + step)]
        mass = pooled_rows(q, k, scale, tile, tile + offset + 1, width=block_k)
        index = (tile + offset) // block - offset // block - first
        result[:, row_blocks], losses = rank_and_test(
            mass, index, taken[:, tile], allowed[row_blocks], forced[row_blocks], reduce=reduce
        )
        squares += losses
    return result, (squares / int(taken[2].sum())).sqrt_()
