"""ProxyAttn: real token scores of a few averaged heads rank the blocks for all heads of a group.

Heads of a layer attend to much the same tokens and differ in how many they need. So a group of
heads is averaged into one proxy, whose blocks are scored by strided token scores,

    A[m, n] = max over the block pair of softmax(mean_h(q_h) mean_h(k_h)^T / sqrt(d))

and every head of the group takes the best blocks of that one ranking, up to its own budget: the
number of blocks that hold `gamma` of the attention of its last query block.

Source: ProxyAttn (arXiv:2509.24745, ICLR 2026); `preset="paper"` is its setting for models with one
proxy. The authors' code was not available for comparison. Where the paper is silent or its choice
measured worse, the default is ours: one proxy per KV head, every key and every 16th query (the same
work as every fourth of both), the block before the diagonal always kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sparse_patch_kernels import BlockPlan
from sparse_patch_kernels.estimators.token_scores import token_scores
from torch import Tensor

from ..block_scorer import POLICIES, BlockScorer
from ..registry import Examples, Knob, param, register
from ..selection import BlockGrid


@register("proxyattn")
@dataclass(frozen=True)
class ProxyAttn(BlockScorer):
    """Token scores of averaged heads rank the blocks, each head has a budget of its own."""

    source: ClassVar[str] = "arXiv:2509.24745"
    examples: ClassVar[Examples] = {
        "sparse": {"block_size": 16, "min_budget": 0, "gamma": 0.6, "stride_q": 4},
        "everything": {"gamma": 1.0},
    }
    knob: ClassVar[Knob | None] = Knob.share("gamma", min_budget=256)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"n_proxy": 1, "stride_q": 4, "stride_k": 4, "sink_blocks": 0, "local_blocks": 1}
    }
    spans_heads: ClassVar[tuple[str, ...]] = ("n_proxy",)

    select: str = param(
        "per_head_budget",
        "how scores become blocks",
        choices=POLICIES,
    )
    gamma: float | tuple[float, ...] = param(
        0.95, "share of the last block's attention mass to keep", above=0, upto=1, per_head=True
    )
    min_budget: int = param(2048, "minimum number of tokens that a row keeps", least=0)
    local_blocks: int = param(2, "latest blocks that a row keeps, its own included", least=1)
    n_proxy: int | None = param(
        None,
        "number of averaged heads, divides the KV heads; None: one per KV head",
        least=1,
        kind=int,
    )
    stride_q: int = param(16, "score every stride_q-th query", choices=(1, 2, 4, 8, 16, 32))
    stride_k: int = param(1, "score every stride_k-th key", choices=(1, 2, 4, 8, 16))
    pool: str = param(
        "max", "a block's score: its largest token score, or their sum", choices=("max", "sum")
    )
    budget_rows: str = param(
        "constant", "a head's budget: the same for all rows, or growing with the row's position",
        choices=("constant", "proportional"),
    )  # fmt: skip

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """See BlockScorer.plan.

        Raises:
            ValueError: `n_proxy` does not divide the KV heads.
        """
        if k.ndim == 3 and k.shape[0] % (self.n_proxy or 1):
            raise ValueError(
                f"ProxyAttn: n_proxy={self.n_proxy} must divide the {k.shape[0]} KV heads"
            )
        return super().plan(q, k, scale=scale, q_offset=q_offset)

    def block_scores(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> Tensor:
        proxies = self.n_proxy or k.shape[0]
        return token_scores(
            proxy_heads(q, proxies),
            proxy_heads(k, proxies),
            scale,
            block=self.block_size,
            stride_q=self.stride_q,
            stride_k=self.stride_k,
            reduce=self.pool,
        )

    def choose(
        self, scores: Tensor, grid: BlockGrid, q: Tensor, k: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        order, count = super().choose(scores, grid, q, k, scale)
        if self.budget_rows == "proportional":
            visible = grid.causal().sum(-1)
            forced = grid.forced(self.sink_blocks, self.local_blocks).sum(-1)
            count = torch.maximum(-(-count * visible // grid.blocks), forced)
        return order, count


def proxy_heads(x: Tensor, proxies: int) -> Tensor:
    """Mean of each of `proxies` groups of neighbouring heads, in x's dtype: `[proxies, n, dim]`.

    Rounded to the heads' dtype: tensor cores, which score it, take no float32.
    """
    grouped = x.reshape(proxies, -1, *x.shape[1:])
    return grouped.mean(1, dtype=torch.float32).to(x.dtype)
