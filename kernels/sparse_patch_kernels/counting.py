"""Numbers of keys that a plan keeps, for its density and the check for overlaps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .plan_layout import PlanLayout
from .runs import RunList

# Elements of the largest table that counting builds (64 MiB of int32).
_MOST_COUNTS = 1 << 24


def kept_pairs(plan: PlanLayout) -> tuple[Tensor, float]:
    """Kept pairs float64 `[heads]` and causal ones, in (query block, key) pairs."""
    device = plan.runs[0].start.device if plan.runs else None
    last = plan.last_rows(device)
    tokens = [run for run in plan.runs if run.pool == 1]
    ends = plan.last_rows() + 1  # on the CPU: reading a GPU's would wait for it
    causal = int(ends.sum())
    if len(tokens) == 1 and not (plan.sink or plan.window or plan.key_order is not None):
        (run,) = tokens
        kept = run.counts(plan.heads).sum(-1) * run.width
        causal = int(((ends - 1) // run.width + 1).sum()) * run.width
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


def _groups_seen(plan: PlanLayout, last: Tensor, run: RunList) -> Tensor:
    """int64 `[heads]`: groups of a pooled list that some row sees, summed over query blocks."""
    if plan.key_order is not None:
        groups = RunList(
            run.start // run.pool, run.count, run.width // run.pool, on_grid=run.on_grid
        )
        return _reordered(plan, last, [groups], plan.group_ends(run.pool))
    start = run.expand(plan.heads)[0].long()
    length = torch.minimum(start + run.width, last[:, None] + 1) - start
    return (length // run.pool).masked_fill(~run.valid(plan.heads), 0).sum((-1, -2))


def _reordered(plan: PlanLayout, last: Tensor, runs: list[RunList], order: Tensor) -> Tensor:
    """int64 `[heads]`: slots of the runs that some row sees, summed over query blocks.

    `order [orders, slots]` is the position from which on each slot is visible.
    """
    if len(runs) == 1 and runs[0].on_grid:
        return _reordered_on_grid(plan, last, runs[0], order)
    n_slots = order.shape[1]
    order = order.repeat_interleave(plan.heads // order.shape[0], 0)
    kept = []
    for head in range(plan.heads):  # one at a time, to save memory
        listed = torch.zeros(
            len(last), n_slots + 1, dtype=torch.bool, device=last.device
        )  # one extra slot, for run entries past the end
        for run in runs:
            block, slot = run.valid(plan.heads)[head].nonzero(as_tuple=True)
            start = run.expand(plan.heads)[0][head, block, slot].long()
            slots = start[:, None] + torch.arange(run.width, device=last.device)
            listed[block[:, None], slots.clamp(max=n_slots)] = True
        kept.append((listed[:, :-1] & (order[head] <= last[:, None])).sum())
    return torch.stack(kept)


def _reordered_on_grid(plan: PlanLayout, last: Tensor, run: RunList, order: Tensor) -> Tensor:
    """`_reordered` of one list whose runs lie on the grid of their width."""
    heads, width = plan.heads, run.width
    # The padding of the last run is after every row.
    slots = torch.nn.functional.pad(order, (0, -order.shape[1] % width), value=plan.kv_len)
    ranked = slots.view(len(order), -1, width).sort(dim=-1).values
    limit = last.to(order.dtype)
    step = max(1, _MOST_COUNTS // (ranked.shape[1] * len(last)))
    kept = []
    for first in range(0, heads, step):
        head = torch.arange(first, min(first + step, heads), device=last.device)
        sorted_slots = ranked[head * len(order) // heads]
        # Number of slots of each run that the last row of each query block sees.
        visible = torch.searchsorted(
            sorted_slots,
            limit.expand(*sorted_slots.shape[:2], -1).contiguous(),
            right=True,
            out_int32=True,
        ).mT
        count = run.count[head * run.count.shape[0] // heads]
        listed = run.start[head * run.start.shape[0] // heads].long() // width
        held = torch.arange(listed.shape[2], device=last.device) < count[..., None]
        kept.append(visible.gather(2, listed).masked_fill_(~held, 0).sum((-1, -2)))
    return torch.cat(kept)


def covered(
    plan: PlanLayout, last: Tensor, runs: Iterable[RunList], sink: int, window: int
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
