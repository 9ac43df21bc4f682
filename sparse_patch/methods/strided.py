"""Strided: real attention rows of a sample of queries rank the blocks, head by head.

Every `stride`-th query is scored against every key, exactly; per query block, what its sampled
queries give a key block makes the block's worth,

    A[m, n] = sqrt( mean over sampled rows i of m of ( sum over j in n of softmax(q_i k^T)_j )^2 )

(`weigh="rms"`; "sum" takes the plain mean). A head keeps as many of its best blocks as hold `gamma`
of the true attention of the last query block; the first block, a row's own and the one before are
always kept.

Why the root of squares: what a row loses by a dropped block is a matter of how much of that row's
mass the block had. Mass that is spread thin over many rows costs nearly nothing, the same mass in
one row is an answer lost, so the blocks that few rows need badly come first
(results/where_it_hurts; DESIGN of the ranking by this project, no paper).

The work is kv_len^2 / stride dot products per head, with `rank="group"` per KV group, whose query
heads are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..block_scorer import POLICIES, BlockScorer
from ..registry import param, register
from ..scoring import token_scores
from ..selection import BlockGrid, rank
from .proxyattn import proxy_heads


@register("strided")
@dataclass(frozen=True)
class Strided(BlockScorer):
    """Exact attention of every n-th query ranks the blocks, each head has a budget of its own."""

    source: ClassVar[str] = "this project"

    select: str = param(
        "held_out",
        "how scores become blocks",
        choices=POLICIES,
    )
    local_blocks: int = param(2, "latest blocks that a row keeps, its own included", least=1)
    stride: int = param(16, "score every so many queries", choices=(1, 2, 4, 8, 16))
    weigh: str = param(
        "rms", "a block's worth over the sampled queries", choices=("rms", "sum", "max")
    )
    rank: str = param(
        "head",
        "a ranking per query head, or one per KV group from its mean query",
        choices=("head", "group"),
    )

    def block_scores(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> Tensor:
        return self._scores_of_rows(q, k, scale, self.stride)

    def _scores_of_rows(self, q: Tensor, k: Tensor, scale: float, stride: int) -> Tensor:
        if self.rank == "group":
            q = proxy_heads(q, k.shape[0])
        return token_scores(
            q, k.to(q.dtype), scale, block=self.block_size, stride_q=stride, reduce=self.weigh
        )

    def ranking_to_test(
        self, order: Tensor, grid: BlockGrid, q: Tensor, k: Tensor, scale: float
    ) -> tuple[Tensor, int]:
        """The ranking from every second sampled row, to be tested on the others."""
        stride = 2 * self.stride
        forced = grid.forced(self.sink_blocks, self.local_blocks)
        return rank(self._scores_of_rows(q, k, scale, stride), grid.causal(), forced), stride
