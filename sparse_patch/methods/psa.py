"""PSA, pyramid sparse attention: the less attention a block gets, the coarser its keys.

The blocks of a row are sorted by their estimated share of its attention. The best ones, up to
`thresholds[0]` of the row's attention, stay whole; the next enter as means of 2, 4 and 8
neighbouring keys and values, each level up to its own threshold; the rest is left out:

    level(b) = first of 1, 2, 4, 8 with  sum of the shares of better blocks < threshold(level)

A mean of n keys stands for n keys: its logit gains log(n). The mean of unlike keys resembles none
of them, so a block is pooled no further than its keys agree,

    mean over the block's groups of n keys of cos(first key, last key) >= `similarity`

A row's own block, the latest and the first ones are always whole, and count first. So all pooled
groups lie in the past of their rows, and a partial last block is never pooled.

Source: Pyramid Sparse Attention (arXiv:2512.04025), made causal: the authors' code is bidirectional
and was not compared with. `preset="paper"` has their thresholds for video, where a threshold bounds
the sum with the block itself: a block that alone holds more than the last threshold would be left
out. Shares are estimated by real softmax rows of every `stride_q`-th query. On text we measured no
gain over as many keys in whole blocks, so the defaults pool little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sparse_patch_kernels import BlockPlan, RunList
from sparse_patch_kernels.estimators.token_scores import token_scores
from torch import Tensor

from ..registry import Examples, Knob, Method, check_sequence, param, register
from ..selection import BlockGrid, mass_of, to_query_grid

POOLS = (1, 2, 4, 8)


def _keeps(x: float) -> dict[str, Any]:
    """The four thresholds; the shares they leave out keep the proportion of the defaults."""
    return {"thresholds": tuple(round(x + n * (1 - x) / 5, 5) for n in range(4))}


@register("psa")
@dataclass(frozen=True)
class PSA(Method):
    """Blocks of little mass enter as means of 2, 4 or 8 neighbouring keys and values."""

    source: ClassVar[str] = "arXiv:2512.04025"
    examples: ClassVar[Examples] = {
        "sparse": {
            "block_size": 16,
            "thresholds": (0.3, 0.4, 0.5, 0.6),
            "similarity": -1,
            "stride_q": 4,
        },
        "everything": {"thresholds": (1.0, 1.0, 1.0, 1.0)},
    }
    knob: ClassVar[Knob | None] = Knob(_keeps, 0.02, 0.9999)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"thresholds": (0.4, 0.5, 0.6, 0.8)}
    }

    thresholds: tuple[float, ...] = param(
        (0.9, 0.92, 0.94, 0.96), "share of a row's mass at which levels 1, 2, 4 and 8 end"
    )
    similarity: float = param(
        0.5, "minimum mean cosine of first and last keys of a pooled block's groups; -1: any",
        least=-1, upto=1,
    )  # fmt: skip
    block_size: int = param(128, "tokens per block", choices=(16, 32, 64, 128, 256))
    stride_q: int = param(16, "score every stride_q-th query", choices=(1, 2, 4, 8, 16, 32))
    sink_blocks: int = param(1, "first blocks that every row keeps whole", least=0)
    local_blocks: int = param(2, "latest blocks that a row keeps whole, its own included", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = self.thresholds
        if (
            len(ends) != len(POOLS)
            or not all(isinstance(end, int | float) and 0 < end <= 1 for end in ends)
            or list(ends) != sorted(ends)
        ):
            raise ValueError(
                f"PSA: thresholds={ends!r} must be {len(POOLS)} ascending numbers > 0 and <= 1"
            )

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """Method.plan; None up to the blocks that are kept whole anyway, for a later chunk shorter
        than a block, and for a first threshold of 1, which keeps all."""
        check_sequence(q, k, q_offset)
        block = self.block_size
        grid = BlockGrid(q.shape[1], k.shape[1], block, block, q.device)
        always = self.sink_blocks + self.local_blocks
        short = grid.blocks <= always or (q_offset > 0 and grid.q_len < block)
        if short or self.thresholds[0] == 1:
            return None
        scores = token_scores(q, k, scale, block=block, stride_q=self.stride_q)
        forced = grid.forced(self.sink_blocks, self.local_blocks)
        level = levels(mass_of(scores, grid.causal()), forced, self.thresholds)
        coarsest = coarsest_levels(k, block, self.similarity)
        coarsest = coarsest.repeat_interleave(q.shape[0] // k.shape[0], 0)[:, None]
        level = torch.where(level < len(POOLS), torch.minimum(level, coarsest), level)
        return make_plan(level, grid)


def levels(mass: Tensor, forced: Tensor, ends: tuple[float, ...]) -> Tensor:
    """int64 `[heads, rows, blocks]`: index of each block's level, `len(ends)` where it is left out.

    Args:
        mass: float32 `[heads, rows, blocks]`, 0 where a block may not be seen.
        forced: bool `[rows, blocks]`; these get level 0, and their mass counts first.
        ends: share of a row's mass before which each level applies, ascending.
    """
    order = mass.masked_fill(forced, float("inf")).argsort(dim=-1, descending=True, stable=True)
    running = mass.gather(-1, order).double().cumsum(-1)
    before = torch.cat([torch.zeros_like(running[..., :1]), running[..., :-1]], -1)
    ranked = torch.stack([before >= running[..., -1:] * end for end in ends]).sum(0)
    return torch.zeros_like(ranked).scatter_(-1, order, ranked).masked_fill_(forced, 0)


def coarsest_levels(k: Tensor, block: int, similarity: float) -> Tensor:
    """int64 `[kv_heads, blocks]`: index of the coarsest level that a block's keys allow.

    `k [kv_heads, kv_len, dim]`. A level is allowed when it and all finer ones pass. The entry of a
    partial last block, which is never pooled, means nothing.
    """
    unit = torch.nn.functional.normalize(k.float(), dim=-1)
    unit = torch.nn.functional.pad(unit, (0, 0, 0, -k.shape[1] % block))
    alike = []
    for pool in POOLS[1:]:
        cosine = (unit[:, ::pool] * unit[:, pool - 1 :: pool]).sum(-1)
        alike.append(cosine.reshape(len(k), -1, block // pool).mean(-1) >= similarity)
    return torch.stack(alike).long().cumprod(0).sum(0)


def make_plan(level: Tensor, grid: BlockGrid) -> BlockPlan:
    """The plan of levels per block; where a query block straddles two rows, the finer one holds."""
    causal = grid.causal()
    runs, finer = [], None
    for index, pool in enumerate(POOLS):
        mask = to_query_grid((level <= index) & causal, grid.q_len, grid.q_offset, grid.block_q)
        new = mask if finer is None else mask & ~finer
        finer = mask
        if index == 0 or bool(new.any()):
            runs.append(RunList.from_mask(new, grid.block_k, pool))
    return BlockPlan(grid.q_len, grid.kv_len, grid.block_q, tuple(runs))
