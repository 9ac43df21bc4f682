"""RunList: the runs of keys that query blocks read, one part of a BlockPlan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .estimators.compaction import compact


@dataclass(frozen=True, eq=False)
class RunList:
    """Runs of `width` consecutive keys, listed per head and query block.

    Attributes:
        start: int32 `[lists, n_q_blocks, n]`, first key of each run; runs are disjoint and
            ascending. `lists` divides the number of query heads: one per head, per KV group, or for
            all.
        count: int32 `[counts, n_q_blocks]`, number of valid entries of `start`; the rest is
            padding. Where `counts` exceeds `lists`, heads share a list and each takes its own
            number of first entries: such a list is ranked, best run first, instead of ascending.
        width: tokens in each run.
        pool: neighbours averaged into one key and one value; divides `width` and every start. 1: no
            pooling.
        on_grid: every start is a multiple of `width`, which makes counting faster.
    """

    start: Tensor
    count: Tensor
    width: int
    pool: int = 1
    on_grid: bool = False

    def __post_init__(self) -> None:
        if self.start.ndim != 3 or self.count.ndim != 2:
            raise ValueError(
                "RunList: start must be [lists, n_q_blocks, n] and count [counts, n_q_blocks], got "
                f"{tuple(self.start.shape)} and {tuple(self.count.shape)}"
            )
        if self.start.dtype != torch.int32 or self.count.dtype != torch.int32:
            raise ValueError(
                f"RunList: start and count must be int32, got {self.start.dtype}, "
                f"{self.count.dtype}; convert with .int()"
            )
        if self.start.shape[1] != self.count.shape[1]:
            raise ValueError(
                f"RunList: start lists {self.start.shape[1]} query blocks, "
                f"count {self.count.shape[1]}"
            )
        if self.heads % self.start.shape[0] or self.heads % self.count.shape[0]:
            raise ValueError(
                f"RunList: {self.start.shape[0]} lists and {self.count.shape[0]} counts do not "
                "divide one another"
            )
        if self.width < 1:
            raise ValueError(f"RunList: width={self.width} must be at least 1 token")
        if self.pool < 1 or self.width % self.pool:
            raise ValueError(f"RunList: pool={self.pool} must divide width={self.width}")

    @classmethod
    def from_mask(cls, mask: Tensor, width: int, pool: int = 1) -> RunList:
        """The runs that a mask marks, run j being keys `[j * width, (j + 1) * width)`.

        Args:
            mask: bool `[lists, n_q_blocks, n_runs]`.
            width: see the class.
            pool: see the class.
        """
        index, count = compact(mask)
        return cls(index.mul_(width), count, width, pool, on_grid=True)

    @property
    def heads(self) -> int:
        """Number of heads with their own list or count: the larger of `lists` and `counts`."""
        return max(self.start.shape[0], self.count.shape[0])

    @property
    def ranked(self) -> bool:
        """Do heads share lists, best run first, and cut them by their own counts?"""
        return self.count.shape[0] > self.start.shape[0]

    def expand(self, heads: int) -> tuple[Tensor, Tensor]:
        """`start [heads, n_q_blocks, n]`, ascending, and `count [heads, n_q_blocks]` per head."""
        start = self.start.repeat_interleave(heads // self.start.shape[0], 0)
        count = self.counts(heads)
        if self.ranked:
            padding = torch.arange(start.shape[2], device=start.device) >= count[..., None]
            start = start.masked_fill_(padding, torch.iinfo(torch.int32).max).sort(dim=-1).values
        return start, count

    def counts(self, heads: int) -> Tensor:
        """int32 `[heads, n_q_blocks]`: number of runs of each head."""
        return self.count.repeat_interleave(heads // self.count.shape[0], 0)

    def valid(self, heads: int) -> Tensor:
        """bool `[heads, n_q_blocks, n]`: which entries of the expanded `start` are valid."""
        slots = torch.arange(self.start.shape[2], device=self.count.device)
        return slots < self.counts(heads)[..., None]
