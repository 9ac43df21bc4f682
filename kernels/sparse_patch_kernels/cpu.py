"""The CPU backend: gather a query block's kept keys, then run real matrix products on them.

Work and memory follow the kept keys; nothing of size q_len x kv_len is ever built, and KV heads are
never repeated. Two ways through:

* `_aligned`, for block lists on the diagonal grid (most methods): the diagonal blocks run as one
  batch of causal calls, and all else needs no mask. Both use PyTorch's own fused CPU kernel, which
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

# Elements of keys gathered at a time: 8 MiB in float32, about a share of the last-level cache.
_TILE = 1 << 21


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
    q_len, v_dim = q.shape[1], v.shape[2]
    block = plan.block_q
    dim = max(q.shape[2], v_dim)
    # Zeros to whole blocks and to one head size, as the fused kernel needs. No score changes: a
    # padded key comes after all real rows of the only block that lists it.
    q, k, v = (_pad_to(x, -(-x.shape[1] // block) * block, dim) for x in (q, k, v))
    out, lse = _diagonal(q, k, v, plan, scale)
    far, far_lse = _before_diagonal(q, k, v, plan, scale)
    both = torch.logaddexp(lse, far_lse)
    out.mul_((lse - both).exp_()[..., None]).addcmul_(far, (far_lse - both).exp_()[..., None])
    return out[:, :q_len, :v_dim], both[:, :q_len]


def _pad_to(x: Tensor, rows: int, dim: int) -> Tensor:
    if x.shape[1:] == (rows, dim):
        return x
    return torch.nn.functional.pad(x, (0, dim - x.shape[2], 0, rows - x.shape[1]))


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's own CPU attention: `[batch, heads, rows, dim]` in, the same and log-sum-exp out."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, scale=scale
    )
    return out, lse


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
        part, part_lse = _fused(q_blocks, k_blocks, v_blocks, scale, causal=True)
        out[mine] = part.transpose(0, 1).reshape(group, rows, dim)
        lse[mine] = part_lse.transpose(0, 1).reshape(group, rows)
    return out, lse


def _before_diagonal(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Each query block against the other blocks of its list, all of which lie in its past.

    Query blocks with lists of one length run together: few large calls keep both cores busy.
    """
    (run,) = plan.runs
    heads, rows, dim = q.shape
    kv_heads, block = k.shape[0], plan.block_q
    # A unit is a set of neighbouring query heads with one list and one KV head.
    units = math.lcm(plan.heads, kv_heads)
    start, count = run.expand(plan.heads)
    unit = torch.arange(units)
    list_of, kv_head = unit * plan.heads // units, unit * kv_heads // units
    n_before = (count.long() - 1)[list_of]
    # Row `kv_head * blocks + block` of these is one block of one KV head.
    blocks_k, blocks_v = (x.reshape(-1, block * dim) for x in (k, v))
    lists = (start // block).long()[list_of] + (kv_head * (k.shape[1] // block))[:, None, None]
    queries = q.reshape(units, -1, rows // block, block, dim)
    out = q.new_zeros(rows, heads, dim)
    lse = q.new_full((heads, rows), float("-inf"))
    out_blocks = out.view(rows // block, block, units, -1, dim)
    lse_blocks = lse.view(units, -1, rows // block, block)
    for n in sorted(set(n_before.flatten().tolist()) - {0}):
        entries = (n_before == n).nonzero()
        for u, b in (part.unbind(1) for part in entries.split(max(1, _TILE // (n * block * dim)))):
            index = lists[u, b, :n].flatten()
            keys, values = (
                x.index_select(0, index).view(len(u), 1, n * block, dim)
                for x in (blocks_k, blocks_v)
            )
            mine = queries[u, :, b]
            shape = (-1, mine.shape[1], -1, -1)
            part, part_lse = _fused(mine, keys.expand(shape), values.expand(shape), scale, False)
            out_blocks[b, :, u] = part.transpose(1, 2)
            lse_blocks[u, :, b] = part_lse
    return out.transpose(0, 1), lse
