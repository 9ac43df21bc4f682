"""Mean-pool: blocks ranked by the product of mean query and mean key.

    a[m, n] = softmax over causal n of  mean(q in block m) . mean(k in block n) / sqrt(d)

A row keeps its best blocks until they hold `gamma` of that mass, and also the first block and its
own. The simplest block scorer, and the baseline of many papers.

Source: the MeanPooling baseline of PBS-Attn (arXiv:2510.21270); the same scores with
`select="topk"` are MInference's block-sparse heads (arXiv:2407.02490) plus the forced blocks.
`variant="released"` follows that baseline's code, which averages a partial last block over zero
rows too and so flattens its scores; the default averages real rows only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparse_patch_kernels.estimators.pooling import grouped_scores, pool_mean
from torch import Tensor
from torch.nn.functional import pad

from ..block_scorer import BlockScorer
from ..registry import Examples, Knob, param, register


@register("mean_pool")
@dataclass(frozen=True)
class MeanPool(BlockScorer):
    """Blocks ranked by the product of mean query and mean key."""

    source: ClassVar[str] = "arXiv:2510.21270 (its MeanPooling baseline)"
    examples: ClassVar[Examples] = {
        "sparse": {"block_size": 16, "gamma": 0.6},
        "everything": {"gamma": 1.0},
    }
    knob: ClassVar[Knob | None] = Knob.share("gamma")
    forced_first: ClassVar[bool] = False

    variant: str = param(
        "corrected",
        "corrected: a partial block is the mean of its real rows; released: zero rows count too",
        choices=("corrected", "released"),
    )

    def block_scores(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> Tensor:
        """See BlockScorer.block_scores; one list per head. Query blocks are averaged over the rows
        of this call."""
        block = self.block_size
        if self.variant == "released":
            end = -k.shape[1] % block  # of the last block, for queries and keys alike
            q, k = pad(q, (0, 0, 0, end)), pad(k, (0, 0, 0, end))
        return grouped_scores(pool_mean(q, block, q_offset), pool_mean(k, block), scale)
