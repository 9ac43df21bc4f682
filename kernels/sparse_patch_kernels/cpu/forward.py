"""The CPU backend: gather a query block's kept keys, then run real matrix products on them.

Work and memory follow the kept keys; nothing of size q_len x kv_len is ever built, and KV heads are
never repeated. `native`, a compiled kernel, does all of it where a compiler is at hand. Where
none is, and for float64, PyTorch does, in one of two ways:

* `_aligned`, for block lists on the diagonal grid (most methods): the diagonal blocks run as one
  batch of causal calls, and all else needs no mask. Both use PyTorch's own fused CPU kernel, which
  also returns the log-sum-exp that joins the two halves.
* `general`, for any other plan: explicit products and softmax, masked only where rows differ.

Pooled runs are computed apart, by `pooled`, and joined the same way.

PyTorch multiplies bf16 and fp16 inputs in float32; the compiled kernel multiplies bf16 as such
where the CPU can (AVX512-BF16).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..plan import BlockPlan
from .building import DTYPES
from .fused import attend_blocks, fused, join, pad_to
from .general import attend_any
from .native import attend
from .pooled import attend_pooled


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.block_sparse_attention`.

    The output's memory is laid out `[q_len, heads, v_dim]`, as the layer after attention wants it.
    """
    dtype, acc = q.dtype, torch.promote_types(q.dtype, torch.float32)
    pooled = [run for run in plan.runs if run.pool > 1]
    tokens = plan
    if pooled:
        tokens = dataclasses.replace(plan, runs=tuple(r for r in plan.runs if r.pool == 1))
    if dtype not in DTYPES:
        q, k, v = (x.to(acc) for x in (q, k, v))
    # Kernels read rows of neighbouring elements.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    done = attend(q, k, v, tokens, scale, softcap) if q.dtype in DTYPES else None
    if pooled or done is None:
        q, k, v = (x.to(acc) for x in (q, k, v))
    if done is None:
        # The fused kernel caps no logits.
        way = _aligned if softcap is None and _is_aligned(tokens) else None
        done = way(q, k, v, tokens, scale) if way else attend_any(q, k, v, tokens, scale, softcap)
    out, lse = done
    if pooled or sinks is not None:
        out = out.to(acc)
    for run in pooled:
        lse = join(out, lse, *attend_pooled(q, k, v, plan, run, scale, softcap))
    if sinks is not None:
        with_sinks = torch.logaddexp(lse, sinks.to(acc)[:, None])
        out.mul_((lse - with_sinks).exp_()[..., None])
        lse = with_sinks
    return out.to(dtype), lse


def _is_aligned(plan: BlockPlan) -> bool:
    """One list of blocks on the grid of the query blocks, each with the block of its own rows."""
    if len(plan.runs) != 1 or plan.sink or plan.window or plan.key_order is not None:
        return False
    run = plan.runs[0]
    if run.width != plan.block_q or plan.q_offset % plan.block_q or bool((run.count < 1).any()):
        return False
    start, count = run.expand(plan.heads)
    last = start.gather(2, count.long()[..., None] - 1)[..., 0]
    own = torch.arange(plan.n_q_blocks) * plan.block_q + plan.q_offset
    return bool((last == own).all()) and not bool((start % run.width)[run.valid(plan.heads)].any())


def _aligned(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    q_len, v_dim = q.shape[1], v.shape[2]
    block = plan.block_q
    dim = max(q.shape[2], v_dim)
    # Zeros to whole blocks and to one head size, as the fused kernel needs. No score changes: a
    # padded key comes after all real rows of the only block that lists it.
    q, k, v = (pad_to(x, -(-x.shape[1] // block) * block, dim) for x in (q, k, v))
    out, lse = _diagonal(q, k, v, plan, scale)
    (run,) = plan.runs
    start, count = run.expand(plan.heads)
    q, k, v = (x.reshape(x.shape[0], -1, block, dim) for x in (q, k, v))
    # The last entry of every list is the block's own: done.
    before = attend_blocks(q, k, v, start.long() // block, count.long() - 1, scale)
    lse = join(out, lse, *before)
    return out[:, :q_len, :v_dim], lse[:, :q_len]


def _diagonal(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Each query block against the keys at its own positions, causally."""
    heads, rows, dim = q.shape
    group, block = heads // k.shape[0], plan.block_q
    out = q.new_empty(rows, heads, dim).transpose(0, 1)
    lse = q.new_empty(heads, rows)
    for kv_head in range(k.shape[0]):
        mine = slice(kv_head * group, (kv_head + 1) * group)
        # One batch entry per block, one head per query head of the group.
        q_blocks = q[mine].reshape(group, -1, block, dim).transpose(0, 1)
        k_blocks, v_blocks = (
            x[kv_head, plan.q_offset :].reshape(-1, 1, block, dim).expand(-1, group, -1, -1)
            for x in (k, v)
        )
        part, part_lse = fused(q_blocks, k_blocks, v_blocks, scale, causal=True)
        out[mine] = part.transpose(0, 1).reshape(group, rows, dim)
        lse[mine] = part_lse.transpose(0, 1).reshape(group, rows)
    return out, lse
