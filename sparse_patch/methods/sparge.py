"""SpargeAttn's selection: mean-pool, but only where a block resembles its mean.

The mean key of the sequence is subtracted first, which changes no softmax. Blocks of 128 queries
and 64 keys are averaged; a block's self-similarity is the mean cosine of all pairs of its rows,

    sim = mean over i, j of cos(x_i, x_j) = |mean over i of x_i / |x_i||^2

Where it falls below `similarity`, the mean says nothing: such key blocks are always computed and
stay out of the softmax; such query blocks attend to everything. The others keep

    p[m, n] = softmax over causal n of  mean(q in m) . mean(k in n) / sqrt(d)

until `gamma` of it is in, plus the first block and the row's own. In small models the guard may
find most blocks mixed, and then almost nothing is left out; `similarity=-1` turns it off.

Source: SpargeAttn (arXiv:2502.18137; thu-ml/SpargeAttn), thresholds 0.98 and 0.6. Left out: INT8
products and the second filter inside the kernel, which skips P.V of negligible tiles; both change
how a kept block is computed, not which are kept. With `select="topk"` the authors' code takes a
share of all columns (a half, at similarity -0.1); here `topk` counts key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparse_patch_kernels.estimators.pooling import grouped_scores, pool_mean
from torch import Tensor
from torch.nn.functional import normalize

from .. import selection
from ..block_scorer import BlockScorer
from ..registry import Examples, Knob, param, register
from ..selection import BlockGrid


@register("sparge")
@dataclass(frozen=True)
class Sparge(BlockScorer):
    """Mean-pooled scores, and everything where a block does not resemble its mean."""

    source: ClassVar[str] = "arXiv:2502.18137"
    examples: ClassVar[Examples] = {
        "sparse": {"block_size": 32, "similarity": -1.0, "gamma": 0.5},
        "everything": {"gamma": 1.0},
    }
    # Under its default similarity, almost every block of a small model is computed.
    knob: ClassVar[Knob | None] = Knob.share("gamma", similarity=0.2)
    forced_first: ClassVar[bool] = False

    block_size: int = param(
        128, "tokens per query block; key blocks have half as many", choices=(32, 64, 128, 256)
    )
    gamma: float | tuple[float, ...] = param(
        0.98, "top_p and budgets: share of the mass to keep", above=0, upto=1, per_head=True
    )
    similarity: float = param(
        0.6, "blocks with a lower self-similarity are always computed", least=-1, upto=1
    )

    @property
    def block_k(self) -> int:
        """Tokens per key block: half a query block."""
        return self.block_size // 2

    def block_scores(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> Tensor:
        """See BlockScorer.block_scores; infinite where a block is always computed."""
        keys = k.float() - k.float().mean(1, keepdim=True)
        pooled_q, pooled_k = pool_mean(q, self.block_size, q_offset), pool_mean(keys, self.block_k)
        scores = grouped_scores(pooled_q, pooled_k, scale)
        mixed_q = _self_similarity(q, self.block_size, q_offset) < self.similarity
        mixed_k = _self_similarity(keys, self.block_k) < self.similarity
        mixed_k = mixed_k.repeat_interleave(q.shape[0] // k.shape[0], 0)
        return scores.masked_fill(mixed_q[:, :, None] | mixed_k[:, None], float("inf"))

    def choose(
        self, scores: Tensor, grid: BlockGrid, q: Tensor, k: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """BlockScorer.choose among the finite scores, plus every infinite one."""
        always = scores.isposinf()
        ranked = super().choose(scores.masked_fill(always, float("-inf")), grid, q, k, scale)
        return selection.ranking_of(selection.mask_of(*ranked) | always & grid.causal())


def _self_similarity(x: Tensor, block: int, offset: int = 0) -> Tensor:
    """Mean cosine of all pairs of rows in a block, self-pairs included: `[heads, blocks]`."""
    return pool_mean(normalize(x.float(), dim=-1), block, offset).square().sum(-1)
