"""From scores to blocks: rankings, budgets, forced blocks. Blocks are counted from position 0.

Every policy returns one number per row: how many of its ranked blocks (`rank`) are kept. So heads
that differ only in budget can share a list.

Shapes: scores `[lists, rows, blocks]`, allowed and forced bool `[rows, blocks]` or with a leading
`[lists]`; counts int64 `[lists, rows]`. A score is the log of the estimated attention mass, up to
a constant per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from sparse_patch_kernels.estimators.compaction import lists_at_once
from sparse_patch_kernels.estimators.ranking import rank as rank
from torch import Tensor

_NEVER = float("-inf")


@dataclass(frozen=True)
class BlockGrid:
    """Query blocks that hold a query of this call, against all key blocks.

    Attributes:
        q_len, kv_len: tokens; the queries are the last `q_len` positions.
        block_q, block_k: tokens per block; `block_k` divides `block_q`.
        device: where the masks are made.
    """

    q_len: int
    kv_len: int
    block_q: int
    block_k: int
    device: torch.device

    @property
    def q_offset(self) -> int:
        return self.kv_len - self.q_len

    @property
    def first_row(self) -> int:
        """Query block of the first query."""
        return self.q_offset // self.block_q

    @property
    def rows(self) -> int:
        return -(-self.kv_len // self.block_q) - self.first_row

    @property
    def blocks(self) -> int:
        return -(-self.kv_len // self.block_k)

    def distance(self) -> Tensor:
        """int64 `[rows, blocks]`: key blocks before the first one of the query block's own tokens.

        0 and below are its own (or later), 1 is the one before, and so on.
        """
        ratio = self.block_q // self.block_k
        row = torch.arange(self.first_row, self.first_row + self.rows, device=self.device)
        return row[:, None] * ratio - torch.arange(self.blocks, device=self.device)

    def causal(self) -> Tensor:
        """bool `[rows, blocks]`: blocks that some row of the query block sees."""
        return self.distance() > -(self.block_q // self.block_k)

    def forced(self, sink_blocks: int, local_blocks: int) -> Tensor:
        """bool `[rows, blocks]`: the first blocks and the latest, a row's own included."""
        column = torch.arange(self.blocks, device=self.device)
        return self.causal() & ((column < sink_blocks) | (self.distance() < local_blocks))

    def last_rows(self, tokens: int) -> Tensor:
        """bool `[rows]`: query blocks that hold one of the last `tokens` rows."""
        row = torch.arange(self.first_row + 1, self.first_row + self.rows + 1, device=self.device)
        ends = (row * self.block_q).clamp(max=self.kv_len)
        return ends > self.kv_len - tokens


def mass_of(scores: Tensor, allowed: Tensor) -> Tensor:
    """Scores as shares of a row's mass: softmax over the allowed blocks, 0 elsewhere."""
    mass = scores.masked_fill(~allowed, _NEVER).softmax(-1)
    return mass.masked_fill(mass.isnan(), 0.0)  # rows without an allowed block


def count_top_p(
    mass: Tensor, forced: Tensor, gamma: float | Tensor, *, forced_first: bool = True
) -> Tensor:
    """Blocks per row until their mass reaches `gamma`, the one that reaches it included.

    Args:
        mass: `[lists, rows, blocks]`, 0 where a block is not visible; rows need not sum to 1:
            `gamma` is a share of their sum.
        gamma: a number, or `[lists, 1, 1]`.
        forced_first: the forced blocks' mass counts before any other; otherwise they are added to
            what the mass alone selects.
    """
    forced = forced.expand_as(mass)
    key = mass.masked_fill(forced, float("inf")) if forced_first else mass
    order = key.argsort(dim=-1, descending=True, stable=True)
    running = mass.gather(-1, order).double().cumsum(-1)
    target = running[..., -1:] * gamma
    # Includes the first block that reaches the target; float sums never pass their own total.
    before = torch.cat([torch.zeros_like(running[..., :1]), running[..., :-1]], -1)
    chosen = torch.zeros_like(forced).scatter_(-1, order, before < target)
    return (chosen | forced).sum(-1)


def count_threshold(scores: Tensor, allowed: Tensor, forced: Tensor, alpha: float) -> Tensor:
    """Blocks per row whose mass is at least `alpha` times the row's largest."""
    scores = scores.masked_fill(~allowed, _NEVER)
    above = (scores >= scores.amax(-1, keepdim=True) + math.log(alpha)) & allowed
    return (above | forced).sum(-1)


def count_global(mass: Tensor, allowed: Tensor, forced: Tensor, keep: float) -> Tensor:
    """Blocks per row when all rows of a list compete for a share `keep` of its causal blocks."""
    lists, rows, blocks = mass.shape
    allowed, forced = allowed.expand_as(mass), forced.expand_as(mass)
    n = (allowed.flatten(1).sum(-1) * keep).ceil().long()
    ranking = mass.masked_fill(forced, float("inf")).masked_fill(~allowed, -1.0).flatten(1)
    return (top_mask(ranking, n).view(lists, rows, blocks) & allowed | forced).sum(-1)


def reach(mass: Tensor, share: float | Tensor) -> Tensor:
    """int64 `[heads]`: size of the smallest top set of `mass [heads, n]` holding `share` of it.

    `share` is a number, or `[heads]`.
    """
    running = mass.sort(dim=-1, descending=True).values.double().cumsum(-1)
    target = (running[:, -1] * share)[:, None]
    return (running < target).sum(-1).clamp(max=mass.shape[-1] - 1) + 1


def mask_of(order: Tensor, count: Tensor) -> Tensor:
    """bool `[heads, rows, blocks]`: the first `count [heads, rows]` of each ranked row.

    `order` may have fewer lists than `count` has heads: heads then share a list.
    """
    kept = torch.arange(order.shape[-1], device=order.device) < count[..., None]
    mask = torch.zeros_like(kept)
    order = order[:, None].expand(-1, count.shape[0] // order.shape[0], -1, -1).flatten(0, 1)
    for lists in lists_at_once(mask):
        mask[lists].scatter_(-1, order[lists].long(), kept[lists])
    return mask


def ranking_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A ranking and counts for which `mask_of` gives `mask [heads, rows, blocks]`."""
    order = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return order.int(), mask.sum(-1)


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
