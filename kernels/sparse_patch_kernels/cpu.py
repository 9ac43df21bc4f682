"""The CPU backend: gather a query block's kept keys, then run real matrix products on them.

Work and memory follow the kept keys; nothing of size q_len x kv_len is ever built, and KV heads are
never repeated. Two ways through:

* `_aligned`, for block lists on the diagonal grid (most methods): the diagonal blocks run as one
  batched causal call, and all else needs no mask. Both use PyTorch's own fused CPU kernel, which
  also returns the log-sum-exp that joins the two halves.
* `cpu_general`, for any other plan: explicit products and softmax, masked only where rows differ.

bf16 and fp16 inputs are multiplied in float32: most CPUs have no faster way, and the logits keep
their precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cpu_general import attend_any
from .plan import BlockPlan


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.block_sparse_attention`.

    The output's memory is laid out `[q_len, heads, v_dim]`, as the layer after attention wants it.
    """
    dtype, acc = q.dtype, torch.promote_types(q.dtype, torch.float32)
    run = _aligned if _is_aligned(plan) else attend_any
    # The fused kernel reads rows of neighbouring elements and does not check.
    q, k, v = (x.to(acc) if x.stride(-1) == 1 else x.to(acc).contiguous() for x in (q, k, v))
    out, lse = run(q, k, v, plan, scale)
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
    dim = v.shape[2]
    q, k, v = _same_dim(q, k, v)
    out, lse = _diagonal(q, k, v, plan, scale)
    (run,) = plan.runs
    start, count = run.expand(plan.heads)
    lists, kept = (start // run.width).long(), (count - 1).tolist()
    units = math.lcm(plan.heads, k.shape[0])
    # Whole blocks only: the ragged last one can be on the diagonal, but not before it.
    full = k.shape[1] // run.width * run.width
    blocks_k, blocks_v = (x[:, :full].reshape(len(x), -1, run.width, x.shape[2]) for x in (k, v))
    for unit in range(units):
        heads = slice(unit * q.shape[0] // units, (unit + 1) * q.shape[0] // units)
        listed, kv_head = unit * plan.heads // units, unit * k.shape[0] // units
        for block, n in enumerate(kept[listed]):
            if n == 0:
                continue
            rows = slice(block * plan.block_q, min((block + 1) * plan.block_q, q.shape[1]))
            index = lists[listed, block, :n]
            keys, values = _take_blocks(blocks_k[kv_head], blocks_v[kv_head], index)
            far, far_lse = _fused(q[heads, rows], keys, values, scale)
            _join(out[heads, rows], lse[heads, rows], far, far_lse)
    return out[..., :dim], lse


def _same_dim(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros that make head_dim and v_dim equal, as the fused kernel needs; no score changes."""
    dim = max(q.shape[2], v.shape[2])
    pad = torch.nn.functional.pad
    q, k, v = (x if x.shape[2] == dim else pad(x, (0, dim - x.shape[2])) for x in (q, k, v))
    return q, k, v


def _take_blocks(k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks `index` of `[blocks, width, dim]` as `[n * width, dim]`; views of neighbours."""
    first, last = int(index[0]), int(index[-1])
    if last - first + 1 == len(index):
        return k[first : last + 1].flatten(0, 1), v[first : last + 1].flatten(0, 1)
    return k.index_select(0, index).flatten(0, 1), v.index_select(0, index).flatten(0, 1)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """All of `q [heads, rows, dim]` against all of `k, v [n, dim]`."""
    k, v = k.expand(1, len(q), -1, -1), v.expand(1, len(q), -1, -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k, v, 0.0, False, scale=scale
    )
    return out[0], lse[0]


def _diagonal(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Each query block against the keys at its own positions, causally."""
    out = q.new_empty(q.shape[1], q.shape[0], v.shape[2]).transpose(0, 1)
    lse = q.new_empty(q.shape[:2])
    group, width, dim = q.shape[0] // k.shape[0], plan.block_q, v.shape[2]
    q_len = q.shape[1]
    whole = q_len // width * width
    for rows, size in ((slice(0, whole), width), (slice(whole, q_len), q_len - whole)):
        if rows.start == rows.stop:
            continue
        own = slice(plan.q_offset + rows.start, plan.q_offset + rows.stop)
        for kv_head in range(k.shape[0]):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            # One batch entry per block, one head per query head of the group.
            q_blocks = q[heads, rows].reshape(group, -1, size, dim).transpose(0, 1)
            k_blocks, v_blocks = (
                x[kv_head, own].view(-1, 1, size, dim).expand(-1, group, -1, -1) for x in (k, v)
            )
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_blocks, k_blocks, v_blocks, 0.0, True, scale=scale
            )
            out[heads, rows] = part.transpose(0, 1).reshape(group, -1, dim)
            lse[heads, rows] = part_lse.transpose(0, 1).reshape(group, -1)
    return out, lse


def _join(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Fold attention over other keys into `out` and `lse`, in place."""
    both = torch.logaddexp(lse, other_lse)
    out.mul_((lse - both).exp_()[..., None]).addcmul_(other, (other_lse - both).exp_()[..., None])
    lse.copy_(both)
