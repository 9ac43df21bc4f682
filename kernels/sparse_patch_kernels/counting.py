"""How many keys a plan keeps: what density is made of, and the test for overlaps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .runs import RunList

if TYPE_CHECKING:
    from .plan import BlockPlan


def kept_pairs(plan: BlockPlan) -> tuple[Tensor, float]:
    """Kept pairs float64 `[heads]` and causal ones, in (query block, key) pairs."""
    device = plan.runs[0].start.device if plan.runs else None
    last = plan.last_rows(device)
    tokens = [run for run in plan.runs if run.pool == 1]
    causal = int((last + 1).sum())
    if len(tokens) == 1 and not (plan.sink or plan.window or plan.key_order is not None):
        (run,) = tokens
        kept = run.counts(plan.heads).sum(-1) * run.width
        causal = int((last // run.width + 1).sum()) * run.width
    elif plan.key_order is None:
        kept = covered(plan, last, tokens, plan.sink, plan.window)
    elif not (plan.sink or plan.window):
        kept = _reordered(plan, last, tokens, plan.key_order)
    else:
        blocks = range(plan.n_q_blocks)
        rows = [[plan.block_mask(h, b).any(0).sum() for b in blocks] for h in range(plan.heads)]
        kept = torch.tensor(rows, device=device).sum(-1)
    for run in plan.runs:
        if run.pool > 1:
            kept = kept + _groups_seen(plan, last, run)
    return kept.double(), causal


def _groups_seen(plan: BlockPlan, last: Tensor, run: RunList) -> Tensor:
    """int64 `[heads]`: groups of a pooled list that some row sees, summed over query blocks."""
    if plan.key_order is not None:
        groups = RunList(run.start // run.pool, run.count, run.width // run.pool)
        return _reordered(plan, last, [groups], plan.group_ends(run.pool))
    start = run.expand(plan.heads)[0].long()
    length = torch.minimum(start + run.width, last[:, None] + 1) - start
    return (length // run.pool).masked_fill(~run.valid(plan.heads), 0).sum((-1, -2))


def _reordered(plan: BlockPlan, last: Tensor, runs: list[RunList], order: Tensor) -> Tensor:
    """int64 `[heads]`: slots of the runs that some row sees, summed over query blocks.

    `order [orders, slots]` is the position from which on each slot is visible.
    """
    n_slots = order.shape[1]
    order = order.repeat_interleave(plan.heads // order.shape[0], 0)
    kept = []
    for head in range(plan.heads):  # one at a time: the slots of all would take much room
        listed = torch.zeros(
            len(last), n_slots + 1, dtype=torch.bool, device=last.device
        )  # one slot more, for what a run names past the end
        for run in runs:
            block, slot = run.valid(plan.heads)[head].nonzero(as_tuple=True)
            start = run.expand(plan.heads)[0][head, block, slot].long()
            slots = start[:, None] + torch.arange(run.width, device=last.device)
            listed[block[:, None], slots.clamp(max=n_slots)] = True
        kept.append((listed[:, :-1] & (order[head] <= last[:, None])).sum())
    return torch.stack(kept)


def covered(
    plan: BlockPlan, last: Tensor, runs: Iterable[RunList], sink: int, window: int
) -> Tensor:
    """int64 `[heads]`: keys in the union of runs, sink and window, summed over query blocks."""
    heads, n_blocks = plan.heads, plan.n_q_blocks
    first = torch.arange(n_blocks, device=last.device) * plan.block_q + plan.q_offset
    begins = [torch.zeros_like(first)[None, :, None].expand(heads, -1, 1)]
    ends = [last.clamp(max=sink - 1)[None, :, None].expand(heads, -1, 1) + 1]
    if window:
        begins.append((first - window + 1).clamp(min=0)[None, :, None].expand(heads, -1, 1))
        ends.append(last[None, :, None].expand(heads, -1, 1) + 1)
    for run in runs:
        start = run.expand(heads)[0].long()
        end = torch.minimum(start + run.width, last[:, None] + 1)
        begins.append(start)
        ends.append(torch.where(run.valid(heads), end, start))
    begin, order = torch.cat(begins, -1).sort(dim=-1)
    end = torch.cat(ends, -1).gather(-1, order)
    reached = torch.cat([torch.zeros_like(end[..., :1]), end.cummax(-1).values[..., :-1]], -1)
    return (end - torch.maximum(begin, reached)).clamp(min=0).sum((-1, -2))
