"""Strided: exact attention rows of a sample of queries rank the blocks, head by head.

Every `stride`-th query is scored against every key, exactly, and a block pair scores the mass that
the sampled rows of its query block give its keys:

    A[m, n] = sum over sampled rows i of m, keys j of n of softmax(q_i k^T / sqrt(d))_j

A head keeps as many of its best blocks as held-out rows need: the ranking is made again from every
second sampled row and tested on the rows between, and the budget is the smallest at which those
lose a root mean square of 1 - `gamma` of their attention. The first block, a row's own and the one
before are always kept.

Why not from the last query block, as ProxyAttn does: a few heads look up single keys, different
ones in every row. A budget read off the ranked rows says that they need little; the rows between
lose the one key they need, which costs more next-token loss than anything else that is dropped
(results/where_it_hurts).

`preset="fine"` is the recommended setting (README, results/compare_4k): key blocks of 16 for 64
queries, which waste less of a given density and cost the same to score, and the last 64 queries,
which hold the question, attend to every key.

The work is about kv_len^2 / stride dot products per head, and as much again for the budget; with
`rank="group"` the ranking is made per KV group, from the mean of its query heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sparse_patch_kernels import BlockPlan, dispatch
from sparse_patch_kernels.estimators.token_scores import token_scores
from torch import Tensor

from ..block_scorer import POLICIES, BlockScorer
from ..held_out import scores_and_loss
from ..registry import Examples, Knob, check_sequence, param, register
from ..selection import BlockGrid, rank
from .proxyattn import proxy_heads


@register("strided")
@dataclass(frozen=True)
class Strided(BlockScorer):
    """Exact attention of every n-th query ranks the blocks, with a budget per head."""

    source: ClassVar[str] = "this project"
    examples: ClassVar[Examples] = {
        "sparse": {"block_size": 16, "gamma": 0.6, "stride": 4},
        "everything": {"gamma": 1.0},
    }
    knob: ClassVar[Knob | None] = Knob.share("gamma")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fine": {"block_size": 64, "key_block": 16, "local_blocks": 4, "dense_rows": 64}
    }

    select: str = param(
        "held_out",
        "how scores become blocks",
        choices=POLICIES,
    )
    local_blocks: int = param(2, "latest blocks that a row keeps, its own included", least=1)
    stride: int = param(16, "score every stride-th query", choices=(1, 2, 4, 8, 16))
    key_block: int | None = param(
        None, "tokens per key block, divides block_size; None: block_size", least=1, kind=int
    )
    weigh: str = param(
        "sum", "how a block's mass adds up over the sampled queries", choices=("sum", "rms", "max")
    )
    rank: str = param(
        "head",
        "a ranking per query head, or one per KV group from its mean query",
        choices=("head", "group"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size % self.block_k:
            raise ValueError(
                f"Strided: key_block={self.key_block} must divide block_size={self.block_size}"
            )

    @property
    def block_k(self) -> int:
        """Tokens per key block."""
        return self.key_block or self.block_size

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """See BlockScorer.plan; on a CPU the sample is scored once for ranking and budget."""
        one_pass = self.select == "held_out" and self.rank == "head" and self.weigh != "max"
        if not one_pass or dispatch.uses_triton(q):
            return super().plan(q, k, scale=scale, q_offset=q_offset)
        check_sequence(q, k, q_offset)
        grid = BlockGrid(q.shape[1], k.shape[1], self.block_size, self.block_k, q.device)
        if self._is_exact(grid):
            return None
        causal, forced = grid.causal(), grid.forced(self.sink_blocks, self.local_blocks)
        scores, loss = scores_and_loss(
            q,
            k,
            scale,
            causal,
            forced,
            block=self.block_size,
            block_k=self.block_k,
            stride=self.stride,
            reduce=self.weigh,
        )
        return self.make_plan(*self._choose(scores, grid, q, k, scale, loss), grid)

    def block_scores(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> Tensor:
        return self._scores_of_rows(q, k, scale, self.stride)

    def _scores_of_rows(self, q: Tensor, k: Tensor, scale: float, stride: int) -> Tensor:
        if self.rank == "group":
            q = proxy_heads(q, k.shape[0])
        return token_scores(
            q,
            k,
            scale,
            block=self.block_size,
            block_k=self.block_k,
            stride_q=stride,
            reduce=self.weigh,
        )

    def ranking_to_test(
        self, order: Tensor, grid: BlockGrid, q: Tensor, k: Tensor, scale: float
    ) -> tuple[Tensor, int]:
        """The ranking from every second sampled row, to be tested on the others."""
        stride = 2 * self.stride
        forced = grid.forced(self.sink_blocks, self.local_blocks)
        return rank(self._scores_of_rows(q, k, scale, stride), grid.causal(), forced), stride
