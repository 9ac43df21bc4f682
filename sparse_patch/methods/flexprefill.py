"""FlexPrefill: per head, either vertical and slash lines or a query-aware block map.

The last `block_size` queries probe all keys. Their attention gives the mass of each key (vertical
lines) and of each distance (slash lines). If block-pooled attention agrees with the probe
(Jensen-Shannon distance < tau), blocks are taken from the pooled map until `gamma` of its mass is
in; otherwise the lines that carry `gamma` of the probe's mass are kept, whole blocks at a time.

Source: FlexPrefill (arXiv:2502.20766, ICLR 2025); parameters and every detail of
`variant="released"` follow the authors' code (bytedance/FlexPrefill), where it and the paper differ
too. By default two slips of it are repaired: budgets are counted in blocks of `block_size`, not of
a literal 128, and the probe uses the scale of the model, not always 1/sqrt(dim). With blocks of 128
and the usual scale, both select the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from sparse_patch_kernels import BlockPlan
from sparse_patch_kernels.estimators.pooling import pool_mean, pool_sum
from sparse_patch_kernels.estimators.probe import probe_lines
from sparse_patch_kernels.estimators.threshold import largest_within
from torch import Tensor

from ..registry import Examples, Knob, Method, check_sequence, param, register
from ..selection import cover, to_query_grid, top_mask


@register("flexprefill")
@dataclass(frozen=True)
class FlexPrefill(Method):
    """Vertical-slash or query-aware blocks, chosen per head by a probe of the last queries."""

    source: ClassVar[str] = "arXiv:2502.20766"
    examples: ClassVar[Examples] = {
        "sparse": {"block_size": 16, "min_budget": 1, "gamma": 0.5},
        "everything": {"gamma": 1.0},
    }
    knob: ClassVar[Knob | None] = Knob.share("gamma", min_budget=128)

    gamma: float = param(0.9, "share of the estimated attention mass to keep", above=0, upto=1)
    tau: float = param(
        0.1, "heads below this distance are query-aware; 0: none, from 0.833: all", least=0
    )
    min_budget: int = param(1024, "minimum tokens of vertical lines, and of slash lines", least=1)
    max_budget: int | None = param(
        None, "maximum tokens of vertical lines, and of slash lines", least=1, kind=int
    )
    block_size: int = param(128, "tokens per block", choices=(16, 32, 64, 128))
    variant: str = param(
        "corrected",
        "released: as the authors' code; corrected: its slips repaired",
        choices=("released", "corrected"),
    )

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """Method.plan; None up to `max(2 * block_size, min_budget)` keys, for chunks shorter than a
        block, and for gamma = 1, which keeps all."""
        check_sequence(q, k, q_offset)
        q_len, kv_len, block = q.shape[1], k.shape[1], self.block_size
        least_blocks = -(-self.min_budget // block)
        if kv_len <= max(2, least_blocks) * block or q_len < block or self.gamma == 1:
            return None
        if self.variant == "released":
            scale = 1.0 / math.sqrt(q.shape[2])
        vertical, slash = probe_lines(q[:, q_len - block :], k, scale)
        n_vertical, n_slash = self._budget(vertical), self._budget(slash)
        vertical, slash = pool_sum(vertical, block), pool_sum(slash, block)
        pooled_k = pool_mean(k, block)
        aware = self._is_query_aware(q[:, q_len - block :], pooled_k, vertical, scale)
        n_vertical = n_vertical.masked_fill(aware, least_blocks)
        n_slash = n_slash.masked_fill(aware, least_blocks)
        first_row_block = q_offset // block
        mask = _line_blocks(vertical, slash, n_vertical, n_slash, first_row_block)
        keys = pooled_k.repeat_interleave(q.shape[0] // k.shape[0], 0)
        if q.device.type == "cpu":
            heads = aware.nonzero()[:, 0]
            if len(heads):
                pooled_q = pool_mean(q[heads], block, q_offset)
                maps = _map_blocks(pooled_q, keys[heads], scale, self.gamma, first_row_block)
                mask[heads] |= maps
        else:  # to ask which heads need a map would take longer than a map of all
            pooled_q = pool_mean(q, block, q_offset)
            maps = _map_blocks(pooled_q, keys, scale, self.gamma, first_row_block)
            mask |= maps & aware[:, None, None]
        mask = to_query_grid(mask, q_len, q_offset, block)
        return BlockPlan.from_block_mask(
            mask, block_q=block, block_k=block, q_len=q_len, kv_len=kv_len
        )

    def _budget(self, line_mass: Tensor) -> Tensor:
        """int64 `[heads]`: lines that cover gamma of `line_mass [heads, kv_len]`, in blocks."""
        unit = 128 if self.variant == "released" else self.block_size
        n_blocks = -(-line_mass.shape[-1] // self.block_size)
        least = -(-self.min_budget // self.block_size)
        most = n_blocks
        if self.max_budget is not None:
            most = min(n_blocks, -(-self.max_budget // self.block_size))
        # In this order: where the two bounds cross, the maximum wins.
        return (cover(line_mass, self.gamma) // unit + 1).clamp(min=least).clamp(max=most)

    def _is_query_aware(
        self, probe: Tensor, pooled_k: Tensor, vertical: Tensor, scale: float
    ) -> Tensor:
        """bool `[heads]`: does pooled attention agree with the probe?

        Jensen-Shannon distance (natural log, square root) of softmax(mean(q) . mean(k)) and the
        blocks' true mass. A block whose mass is exactly 0 makes it NaN, and NaN < tau is false:
        the authors' code works that way, so no epsilon and no xlogy here.
        """
        mean_q = (probe.float() * scale).mean(1)
        pooled_k = pooled_k.repeat_interleave(probe.shape[0] // pooled_k.shape[0], 0)
        estimate = (pooled_k @ mean_q[..., None]).squeeze(-1).softmax(-1)
        middle = (estimate + vertical) / 2
        divergence = estimate * (estimate / middle).log() + vertical * (vertical / middle).log()
        return (divergence.sum(-1) / 2).sqrt() < self.tau


def _line_blocks(
    vertical: Tensor, slash: Tensor, n_vertical: Tensor, n_slash: Tensor, first_row: int
) -> Tensor:
    """bool `[heads, rows, blocks]`: the best columns and block diagonals of each head.

    `vertical`, `slash`: `[heads, blocks]` mass per key block and per group of distances, farthest
    first. The first column and the main diagonal are always in. `first_row` is the block of the
    first query.
    """
    column = torch.arange(vertical.shape[-1], device=vertical.device)
    columns = top_mask(vertical.masked_fill(column == 0, float("inf")), n_vertical)
    # Entry 0 of the flipped line is distance 0.
    diagonals = top_mask(slash.flip(-1).masked_fill(column == 0, float("inf")), n_slash)
    # NaN sorts before infinity: a broken input must not leave a row without a key.
    columns[:, 0] = diagonals[:, 0] = True
    distance = column[first_row:, None] - column
    on_diagonal = diagonals[:, distance.clamp(min=0)]
    return (columns[:, None] | on_diagonal) & (distance >= 0)


def _map_blocks(
    pooled_q: Tensor, pooled_k: Tensor, scale: float, gamma: float, first_row: int
) -> Tensor:
    """bool `[heads, rows, blocks]`: largest entries of the pooled attention map.

    Entries of the whole map compete, rows together, while their sum is at most `gamma` of its mass:
    the entry that exceeds it stays out.
    """
    heads, rows, _ = pooled_q.shape
    blocks = pooled_k.shape[1]
    column = torch.arange(blocks, device=pooled_q.device)
    causal = column[first_row:, None] >= column
    scores = (pooled_q * scale) @ pooled_k.mT
    mass = scores.masked_fill(~causal, float("-inf")).softmax(-1).flatten(1)
    return largest_within(mass, gamma * rows).view(heads, rows, blocks) & causal
