"""Means of blocks of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton.launch import launch
from ...triton.tiles import power_of_two

__all__ = ["pool_mean"]

# Numbers that a program reads at a time: 32 a thread.
_TILE = 4096
_CONFIGS = (triton.Config({}, num_warps=4, num_stages=2),)


def pool_mean(x: Tensor, block: int, offset: int = 0) -> Tensor:
    """As `plain.pool_mean`: float32 `[heads, blocks, dim]`."""
    heads, n, dim = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    offset %= block
    n_blocks = -(-(offset + n) // block)
    result = torch.empty(heads, n_blocks, dim, dtype=torch.float32, device=x.device)
    width = power_of_two(dim)
    # Short blocks are read several at a time, long ones in pieces.
    rows = min(power_of_two(block), max(1, _TILE // width))
    blocks = max(1, _TILE // (width * rows))
    launch(
        _block_means,
        (-(-n_blocks // blocks), heads, 1),
        {
            "x": x,
            "result": result,
            "x_head": x.stride(0),
            "x_row": x.stride(1),
            "n": n,
            "n_blocks": n_blocks,
            "block": block,
            "offset": offset,
            "DIM": dim,
            "WIDTH": width,
            "ROWS": rows,
            "BLOCKS": blocks,
        },
        _CONFIGS,
        (),
    )
    return result


@triton.jit(do_not_specialize=["n", "n_blocks", "block", "offset"])
def _block_means(
    x,
    result,
    x_head,
    x_row,
    n,
    n_blocks,
    block,
    offset,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    first = index * block - offset  # the first block's may lie before row 0
    column = tl.arange(0, WIDTH)
    total = tl.zeros([BLOCKS, WIDTH], tl.float32)
    for start in range(0, block, ROWS):
        inside = start + tl.arange(0, ROWS)
        row = first[:, None] + inside[None, :]
        seen = (row >= 0) & (row < n) & (inside < block)[None, :]
        at = x + head * x_head + row.to(tl.int64) * x_row
        seen3 = seen[:, :, None] & (column < DIM)[None, None, :]
        tile = tl.load(at[:, :, None] + column[None, None, :], mask=seen3, other=0.0)
        total += tl.sum(tile.to(tl.float32), 1)
    count = tl.minimum(first + block, n) - tl.maximum(first, 0)
    # Blocks past the last hold no row; nothing of them is written.
    mean = total / tl.maximum(count, 1).to(tl.float32)[:, None]
    at = result + (head * n_blocks + index.to(tl.int64))[:, None] * DIM + column[None, :]
    tl.store(at, mean, mask=(index < n_blocks)[:, None] & (column < DIM)[None, :])
