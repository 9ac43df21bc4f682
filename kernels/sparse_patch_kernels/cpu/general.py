"""The CPU backend for any plan: gathered keys, explicit products and softmax.

Rows of a query block are masked only where they differ: at keys after its first row, and at the
window's edge. Query heads that share a list and a KV head run as one taller product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..plan import BlockPlan

# Scores of one product, in elements: 16 MiB in float32, so that they stay near the caches.
_MAX_TILE = 1 << 22


def attend_any(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.block_sparse_attention`, for float32 and float64 input."""
    heads, q_len, _ = q.shape
    out = q.new_empty(q_len, heads, v.shape[2]).transpose(0, 1)
    lse = q.new_empty(heads, q_len)
    # A unit is a set of neighbouring query heads with one list and one KV head.
    units = math.lcm(plan.heads, k.shape[0])
    for head in range(plan.heads):
        pick = _KeyPicker(plan, head)
        for block in range(plan.n_q_blocks):
            picked = pick(block)
            rows = slice(block * plan.block_q, min((block + 1) * plan.block_q, q_len))
            for unit in range(head * units // plan.heads, (head + 1) * units // plan.heads):
                kv_head = unit * k.shape[0] // units
                keys, values = picked.take(k[kv_head]), picked.take(v[kv_head])
                unit_heads = range(unit * heads // units, (unit + 1) * heads // units)
                for tile in _tiles(unit_heads, (rows.stop - rows.start) * len(keys)):
                    queries = q[tile, rows] * scale
                    out[tile, rows], lse[tile, rows] = attend_seen(
                        queries, keys, values, picked.hide, softcap
                    )
    return out, lse


def _tiles(heads: range, scores_per_head: int) -> Iterator[slice]:
    """Slices of `heads` whose scores fit a tile together."""
    step = max(1, _MAX_TILE // max(1, scores_per_head))
    for first in range(heads.start, heads.stop, step):
        yield slice(first, min(first + step, heads.stop))


def attend_seen(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    hide: Callable[[Tensor], object],
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over gathered keys, with explicit products.

    Args:
        queries: `[heads, rows, dim]`, scaled.
        keys, values: `[n, dim]` and `[n, v_dim]`.
        softcap: see `reference.block_sparse_attention`.
        hide: writes -inf into scores `[heads, rows, n]` where the row must not see the key.

    Returns:
        `[heads, rows, v_dim]` and log-sum-exp `[heads, rows]`; 0 and -inf where nothing is seen.
    """
    heads, rows, dim = queries.shape
    if len(keys) == 0:
        lse = queries.new_full((heads, rows), float("-inf"))
        return queries.new_zeros(heads, rows, values.shape[1]), lse
    scores = (queries.reshape(-1, dim) @ keys.T).view(heads, rows, -1)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    hide(scores)
    # The lowest finite number instead of -inf keeps -inf minus the maximum at -inf, not NaN.
    top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    probs = scores.sub_(top).exp_()
    total = probs.sum(-1, keepdim=True)
    out = (probs.view(heads * rows, -1) @ values).view(heads, rows, -1)
    lse = (top + total.log()).squeeze(-1)
    return out.div_(total.masked_fill_(total == 0, 1.0)), lse


class _KeyPicker:
    """The keys that the query blocks of one head need: `picker(block) -> _Picked`."""

    def __init__(self, plan: BlockPlan, head: int) -> None:
        self.plan, self.head = plan, head
        run = plan.runs[0] if len(plan.runs) == 1 else None
        # One list and nothing else, the common case: its runs are the keys, or slots of keys.
        self.run = None if plan.sink or plan.window else run
        self.order: Tensor | None = None
        if plan.key_order is not None:
            self.order = plan.key_order[head * len(plan.key_order) // plan.heads].long()
        if self.run is not None:
            start, count = self.run.expand(plan.heads)
            self.start, self.count = start[head].long(), count[head].tolist()
            self.offsets = torch.arange(self.run.width)

    def __call__(self, block: int) -> _Picked:
        first, end = self.plan.row_range(block)
        if self.run is not None:
            runs = self.start[block, : self.count[block]]
            keys = (runs[:, None] + self.offsets).flatten()
            if self.order is not None:
                keys = self.order[keys[keys < self.plan.kv_len]].sort().values
            return _Picked(keys[: int(torch.searchsorted(keys, end))], first, end)
        sink, window = self.plan.sink, self.plan.window
        listed = self.plan.listed_keys(self.head, block)[:end]
        seen = listed.clone()
        seen[:sink] = True
        if window:
            seen[max(0, first - window + 1) :] = True
        keys = seen.nonzero()[:, 0]
        only_near = ~listed[keys] & (keys >= sink)
        return _Picked(keys, first, end, only_near, window)


class _Picked:
    """Keys of one query block (ascending) and which of its rows may see them."""

    def __init__(
        self,
        keys: Tensor,
        first: int,
        end: int,
        only_near: Tensor | None = None,
        window: int = 0,
    ) -> None:
        self.keys, self.rows = keys, torch.arange(first, end)[:, None]
        self.only_near, self.window = only_near, window
        # Keys after the first row: the only ones that need the causal test.
        self.tail = int(torch.searchsorted(keys, first, right=True))
        n = keys.numel()
        self.one_piece = n > 0 and int(keys[-1]) - int(keys[0]) + 1 == n

    def take(self, x: Tensor) -> Tensor:
        """Rows `keys` of `x [kv_len, dim]`; a view when they are neighbours."""
        if self.one_piece:
            return x[int(self.keys[0]) : int(self.keys[-1]) + 1]
        return x.index_select(0, self.keys)

    def hide(self, scores: Tensor) -> None:
        """Write -inf into `scores [heads, rows, keys]` where the row must not see the key."""
        hidden = self.keys[self.tail :] > self.rows
        scores[..., self.tail :].masked_fill_(hidden, float("-inf"))
        if self.only_near is None:
            return
        # Keys here for the window alone, and out of it for the block's later rows.
        far = self.only_near & (self.keys <= self.rows[-1] - self.window)
        where = far.nonzero()
        if where.numel():
            edge = slice(int(where[0]), int(where[-1]) + 1)
            gone = far[edge] & (self.rows - self.keys[edge] >= self.window)
            scores[..., edge].masked_fill_(gone, float("-inf"))
