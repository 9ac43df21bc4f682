"""DHSA with fixed chunks: head-averaged, length-scaled pooling, one list for all heads.

    Q[m] = mean over heads and over the rows of block m of q
    K[n] = (sum over the rows of chunk n of mean over heads of k) / sqrt(rows)
    s[m, n] = Q[m] . K[n]                                               no softmax

A token scores what its chunk scores, and a query block keeps its best tokens: with chunks of one
size, its `topk` best blocks. Among them are the first block (128 global tokens) and the latest two,
so that every row has at least its last 128 tokens; the last 64 queries, which hold the instruction,
attend to every key.

Source: DHSA (arXiv:2510.24606), its training-free variant. Left out: the trained predictor of chunk
boundaries, and the reuse of one layer's lists by later layers; every layer makes its own here. Ours
are the block size of 128 and 2048 tokens per query block, on which our sources are silent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from sparse_patch_kernels.estimators.pooling import grouped_scores, pool_mean
from torch import Tensor

from ..block_scorer import BlockScorer
from ..registry import Examples, Knob, param, register


@register("dhsa")
@dataclass(frozen=True)
class DHSA(BlockScorer):
    """Head-averaged chunk scores, one list of blocks for all heads."""

    source: ClassVar[str] = "arXiv:2510.24606"
    examples: ClassVar[Examples] = {
        "sparse": {"block_size": 16, "topk": 4, "dense_rows": 0},
        "everything": {"topk": 10000},
    }
    knob: ClassVar[Knob | None] = Knob.count("topk", 1, 2048)

    select: str = param(
        "topk",
        "how scores become blocks; scores of this method rank, but estimate no mass",
        choices=("topk", "per_head_budget", "held_out"),
    )
    local_blocks: int = param(2, "latest blocks that a row keeps, its own included", least=1)
    dense_rows: int = param(
        64, "number of last query rows that attend to every key, in whole blocks", least=0
    )

    def block_scores(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> Tensor:
        """See BlockScorer.block_scores; one list for all heads, of scores that only rank."""
        block, kv_len = self.block_size, k.shape[1]
        queries = pool_mean(q.float().mean(0, keepdim=True), block, q_offset)
        chunks = pool_mean(k.float().mean(0, keepdim=True), block)
        first = torch.arange(0, kv_len, block, device=k.device)
        rows = (kv_len - first).clamp(max=block)
        return grouped_scores(queries, chunks * rows.sqrt()[:, None], scale)
