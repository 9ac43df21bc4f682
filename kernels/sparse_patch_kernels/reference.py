"""The truth: dense masked softmax from a plan, in float32. Slow, obvious, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import BlockPlan


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T, over the keys the plan shows) v.

    Args:
        q: `[heads, q_len, dim]`.
        k, v: `[kv_heads, kv_len, dim]` and `[kv_heads, kv_len, v_dim]`.

    Returns:
        Output `[heads, q_len, v_dim]` in q's dtype and log-sum-exp `[heads, q_len]` in float32
        (float64 for float64 input). A row that sees no key gives 0 and -inf.
    """
    acc = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[0] // k.shape[0]
    heads_per_list = q.shape[0] // plan.heads
    out, lse = [], []
    for list_index, mask in enumerate(plan.to_dense_mask()):
        for head in range(list_index * heads_per_list, (list_index + 1) * heads_per_list):
            keys, values = k[head // group].to(acc), v[head // group].to(acc)
            scores = (q[head].to(acc) @ keys.T * scale).masked_fill(~mask, float("-inf"))
            # A fully masked row is a softmax of -inf only: defined here as no output, not NaN.
            probs = scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
            out.append((probs @ values).to(q.dtype))
            lse.append(scores.logsumexp(-1))
    return torch.stack(out), torch.stack(lse)
