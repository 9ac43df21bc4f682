"""The reference: dense masked softmax from a plan, in float32. Slow, obvious, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .plan import BlockPlan

__all__ = ["block_sparse_attention"]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    *,
    acc: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T, over the keys and pooled keys the plan shows) v.

    Args:
        q: `[heads, q_len, dim]`.
        k, v: `[kv_heads, kv_len, dim]` and `[kv_heads, kv_len, v_dim]`.
        softcap: logits become `softcap * tanh(logits / softcap)`; a pooled key's log(pool) is added
            after that.
        sinks: `[heads]`, one extra logit per head, without a value.
        acc: compute in this dtype; default: q's, but float32 at least.

    Returns:
        Output `[heads, q_len, v_dim]` in q's dtype and log-sum-exp `[heads, q_len]` in
        `acc`. A row that sees no key gives 0 and -inf.
    """
    acc = acc or torch.promote_types(q.dtype, torch.float32)
    group, per_list = q.shape[0] // k.shape[0], q.shape[0] // plan.heads
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    lse = torch.empty(q.shape[:2], dtype=acc, device=q.device)
    for head in range(q.shape[0]):
        keys, values = k[head // group].to(acc), v[head // group].to(acc)
        for block in range(plan.n_q_blocks):
            first, end = plan.row_range(block)
            rows = slice(first - plan.q_offset, end - plan.q_offset)
            queries = q[head, rows].to(acc) * scale
            seen = plan.block_mask(head // per_list, block).to(q.device)
            logits = [_cap(queries @ keys.T, softcap).masked_fill(~seen, float("-inf"))]
            shown = [values]
            for run in plan.runs:
                if run.pool > 1:
                    groups = plan.pooled_keys(run, head // per_list, block)
                    position = torch.arange(first, end, device=q.device)[:, None]
                    late = groups.amax(1) > position
                    pooled = _cap(queries @ keys[groups].mean(1).T, softcap) + math.log(run.pool)
                    logits.append(pooled.masked_fill(late, float("-inf")))
                    shown.append(values[groups].mean(1))
            if sinks is not None:
                logits.append(sinks[head].to(acc).expand(len(queries), 1))
                shown.append(values.new_zeros(1, values.shape[1]))
            scores = torch.cat(logits, 1)
            # A fully masked row, a softmax of -inf only, gives 0 here, not NaN.
            blind = scores.isneginf().all(-1, keepdim=True)
            probs = scores.softmax(-1).masked_fill(blind, 0.0)
            out[head, rows] = (probs @ torch.cat(shown)).to(q.dtype)
            lse[head, rows] = scores.logsumexp(-1)
    return out, lse


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
