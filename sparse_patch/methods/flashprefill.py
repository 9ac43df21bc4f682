"""FlashPrefill: single queries against mean keys; blocks near the row's best one, without a sort.

    kbar[n] = mean(k in block n)
    a[m, n] = sum over i in block m of exp(q_i . kbar[n] / sqrt(d))        for n < m

Row m keeps the blocks with a[m, n] >= alpha * max over n of a[m, n]. A block counts only for
queries that have all of it in their past, so a row's own block has no score; it is forced, as are
the first two blocks, the latest four, and everything for the last two query blocks. Queries are not
averaged, so a single query with strong attention counts. Scores are made one query block at a time.

Source: FlashPrefill (arXiv:2603.06199; qhfan/FlashPrefill); presets are its alpha per model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sparse_patch_kernels.estimators.pooling import grouped_scores, pool_mean
from torch import Tensor

from ..block_scorer import POLICIES, BlockScorer
from ..registry import Examples, Knob, param, register


def _keeps(x: float) -> dict[str, Any]:
    return {"sink_blocks": 1, "local_blocks": 2, "dense_rows": 0, "alpha": float(f"{x:.4g}")}


@register("flashprefill")
@dataclass(frozen=True)
class FlashPrefill(BlockScorer):
    """Single queries against mean keys; keeps blocks near the row's best one."""

    source: ClassVar[str] = "arXiv:2603.06199"
    examples: ClassVar[Examples] = {
        "sparse": {
            "block_size": 16,
            "alpha": 0.9,
            "sink_blocks": 0,
            "local_blocks": 1,
            "dense_rows": 0,
        },
        "everything": {"alpha": 1e-300},
    }
    knob: ClassVar[Knob | None] = Knob(_keeps, 1e-4, 1.0, falling=True)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llama": {"alpha": 0.18},
        "qwen3": {"alpha": 0.12},
    }

    select: str = param("threshold", "how scores become blocks", choices=POLICIES)
    alpha: float = param(
        0.12,
        "threshold: keep blocks with at least this share of the best block's mass",
        above=0,
        upto=1,
    )
    sink_blocks: int = param(2, "first blocks that every row keeps", least=0)
    local_blocks: int = param(4, "latest blocks that a row keeps, its own included", least=1)
    # In blocks of 128 tokens: two blocks, even if the last one is partial.
    dense_rows: int = param(
        129, "number of last query rows that attend to every key, in whole blocks", least=0
    )

    def block_scores(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> Tensor:
        """See BlockScorer.block_scores; one list per head, -inf from a row's own block on."""
        block, mean_k = self.block_size, pool_mean(k, self.block_size)
        first_row, lead, blocks = q_offset // block, q_offset % block, mean_k.shape[1]
        shape = q.shape[0], blocks - first_row, blocks
        result = torch.full(shape, float("-inf"), device=q.device)
        for row in range(0 if first_row else 1, blocks - first_row):
            rows = q[:, max(row * block - lead, 0) : (row + 1) * block - lead]
            past = first_row + row
            result[:, row, :past] = grouped_scores(rows, mean_k[:, :past], scale).logsumexp(1)
        return result
