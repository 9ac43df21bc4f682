"""The pooled part of a plan on the CPU: means of neighbouring keys and values, attended like keys.

Every KV head is averaged once for all rows. Then there are two ways:

* `_gathered`, for lists of fewer than half of the past, all before their query block (a pyramid's
  levels): each query block gathers the pooled keys of its runs.
* `_masked`, for any other list, above all those of most of the past (rectification): every row
  against every pooled key in large products, a tile of rows at a time, and what is not listed
  hidden.

log(pool) is the same for all groups of a list, so it only enters the log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..plan import BlockPlan
from ..runs import RunList
from .fused import attend_blocks, pad_to
from .general import attend_seen

# Scores of one head in `_masked`, in elements: 1 MiB in float32. Small tiles also waste little on
# groups in the future of their first rows.
_TILE = 1 << 18


def attend_pooled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    run: RunList,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the groups of one pooled list of `plan`, and nothing else.

    Args:
        q: `[heads, q_len, dim]`, float32 or float64.
        k, v: `[kv_heads, kv_len, dim]` and `[kv_heads, kv_len, v_dim]`.

    Returns:
        `[heads, q_len, v_dim]` and log-sum-exp `[heads, q_len]`; 0 and -inf where nothing is seen.
    """
    if softcap is None and _is_sparse_past(plan, run):
        out, lse = _gathered(q, k, v, plan, run, scale)
    else:
        out, lse = _masked(q, k, v, plan, run, scale, softcap)
    return out, lse.add_(math.log(run.pool))


def _is_sparse_past(plan: BlockPlan, run: RunList) -> bool:
    """Fewer than half of what comes before each query block, in whole blocks of the run's width?"""
    if plan.key_order is not None:
        return False
    first = torch.arange(plan.n_q_blocks) * plan.block_q + plan.q_offset
    start, valid = run.expand(run.heads)[0].long(), run.valid(run.heads)
    past = (start % run.width == 0) & (start + run.width <= first[:, None])
    few = 2 * int(run.counts(run.heads).sum()) * run.width < int(first.sum()) * run.heads
    return few and bool(past[valid].all())


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, run: RunList, scale: float
) -> tuple[Tensor, Tensor]:
    heads, q_len, _ = q.shape
    kv_heads, kv_len, v_dim = v.shape
    dim = max(q.shape[2], v_dim)
    n_blocks, per_run = kv_len // run.width, run.width // run.pool
    q = pad_to(q, plan.n_q_blocks * plan.block_q, dim)
    k, v = (_means(x[:, : n_blocks * run.width], run.pool) for x in (k, v))
    k, v = (pad_to(x, x.shape[1], dim) for x in (k, v))
    out, lse = attend_blocks(
        q.reshape(heads, -1, plan.block_q, dim),
        k.reshape(kv_heads, n_blocks, per_run, dim),
        v.reshape(kv_heads, n_blocks, per_run, dim),
        run.expand(run.heads)[0].long() // run.width,
        run.counts(run.heads).long(),
        scale,
    )
    return out[:, :q_len, :v_dim], lse[:, :q_len]


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    run: RunList,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    heads, kv_heads = q.shape[0], k.shape[0]
    out = q.new_zeros(q.shape[1], heads, v.shape[2]).transpose(0, 1)
    lse = q.new_full(q.shape[:2], float("-inf"))
    start, valid = run.expand(run.heads)[0], run.valid(run.heads)
    ends = plan.group_ends(run.pool)
    # Means depend on the KV head and the order, lists on the query head besides.
    pairs = math.lcm(kv_heads, ends.shape[0])
    units = math.lcm(pairs, run.heads)
    for pair in range(pairs):
        kv_head, order = pair * kv_heads // pairs, pair * ends.shape[0] // pairs
        keys, values = k[kv_head], v[kv_head]
        if plan.key_order is not None:
            keys, values = (x[plan.key_order[order].long()] for x in (keys, values))
        keys, values = _means(keys, run.pool), _means(values, run.pool)
        for unit in range(pair * units // pairs, (pair + 1) * units // pairs):
            mine = unit * run.heads // units
            for rows, hidden in _row_tiles(plan, run, start[mine], valid[mine], ends[order]):
                for head in range(unit * heads // units, (unit + 1) * heads // units):
                    out[head, rows], lse[head, rows] = _attend_shown(
                        q[head : head + 1, rows] * scale, keys, values, hidden, softcap
                    )
    return out, lse


def _row_tiles(
    plan: BlockPlan, run: RunList, start: Tensor, valid: Tensor, ends: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Query rows, a few blocks at a time, and bool `[rows, groups]`: which groups they do not see.

    Tiles that see no group are left out, and so are groups past the last one that a tile sees.
    """
    n_groups = len(ends)
    step = max(1, _TILE // (plan.block_q * max(1, n_groups)))
    last = plan.last_rows()
    offsets = torch.arange(run.width // run.pool)
    for block in range(0, plan.n_q_blocks, step):
        mine = slice(block, block + step)
        groups = (start[mine] // run.pool).long()[..., None] + offsets
        # One group more, for padding and for what a run names past the end.
        groups = groups.masked_fill(~valid[mine][..., None], n_groups).clamp(max=n_groups)
        listed = torch.zeros(len(groups), n_groups + 1, dtype=torch.bool)
        listed.scatter_(1, groups.flatten(1), True)
        used = (listed[:, :-1] & (ends <= last[mine][:, None])).any(0).nonzero()
        if used.numel():
            n = int(used[-1]) + 1
            rows = slice(block * plan.block_q, min((block + step) * plan.block_q, plan.q_len))
            position = torch.arange(rows.start, rows.stop) + plan.q_offset
            seen = listed[:, :n].repeat_interleave(plan.block_q, 0)[: len(position)]
            yield rows, ~seen | (ends[:n] > position[:, None])


def _attend_shown(
    queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    def hide(scores: Tensor) -> None:
        scores.masked_fill_(hidden, float("-inf"))

    n = hidden.shape[1]
    return attend_seen(queries, keys[:n], values[:n], hide, softcap)


def _means(x: Tensor, pool: int) -> Tensor:
    """Mean of each `pool` rows: `[..., n, dim]` -> `[..., n // pool, dim]`; a short end drops."""
    whole = x.shape[-2] // pool
    return x[..., : whole * pool, :].reshape(*x.shape[:-2], whole, pool, x.shape[-1]).mean(-2)
