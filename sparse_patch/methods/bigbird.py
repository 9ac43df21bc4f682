"""BigBird: the first blocks, a window, and a few blocks drawn by lot for every row. Static.

Key block n is kept for query block m iff n <= m and

    n < sink_blocks   or   m - n < local_blocks   or   n is one of `random_blocks` drawn for m

The lots are a hash of seed, m and n: they depend on no input, on no length and on no device, so a
chunked prefill draws what a whole one does. Each layer draws its own, from `seed` plus its index,
so that what a row does not see in one layer it sees through another; heads of a layer share a list.

As a control it answers what `a_shape` cannot: is a choice better than chance at the same density?

Source: BigBird (arXiv:2007.14062), whose block size, window, first and random blocks are the
defaults. It was made for encoders that are trained with it. Here it is causal: the half of the
window that would lie after a row lies before it, and first blocks are seen by all but see none of
what follows. Without training a fact in the middle reaches the end by luck, or not at all.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from sparse_patch_kernels import BlockPlan
from torch import Tensor

from ..registry import Examples, Knob, Method, check_sequence, param, register
from ..selection import BlockGrid, to_query_grid, top_mask

_WORD = 2**32 - 1


@register("bigbird")
@dataclass(frozen=True)
class BigBird(Method):
    """First blocks, a window, and blocks drawn by lot."""

    source: ClassVar[str] = "arXiv:2007.14062"
    examples: ClassVar[Examples] = {
        "sparse": {"block_size": 16, "sink_blocks": 1, "local_blocks": 1, "random_blocks": 2},
        "everything": {"random_blocks": 10000},
    }
    knob: ClassVar[Knob | None] = Knob.count("random_blocks", 1, 2048)

    block_size: int = param(64, "tokens per block", choices=(16, 32, 64, 128, 256))
    sink_blocks: int = param(2, "first blocks that every row keeps", least=0)
    local_blocks: int = param(3, "latest blocks that a row keeps, its own included", least=1)
    random_blocks: int = param(3, "blocks drawn for every row from all others in its past", least=0)
    seed: int = param(0, "another number draws other blocks", least=0, upto=_WORD)

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """Method.plan; None where the pattern leaves nothing out."""
        check_sequence(q, k, q_offset)
        q_len, kv_len, block = q.shape[1], k.shape[1], self.block_size
        grid = BlockGrid(q_len, kv_len, block, block, q.device)
        causal, forced = grid.causal(), grid.forced(self.sink_blocks, self.local_blocks)
        others = causal & ~forced
        lot = _lots(grid, self.seed).masked_fill(~others, -1)
        drawn = top_mask(lot, torch.full_like(lot[:, 0], self.random_blocks)) & others
        kept = forced | drawn
        if bool((kept == causal).all()):
            return None
        mask = to_query_grid(kept[None], q_len, q_offset, block)
        return BlockPlan.from_block_mask(
            mask, block_q=block, block_k=block, q_len=q_len, kv_len=kv_len
        )

    def for_layer(self, layer: int) -> BigBird:
        """See Method.for_layer: the same pattern with other lots."""
        return dataclasses.replace(self, seed=(self.seed + layer) & _WORD)


def _lots(grid: BlockGrid, seed: int) -> Tensor:
    """int64 `[rows, blocks]` below 2^32: what each key block draws in each row; the most win."""
    row = torch.arange(grid.first_row, grid.first_row + grid.rows, device=grid.device)
    column = torch.arange(grid.blocks, device=grid.device)
    start = _mixed(torch.full_like(row, seed))
    return _mixed(_mixed(start + row)[:, None] + column)


def _mixed(x: Tensor) -> Tensor:
    """MurmurHash3's last step: 32 bits, each of which depends on all of those of `x`."""
    x = x & _WORD
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        x = ((x ^ (x >> shift)) * factor) & _WORD  # past 2^63 it wraps, which these bits survive
    return x ^ (x >> 16)
