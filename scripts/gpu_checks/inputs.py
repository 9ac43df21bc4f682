"""Queries and keys that are like a model's, plans of a given density, and what errors may be."""

from __future__ import annotations

import math

import torch
from sparse_patch_kernels import BlockPlan, RunList
from torch import Tensor

from gpu_checks.device import Device

# Logits fall with the logarithm of the distance, as RoPE makes them for heads that look at what is
# near: by so much per unit of the line below, from the first head to the last. With noise of
# standard deviation 1, methods then keep 10 to 60 % of 16k tokens at their defaults, head by head.
STRENGTHS = (2.0, 6.0)
ROPE_BASE = 5e5


def queries(device: Device, heads: int, n: int, dim: int, *, end: int, seed: int) -> Tensor:
    """float32 `[heads, n, dim]`, the last rows of `end` positions."""
    strength = torch.linspace(*STRENGTHS, heads, device=device.torch)[:, None, None]
    return device.randn(heads, n, dim, seed=seed) + strength * _line(device, end, dim)[end - n :]


def keys(device: Device, heads: int, n: int, dim: int, *, seed: int) -> Tensor:
    """float32 `[heads, n, dim]`."""
    return device.randn(heads, n, dim, seed=seed) + _line(device, n, dim)


def _line(device: Device, n: int, dim: int) -> Tensor:
    """`[n, dim]`: vectors whose products fall with the logarithm of their distance."""
    half = torch.arange(dim // 2, device=device.torch) / (dim // 2)
    angle = torch.arange(n, device=device.torch)[:, None] * ROPE_BASE**-half
    return torch.cat([angle.cos(), angle.sin()], 1)


def plan_of_density(device: Device, heads: int, n: int, block: int, density: float) -> BlockPlan:
    """Block 0, the diagonal and others at random, in every row the same share of what it may see.

    Lists have room for all blocks, so that every density runs the same kernel.
    """
    blocks = -(-n // block)
    row = torch.arange(blocks, device=device.torch)
    worth = torch.rand(
        heads, blocks, blocks, device=device.torch, generator=device.generator(blocks)
    )
    worth[:, :, 0] = worth[:, row, row] = 2
    worth.masked_fill_(row > row[:, None], -1)
    count = ((row + 1) * density).round().clamp(min=1, max=blocks).long()
    order = worth.argsort(-1, descending=True)
    kept = torch.where(row < count[:, None], order, blocks).sort(-1).values
    start = (kept * block).masked_fill_(kept == blocks, 0).to(torch.int32)
    # With one block, a row keeps its diagonal: no row may see nothing.
    start[:, count == 1, 0] = (row * block).to(torch.int32)[count == 1]
    runs = RunList(start, count.to(torch.int32).expand(heads, -1).contiguous(), block)
    return BlockPlan(n, n, block, (runs,))


def rounding(dtype: torch.dtype) -> float:
    """Half the distance of numbers around 1: what rounding to `dtype` may change at most."""
    return torch.finfo(dtype).eps / 2


# Sums and exponentials in float32 add up to so much, of logits of up to 64: their rounding errors,
# 2^-24 each, times a few products a logit and as much again for exp2 and the running maximum.
FLOAT32 = 2**-14


def allowed(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error that rounding explains, for each output of an attention kernel.

    Weights are rounded to `dtype` before they meet the values, and so is the output at the end:
    that is at most half a step each, of the weighted mean of |v|. No kernel may be worse by more
    than what float32 leaves, and none that is wrong about a key is as good.

    Args:
        size: weighted means of |v|, same shape as the output.
    """
    low = 0.0 if dtype == torch.float32 else 2 * rounding(dtype)
    # Small weights vanish in float16, where numbers end at 6e-8: that is absolute.
    return low * size + FLOAT32 * (size + size.max())


def allowed_of_means(q: Tensor, k: Tensor, size: Tensor, scale: float) -> tuple[float, Tensor]:
    """What more than `allowed` there may be where a plan pools.

    Means of keys and values are rounded too, which moves logits.

    Returns:
        By how much logits move at most, and what that allows each output.
    """
    group = q.shape[0] // k.shape[0]
    largest = (q.abs().float() @ k.abs().float().repeat_interleave(group, 0).mT).max()
    moved = rounding(q.dtype) * scale * float(largest)
    return moved, (math.expm1(2 * moved) + rounding(q.dtype)) * size


def sampled_error(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, out: Tensor
) -> tuple[float, float]:
    """The largest error of `out` in a few query blocks of a few heads, and in units of `allowed`.

    Masks come from the plan, products are in float64; no pooled lists.
    """
    (heads, _, dim), blocks = q.shape, plan.n_q_blocks
    worst, share = 0.0, 0.0
    for head in sorted({0, heads // 2, heads - 1}):
        kv_head = head * k.shape[0] // heads
        keys, values = k[kv_head].double(), v[kv_head].double()
        for block in sorted({0, blocks // 2, blocks - 1}):
            first, end = (position - plan.q_offset for position in plan.row_range(block))
            seen = plan.block_mask(head * plan.heads // heads, block)
            logits = q[head, first:end].double() @ keys.T / math.sqrt(dim)
            probs = logits.masked_fill_(~seen, float("-inf")).softmax(-1)
            error = (out[head, first:end].double() - probs @ values).abs()
            worst = max(worst, float(error.max()))
            share = max(share, float((error / allowed(probs @ values.abs(), q.dtype)).max()))
            if not bool(torch.isfinite(error).all()):  # max() of a NaN may be anything
                return math.inf, math.inf
    return worst, share
