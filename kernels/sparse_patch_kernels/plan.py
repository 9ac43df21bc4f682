"""BlockPlan: which keys each query block of each head attends to.

The contract between methods, which choose, and kernels, which compute. For query row i and key j,
given as positions in the sequence, j is visible to i when

    j <= i   and   ( j lies in a run listed for i's query block
                     or  j < sink   or   i - j < window )

A key that several clauses include counts once. Query rows are the last `q_len` of `kv_len`
positions, so row r of a call sits at position `kv_len - q_len + r`.

A run list may also be pooled: its keys and values then enter as means of `pool` neighbours. Such a
group is one key whose logit gains log(pool), so that it weighs about as much as its keys would. A
group is visible to a row when all of its keys are at or before the row. Groups lie on the grid of
`pool` from key 0 (slot 0, with `key_order`), so each KV head is averaged once for all rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from . import counting
from .plan_layout import PlanLayout
from .runs import RunList


@dataclass(frozen=True, eq=False)
class BlockPlan(PlanLayout):
    """What one call of `block_sparse_attention` computes: see the module docstring for the rule.

    Attributes:
        q_len: query rows of the call.
        kv_len: keys of the call; the queries are the last `q_len` of these positions.
        block_q: query rows that share a list; block b holds rows `[b * block_q, (b+1) * block_q)`.
        runs: run lists; may be empty if `sink` and `window` suffice.
        sink: the first `sink` keys are visible to every row (token-exact).
        window: keys closer than `window` tokens are visible (token-exact; 1 is the row itself).
        key_order: int `[lists, kv_len]` or None. With it, runs list slots, and slot s holds key
            `key_order[s]`; causality, sink and window stay on the keys' own positions.

    Pooled runs must not overlap other runs, `sink` or `window`: a key would count twice. (Under
    `key_order` a run is not a range of positions, so only runs are checked against one another.)

    Raises:
        ValueError: a field is out of range, lists do not fit together, or (checked on the CPU only,
            where it costs little) a run is out of order, overlaps or is not visible.
    """

    def __post_init__(self) -> None:
        if not 1 <= self.q_len <= self.kv_len:
            raise ValueError(
                f"BlockPlan: need 1 <= q_len <= kv_len, got q_len={self.q_len}, "
                f"kv_len={self.kv_len}; queries are the last rows of the sequence"
            )
        if self.block_q < 1 or self.sink < 0 or self.window < 0:
            raise ValueError(
                f"BlockPlan: block_q={self.block_q} must be >= 1, sink={self.sink} and "
                f"window={self.window} >= 0"
            )
        for run in self.runs:
            if run.count.shape[1] != self.n_q_blocks:
                raise ValueError(
                    f"BlockPlan: a run list has {run.count.shape[1]} query blocks, but "
                    f"q_len={self.q_len} in blocks of {self.block_q} makes {self.n_q_blocks}"
                )
            if self.heads % run.heads:
                raise ValueError("BlockPlan: run lists for different numbers of heads")
        if self.key_order is not None and self.key_order.shape[-1] != self.kv_len:
            raise ValueError(
                f"BlockPlan: key_order has {self.key_order.shape[-1]} slots for {self.kv_len} keys"
            )
        if all(run.start.device.type == "cpu" for run in self.runs):
            self.check()

    @classmethod
    def from_block_mask(
        cls,
        mask: Tensor,
        *,
        block_q: int,
        block_k: int,
        q_len: int | None = None,
        kv_len: int | None = None,
    ) -> BlockPlan:
        """The plan that keeps the key blocks a boolean mask marks.

        Args:
            mask: bool `[heads, n_q_blocks, n_k_blocks]`; blocks wholly in the future are dropped.
            block_q: tokens per query block.
            block_k: tokens per key block.
            q_len: queries; default: full blocks, as many queries as keys when the two grids allow
                it. The exact lengths are fitted when the plan is run.
            kv_len: keys, like q_len.

        Raises:
            ValueError: the mask is not three-dimensional, or its grid does not cover the lengths.
        """
        if mask.ndim != 3 or mask.dtype != torch.bool:
            raise ValueError(
                "from_block_mask: mask must be bool [heads, n_q_blocks, n_k_blocks], got "
                f"{mask.dtype} {tuple(mask.shape)}"
            )
        _, n_q, n_k = mask.shape
        full_q, full_k = n_q * block_q, n_k * block_k
        if q_len is None and kv_len is None and abs(full_q - full_k) < max(block_q, block_k):
            full_q = full_k = min(full_q, full_k)
        q_len = full_q if q_len is None else q_len
        kv_len = full_k if kv_len is None else kv_len
        if -(-q_len // block_q) != n_q or -(-kv_len // block_k) != n_k:
            raise ValueError(
                f"from_block_mask: a mask of {n_q} x {n_k} blocks of {block_q} x {block_k} tokens "
                f"does not cover q_len={q_len}, kv_len={kv_len}"
            )
        blank = cls(q_len=q_len, kv_len=kv_len, block_q=block_q)
        first_key = torch.arange(n_k, device=mask.device) * block_k
        mask = mask & (first_key <= blank.last_rows(mask.device)[:, None])
        return dataclasses.replace(blank, runs=(RunList.from_mask(mask, block_k),))

    def check(self) -> None:
        """Check every run: ascending, disjoint, beginning before the block's last row; pooled runs
        also on their grid and without overlap. Reads the lists, so on a GPU it waits.

        Raises:
            ValueError: naming the fault.
        """
        for run in self.runs:
            start, count = run.expand(run.heads)
            valid = run.valid(run.heads)
            if bool((count < 0).any()) or bool((count > start.shape[2]).any()):
                raise ValueError("BlockPlan: a count is negative or larger than its list")
            limit = self.last_rows(start.device).to(torch.int32)[None, :, None] + 1
            if self.key_order is not None:
                limit = torch.full_like(limit, self.kv_len)
            if bool(((start < 0) | (start >= limit)).logical_and_(valid).any()):
                raise ValueError(
                    "BlockPlan: a run begins before key 0 or after the last row of its query block"
                )
            close = start[..., 1:] < start[..., :-1] + run.width
            if bool(close.logical_and_(valid[..., 1:]).any()):
                raise ValueError(
                    f"BlockPlan: runs of width {run.width} must be ascending and disjoint"
                )
            if run.on_grid and _any_between(start, run.width, valid):
                raise ValueError(
                    f"BlockPlan: a run begins off the grid of its width, {run.width}, and its list "
                    "says on_grid=True"
                )
            if run.pool > 1 and _any_between(start, run.pool, valid):
                raise ValueError(
                    f"BlockPlan: a pooled run begins off the grid of its groups of {run.pool}"
                )
        self._check_overlap()

    def _check_overlap(self) -> None:
        """Raise a ValueError where a pooled run shares a key with another run, sink or window."""
        pooled = [run for run in self.runs if run.pool > 1]
        if not pooled:
            return
        tokens = [run for run in self.runs if run.pool == 1]
        last, sink, window = self.last_rows(pooled[0].start.device), self.sink, self.window
        if self.key_order is not None:
            last, sink, window = torch.full_like(last, self.kv_len - 1), 0, 0
        apart = counting.covered(self, last, tokens, sink, window)
        for run in pooled:
            apart = apart + counting.covered(self, last, [run], 0, 0)
        if not torch.equal(apart, counting.covered(self, last, self.runs, sink, window)):
            raise ValueError(
                "BlockPlan: a pooled run overlaps another run, sink or window; its keys would "
                "count twice"
            )

    def fit(self, q_len: int, kv_len: int) -> BlockPlan:
        """This plan for lengths that end inside its last blocks (a block mask is no finer).

        Raises:
            ValueError: the lengths belong to another plan.
        """
        if (q_len, kv_len) == (self.q_len, self.kv_len):
            return self
        widest = max([self.block_q, *(run.width for run in self.runs)])
        same_blocks = -(-q_len // self.block_q) == self.n_q_blocks
        if not (same_blocks and q_len <= self.q_len and 0 <= self.kv_len - kv_len < widest):
            raise ValueError(
                f"the plan is for q_len={self.q_len}, kv_len={self.kv_len}, not for "
                f"q_len={q_len}, kv_len={kv_len}"
            )
        return dataclasses.replace(self, q_len=q_len, kv_len=kv_len)

    def head_density(self) -> Tensor:
        """float64 `[heads]`: kept / causal per head, see `density`. Does not wait for a GPU."""
        kept, causal = counting.kept_pairs(self)
        return kept.double() / causal

    @property
    def density(self) -> float:
        """Kept / causal, over (query block, key block) pairs of all heads.

        A plan with one run list is counted in blocks of its width. Other plans are counted in keys
        that at least one row of the query block sees: the same measure with blocks of width 1. A
        pooled group that some row sees counts as one key.
        """
        return float(self.head_density().mean())

    def to_dense_mask(self, q_len: int | None = None, kv_len: int | None = None) -> Tensor:
        """bool `[heads, q_len, kv_len]`: the token mask that every backend must match, without
        pooled runs.

        Raises:
            ValueError: the lengths do not fit the plan (see `fit`).
        """
        plan = self.fit(q_len or self.q_len, kv_len or self.kv_len)
        blocks = range(plan.n_q_blocks)
        return torch.stack(
            [torch.cat([plan.block_mask(h, b) for b in blocks]) for h in range(plan.heads)]
        )


def _any_between(start: Tensor, grid: int, valid: Tensor) -> bool:
    """Does any valid entry lie between multiples of `grid`?"""
    # Of a power of 2 the lower bits tell, and much faster.
    off = start & (grid - 1) if grid & (grid - 1) == 0 else start % grid
    return bool((off != 0).logical_and_(valid).any())
