"""MoBA's gate, without MoBA's training: every query picks key chunks by their mean.

    s[i, c] = q_i . mean(k in chunk c)              for chunks c wholly before query i

Query i keeps its own chunk, up to itself, and the `topk - 1` past chunks with the largest s.

Source: MoBA (arXiv:2502.13189; MoonshotAI/MoBA); defaults are the chunk of 4096 and 12 of
its repository. MoBA is a trained method: its models are trained with the gate, and keep their last
three layers dense. Its authors report no accuracy of the gate in an untrained model.

The gate is per token. `gate="token"` makes a plan with query blocks of one row, which block-sparse
kernels run slowly. The default, `gate="block"`, keeps for every row what any row of its query block
picks: a superset, in blocks of `block_size` rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from sparse_patch_kernels import BlockPlan, RunList
from sparse_patch_kernels.estimators import TILE_ELEMENTS
from sparse_patch_kernels.estimators.pooling import grouped_scores, pool_mean
from torch import Tensor
from torch.nn.functional import pad

from ..registry import Examples, Knob, Method, check_sequence, param, register
from ..selection import mask_of, rank


@register("moba")
@dataclass(frozen=True)
class MoBA(Method):
    """Untrained MoBA gate: queries pick key chunks by their mean."""

    source: ClassVar[str] = "arXiv:2502.13189"
    examples: ClassVar[Examples] = {
        "sparse": {"block_size": 16, "chunk_size": 16, "topk": 3},
        "everything": {"topk": 10000},
        "long": {"chunk_size": 512},
    }
    knob: ClassVar[Knob | None] = Knob.count("topk", 1, 2048, chunk_size=64)

    chunk_size: int = param(4096, "tokens per key chunk", least=1)
    topk: int = param(12, "chunks that a query keeps, its own included", least=1)
    gate: str = param(
        "block",
        "token: exact but slow; block: all that any row of the query block picks",
        choices=("token", "block"),
    )
    block_size: int = param(128, "gate=block: query rows that share a list, tokens", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate == "token" and self.block_size != type(self).block_size:
            raise ValueError(
                f"MoBA: block_size={self.block_size} does nothing with gate='token', whose query "
                "blocks are single rows"
            )

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """Method.plan; None up to `topk` chunks of keys, which every query would keep."""
        check_sequence(q, k, q_offset)
        q_len, kv_len = q.shape[1], k.shape[1]
        if kv_len <= self.topk * self.chunk_size:
            return None
        chunks = pool_mean(k, self.chunk_size)
        block_q = 1 if self.gate == "token" else self.block_size
        tile = max(1, TILE_ELEMENTS // (q.shape[0] * chunks.shape[1] * block_q)) * block_q
        lists = []
        for row in range(0, q_len, tile):
            picked = self._pick(q[:, row : row + tile], chunks, q_offset + row)
            whole = pad(picked, (0, 0, 0, -picked.shape[1] % block_q))
            union = whole.view(q.shape[0], -1, block_q, chunks.shape[1]).any(2)
            lists.append(RunList.from_mask(union, self.chunk_size))
        return BlockPlan(q_len, kv_len, block_q, (_joined(lists),))

    def _pick(self, q: Tensor, chunks: Tensor, position: int) -> Tensor:
        """bool `[heads, rows, chunks]`: the gate of a few queries, the first at `position`."""
        own = (torch.arange(q.shape[1], device=q.device) + position) // self.chunk_size
        column = torch.arange(chunks.shape[1], device=q.device)
        scores = grouped_scores(q, chunks, 1.0)
        order = rank(scores, column <= own[:, None], column == own[:, None])
        count = (own + 1).clamp(max=self.topk)
        return mask_of(order, count.expand(q.shape[0], -1))


def _joined(lists: list[RunList]) -> RunList:
    """The lists of consecutive query tiles as one."""
    n = max(runs.start.shape[2] for runs in lists)
    start = torch.cat([pad(runs.start, (0, n - runs.start.shape[2])) for runs in lists], 1)
    return RunList(start, torch.cat([runs.count for runs in lists], 1), lists[0].width)
