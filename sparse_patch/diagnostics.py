"""Recall: the share of attention that a plan keeps."""

from __future__ import annotations

import torch
from sparse_patch_kernels import BlockPlan
from torch import Tensor


def recall(
    q: Tensor,
    k: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    rows: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention mass kept: sum of the dense probabilities of the keys that the plan shows.

    Per row it is exp(log-sum-exp of visible logits - log-sum-exp of all causal ones). Works on one
    query block of one head at a time: memory is `[block_q, kv_len]`, time that of dense. Keys that
    enter only as part of a pooled group do not count as kept.

    Args:
        q: `[heads, q_len, dim]`.
        k: `[kv_heads, kv_len, dim]`.
        plan: the plan to judge.
        scale: factor on the logits; default `1 / sqrt(dim)`.
        rows: number of query rows to judge, in whole query blocks spread evenly; default: all.
        softcap: logits become `softcap * tanh(logits / softcap)`. (Sink logits change nothing:
            recall is a share of the keys' mass.)

    Returns:
        float32 `[heads]`, the mean over rows.
    """
    plan = plan.fit(q.shape[1], k.shape[1])
    n_blocks = plan.n_q_blocks if rows is None else max(1, rows // plan.block_q)
    stride = max(1, plan.n_q_blocks // n_blocks)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    # From the last block backwards: the answer depends on the end of the prompt.
    blocks = range(plan.n_q_blocks - 1, -1, -stride)
    group, per_list = q.shape[0] // k.shape[0], q.shape[0] // plan.heads
    total = torch.zeros(q.shape[0], device=q.device)
    n_rows = 0
    with torch.no_grad():
        for block in blocks:
            first, end = plan.row_range(block)
            n_rows += end - first
            queries = q[:, first - plan.q_offset : end - plan.q_offset].float() * scale
            for head in range(q.shape[0]):
                if head % per_list == 0:
                    visible = plan.block_mask(head // per_list, block)[:, :end]
                    row = torch.arange(first, end, device=q.device)[:, None]
                    causal = torch.arange(end, device=q.device) <= row
                scores = queries[head] @ k[head // group, :end].float().T
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                total_lse = scores.masked_fill(~causal, float("-inf")).logsumexp(-1)
                kept_lse = scores.masked_fill(~visible, float("-inf")).logsumexp(-1)
                total[head] += (kept_lse - total_lse).exp().sum()
    return total / n_rows
