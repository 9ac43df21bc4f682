"""Density, recall and output error of a plan on one layer's q, k and v."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sparse_patch_kernels import block_sparse_attention
from torch import Tensor

import sparse_patch
from sparse_patch import BlockPlan, Method
from sparse_patch_eval.ask.capture import Attention

__all__ = ["Judged", "dense_output", "judge", "output_error", "plan_of", "sampled_blocks"]


def plan_of(method: Method, layer: int, attention: Attention) -> BlockPlan | None:
    """The plan for a layer of a whole prompt; None where patch would run exact attention."""
    if layer < method.dense_layers:
        return None
    q, k = attention.q, attention.k
    q_offset = k.shape[1] - q.shape[1]
    return method.for_layer(layer).plan(q, k, scale=attention.scale, q_offset=q_offset)


@dataclass(frozen=True)
class Judged:
    """A plan on the judged rows.

    Attributes:
        density: kept / causal (query block, key) pairs of those rows; a pooled group is one key.
        recall: attention mass kept, per query head.
    """

    density: float
    recall: tuple[float, ...]


def judge(attention: Attention, plan: BlockPlan | None, *, rows: int | None = None) -> Judged:
    """Density and recall on the rows that `sparse_patch.recall(rows=rows)` judges."""
    if plan is None:
        return Judged(1.0, (1.0,) * attention.q.shape[0])
    recall = sparse_patch.recall(attention.q, attention.k, plan, scale=attention.scale, rows=rows)
    kept = causal = 0
    for block in sampled_blocks(plan.n_q_blocks, plan.block_q, rows):
        for head in range(plan.heads):
            kept += int(plan.block_mask(head, block).any(0).sum())
            kept += sum(
                plan.pooled_keys(run, head, block).shape[0] for run in plan.runs if run.pool > 1
            )
            causal += plan.row_range(block)[1]
    return Judged(kept / causal, tuple(recall.tolist()))


def sampled_blocks(n_blocks: int, block_q: int, rows: int | None) -> list[int]:
    """The query blocks that `sparse_patch.recall(rows=rows)` judges, last first."""
    count = n_blocks if rows is None else max(1, rows // block_q)
    return list(range(n_blocks - 1, -1, -max(1, n_blocks // count)))


def dense_output(attention: Attention) -> Tensor:
    """Exact causal attention, `[heads, length, v_dim]`."""
    q, k, v = (x[None] for x in (attention.q, attention.k, attention.v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=attention.scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0]


def output_error(attention: Attention, plan: BlockPlan | None, dense: Tensor) -> float:
    """Relative error of the attention output: |sparse - dense| / |dense|, mean over heads.

    Args:
        dense: the result of `dense_output`.
    """
    if plan is None:
        return 0.0
    q, k, v = attention.q, attention.k, attention.v
    sparse = block_sparse_attention(q, k, v, plan, scale=attention.scale)
    norms = torch.linalg.vector_norm((sparse - dense).float(), dim=(1, 2))
    return float((norms / torch.linalg.vector_norm(dense.float(), dim=(1, 2))).mean())
