"""Base of the methods that score blocks: a method scores each block, this base chooses.

A subclass implements `block_scores`; every policy, the forced blocks and the plan are here. So any
scorer works with any policy:

    topk             the `topk` best blocks of every row
    top_p            best blocks of a row until they hold `gamma` of its estimated mass
    threshold        blocks that hold at least `alpha` of the mass of the row's best block
                     (FlashPrefill, arXiv:2603.06199)
    per_head_budget  one number of blocks per head, for all its rows: as many as hold `gamma` of the
                     last block's true attention (ProxyAttn, arXiv:2509.24745, algorithm 1)
    held_out         one number of blocks per head, for all its rows: the smallest at which rows
                     that the ranking was not made from lose a root mean square of 1 - `gamma` of
                     their attention (this project: results/where_it_hurts)
    global           the best `keep` of all causal blocks of a head, rows together
                     (DraftAttention, arXiv:2505.14708)

`rectify="lse"` brings back each block left out as one pooled key: logit q . mean(k) * scale +
log(block), value mean(v). Only for blocks wholly in a row's past, so it stays causal. Where the
keys of a block have little in common, as in a model's first layers, it may add more error than it
removes.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from sparse_patch_kernels import BlockPlan, RunList
from sparse_patch_kernels.estimators.probe import probe_mass
from torch import Tensor

from . import selection
from .held_out import ranking_loss
from .registry import Method, check_sequence, param
from .selection import BlockGrid, to_query_grid

__all__ = ["POLICIES", "BlockGrid", "BlockScorer"]

# Step between the rows on which a ranking is tested.
HELD_OUT_STRIDE = 16

# Which policy reads which parameter: set for another policy, it would do nothing.
_READS: Mapping[str, set[str]] = {
    "topk": {"topk"},
    "top_p": {"gamma"},
    "threshold": {"alpha"},
    "per_head_budget": {"gamma"},
    "held_out": {"gamma"},
    "global": {"keep"},
}
POLICIES = tuple(_READS)
"""What `select=` may be."""


@dataclass(frozen=True)
class BlockScorer(Method):
    """Base of block scorers: parameters of the choice, and the plan from scores."""

    forced_first: ClassVar[bool] = True
    """Does the mass of forced blocks count towards `gamma`, before any other?"""

    block_size: int = param(128, "tokens per block", choices=(16, 32, 64, 128, 256))
    select: str = param("top_p", "how scores become blocks", choices=POLICIES)
    gamma: float | tuple[float, ...] = param(
        0.9, "top_p and budgets: share of the mass to keep", above=0, upto=1, per_head=True
    )
    topk: int = param(16, "topk: blocks per row", least=1)
    alpha: float = param(
        0.1,
        "threshold: keep blocks with at least this share of the best block's mass",
        above=0,
        upto=1,
    )
    keep: float = param(0.25, "global: share of all causal blocks", above=0, upto=1)
    min_budget: int = param(0, "minimum number of tokens that a row keeps", least=0)
    sink_blocks: int = param(1, "first blocks that every row keeps", least=0)
    local_blocks: int = param(1, "latest blocks that a row keeps, its own included", least=1)
    dense_rows: int = param(
        0, "number of last query rows that attend to every key, in whole blocks", least=0
    )
    rectify: str = param(
        "none", "lse: each block left out enters as one pooled key", choices=("none", "lse")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        fields = {field.name: field for field in dataclasses.fields(self)}
        for name in {"topk", "gamma", "alpha", "keep"} - _READS[self.select]:
            if getattr(self, name) != fields[name].default:
                raise ValueError(
                    f"{type(self).__name__}: {name}={getattr(self, name)!r} does nothing with "
                    f"select={self.select!r}, which reads {', '.join(_READS[self.select])}"
                )

    @property
    def block_k(self) -> int:
        """Tokens per key block."""
        return self.block_size

    @abstractmethod
    def block_scores(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> Tensor:
        """Log of the estimated attention mass of each block pair, up to a constant per row.

        Args:
            q: `[heads, q_len, dim]`, as for `Method.plan`.
            k: `[kv_heads, kv_len, dim]`, as there.
            scale: as there.
            q_offset: as there.

        Returns:
            float32 `[lists, rows, blocks]`. `lists` divides the heads: one per head, one per KV
            group, or one for all. One row per block of the position grid that holds a query. Values
            at blocks after a row's own do not matter.
        """

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """Method.plan; None up to `min_budget` plus a block of keys, where the parameters keep all
        (gamma = 1, keep = 1, `topk` of all blocks), and for a later chunk shorter than a block."""
        check_sequence(q, k, q_offset)
        grid = BlockGrid(q.shape[1], k.shape[1], self.block_size, self.block_k, q.device)
        if self._is_exact(grid):
            return None
        scores = self.block_scores(q, k, scale=scale, q_offset=q_offset)
        order, count = self.choose(scores, grid, q, k, scale)
        return self.make_plan(order, count, grid)

    def _is_exact(self, grid: BlockGrid) -> bool:
        share = {"gamma": self.gamma, "keep": self.keep, "topk": min(1, self.topk / grid.blocks)}
        wants_all = 1 in (share.get(name) for name in _READS[self.select])
        chunk = grid.q_offset > 0 and grid.q_len < self.block_size
        return wants_all or chunk or grid.kv_len <= self.min_budget + self.block_size

    def choose(
        self, scores: Tensor, grid: BlockGrid, q: Tensor, k: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Ranked blocks `[lists, rows, blocks]`, and `[heads, rows]`, how many of them are kept.

        The count may have more heads than the ranking has lists: heads then share a list.
        """
        return self._choose(scores, grid, q, k, scale, None)

    def _choose(
        self,
        scores: Tensor,
        grid: BlockGrid,
        q: Tensor,
        k: Tensor,
        scale: float,
        loss: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See `choose`; `loss`: that of `held_out`, if it is known already."""
        causal = grid.causal()
        forced = grid.forced(self.sink_blocks, self.local_blocks)
        order = selection.rank(scores, causal, forced)
        if self.select == "topk":
            count = torch.full(scores.shape[:2], self.topk, device=q.device)
        elif self.select == "top_p":
            mass = selection.mass_of(scores, causal)
            gamma = per_head(self.gamma, scores.shape[0], q.device)
            count = selection.count_top_p(mass, forced, gamma, forced_first=self.forced_first)
        elif self.select == "threshold":
            count = selection.count_threshold(scores, causal, forced, self.alpha)
        elif self.select == "global":
            mass = selection.mass_of(scores, causal)
            count = selection.count_global(mass, causal, forced, self.keep)
        elif self.select == "held_out":
            if loss is None:
                loss = self._held_out_loss(order, grid, q, k, scale)
            # The first number of blocks whose loss is at most 1 - `gamma`.
            allowed = 1 - per_head(self.gamma, q.shape[0], q.device)[:, 0]
            count = ((loss > allowed).sum(-1) + 1)[:, None].expand(-1, grid.rows)
        else:
            count = self.head_budget(q, k, scale)[:, None].expand(-1, grid.rows)
        count = count.clamp(min=-(-self.min_budget // self.block_k))
        count = torch.maximum(count, forced.sum(-1))
        count = count.masked_fill(grid.last_rows(self.dense_rows), grid.blocks)
        if "gamma" in _READS[self.select]:  # a head with gamma = 1 keeps masses that round to 0 too
            whole = per_head(self.gamma, count.shape[0], q.device)[..., 0] >= 1
            count = count.masked_fill(whole, grid.blocks)
        return order, torch.minimum(count, causal.sum(-1))

    def head_budget(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """int64 `[heads]`: blocks that hold `gamma` of the last `block_size` queries' attention."""
        mass = probe_mass(q[:, -self.block_size :], k, scale, self.block_k)
        return selection.reach(mass, per_head(self.gamma, q.shape[0], q.device).flatten())

    def _held_out_loss(
        self, order: Tensor, grid: BlockGrid, q: Tensor, k: Tensor, scale: float
    ) -> Tensor:
        """float32 `[heads, blocks]`: loss of held-out rows by number of blocks; see
        `ranking_loss`."""
        order, stride = self.ranking_to_test(order, grid, q, k, scale)
        return ranking_loss(
            q, k, scale, order, block_q=grid.block_q, block_k=grid.block_k, stride=stride
        )

    def ranking_to_test(
        self, order: Tensor, grid: BlockGrid, q: Tensor, k: Tensor, scale: float
    ) -> tuple[Tensor, int]:
        """For `held_out`: a ranking like `order`, and the stride of the rows to test it on, which
        lie half a stride after its multiples. The ranking was not made from those rows."""
        return order, HELD_OUT_STRIDE

    def make_plan(self, order: Tensor, count: Tensor, grid: BlockGrid) -> BlockPlan:
        """The plan of a ranking cut to `count`; lists stay shared where heads share them."""
        aligned = grid.q_offset % grid.block_q == 0
        if count.shape[0] > order.shape[0] and aligned and self.rectify == "none":
            # On a GPU, reading the longest count would wait; shared lists are small.
            longest = int(count.max()) if count.device.type == "cpu" else grid.blocks
            start = (order[..., :longest] * grid.block_k).to(torch.int32)
            runs = RunList(start, count.to(torch.int32), grid.block_k)
            return BlockPlan(grid.q_len, grid.kv_len, grid.block_q, (runs,))
        mask = selection.mask_of(order, count)
        mask = to_query_grid(mask, grid.q_len, grid.q_offset, grid.block_q)
        plan = BlockPlan.from_block_mask(
            mask, block_q=grid.block_q, block_k=grid.block_k, q_len=grid.q_len, kv_len=grid.kv_len
        )
        return plan if self.rectify == "none" else _rectified(plan, mask, grid)


def _rectified(plan: BlockPlan, mask: Tensor, grid: BlockGrid) -> BlockPlan:
    """The plan with every block left out, and wholly before its query block, as one pooled key."""
    first_row = torch.arange(plan.n_q_blocks, device=grid.device) * grid.block_q + grid.q_offset
    ends = torch.arange(1, grid.blocks + 1, device=grid.device) * grid.block_k
    pruned = ~mask & (ends <= first_row[:, None])
    if not bool(pruned.any()):
        return plan
    pooled = RunList.from_mask(pruned, grid.block_k, pool=grid.block_k)
    return dataclasses.replace(plan, runs=(*plan.runs, pooled))


def per_head(value: float | tuple[float, ...], heads: int, device: torch.device) -> Tensor:
    """float64 `[heads or 1, 1, 1]` of a parameter that may be one number or one per head.

    Raises:
        ValueError: a tuple has neither one number nor one per head.
    """
    numbers = value if isinstance(value, tuple) else (value,)
    if len(numbers) not in (1, heads):
        raise ValueError(
            f"{len(numbers)} values given per head, but this layer chooses blocks for {heads}"
        )
    return _on_device(numbers, device)[:, None, None]


@lru_cache(64)  # copying numbers to a GPU waits for it
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=device)
