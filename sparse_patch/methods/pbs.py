"""PBS-Attn: sort the keys inside each segment, then choose blocks of the sorted keys.

Attention does not depend on the order of its keys. So in every complete segment of `segment` keys,
the keys that the last queries attend to most move to the front: the heavy keys of a segment then
share a few blocks instead of lying in all of them.

    score[j] = mean over the last block_size queries of softmax_j(q . k_j * scale)

(over the keys of complete segments, those after a query too). Queries stay where they are. Then a
`selector` scores each block of sorted keys for each query block, and the best blocks of earlier
segments are kept until they hold `tau` of those segments' mass. A query block's own segment is kept
whole, and so is the block that token 0 was moved to.

Source: PBS-Attn (arXiv:2510.21270). `variant="released"` follows the authors' code
(xinghaow99/pbs-attn) in two slips: the zeros that pad the last query block are pooled with its
rows, and a row whose float32 sum ends below `tau` keeps only the forced blocks.
`variant="corrected"` pools real rows only, and such a row keeps all (the paper's algorithm 2). The
antidiagonal selector (PBS-Attn+) and `share="group"` follow the paper; no code of them was
released.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sparse_patch_kernels import BlockPlan, RunList
from sparse_patch_kernels.estimators.pooling import grouped_scores, pool_mean
from sparse_patch_kernels.estimators.probe import key_scores
from sparse_patch_kernels.estimators.token_scores import antidiagonal_scores
from torch import Tensor
from torch.nn import functional as F

from ..block_scorer import per_head
from ..registry import Examples, Knob, Method, check_sequence, param, register
from ..selection import mass_of, to_query_grid
from .proxyattn import proxy_heads

# Elements of sorted keys in memory at a time (128 MiB in float32).
_SORTED_ELEMENTS = 1 << 25


def _mean_pool(q: Tensor, k: Tensor, scale: float, pbs: PBS) -> Tensor:
    """Mean query against mean key."""
    pooled_k = pool_mean(k, pbs.block_size)
    return grouped_scores(pbs.pool_queries(q, k.shape[1]), pooled_k, scale)


def _max_pool(q: Tensor, k: Tensor, scale: float, pbs: PBS) -> Tensor:
    """Mean query against the largest value of each channel among the keys."""
    padded = F.pad(k.float(), (0, 0, 0, -k.shape[1] % pbs.block_size), value=float("-inf"))
    pooled_k = padded.reshape(len(k), -1, pbs.block_size, k.shape[2]).amax(2)
    return grouped_scores(pbs.pool_queries(q, k.shape[1]), pooled_k, scale)


def _antidiagonal(q: Tensor, k: Tensor, scale: float, pbs: PBS) -> Tensor:
    """XAttention's antidiagonal sums.

    Its softmax covers the query block's own segment too, so rows that attend there weigh less.
    """
    return antidiagonal_scores(q, k, scale, block=pbs.block_size, stride=pbs.stride)


# Each takes q `[heads, q_len, dim]`, sorted keys `[lists, kv_len, dim]` and the scale, and returns
# the log of the mass of each block pair up to a constant per row, float32 `[heads, rows, blocks]`
# with a row per block of the position grid that holds a query. Only blocks of segments before the
# query block's own are read, so a selector may look at all keys of a block.
SELECTORS: Mapping[str, Callable[[Tensor, Tensor, float, PBS], Tensor]] = {
    "mean_pool": _mean_pool,
    "max_pool": _max_pool,
    "antidiagonal": _antidiagonal,
}


@register("pbs")
@dataclass(frozen=True)
class PBS(Method):
    """Keys sorted by importance inside segments, then top-p of their blocks."""

    source: ClassVar[str] = "arXiv:2510.21270"
    examples: ClassVar[Examples] = {
        "sparse": {"block_size": 16, "segment": 32, "tau": 0.5},
        "everything": {"tau": 1.0},
    }
    knob: ClassVar[Knob | None] = Knob.share("tau")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"plus": {"selector": "antidiagonal"}}

    tau: float | tuple[float, ...] = param(
        0.9, "share of the earlier segments' mass to keep; from 1: all", above=0, per_head=True
    )
    block_size: int = param(128, "tokens per block", choices=(16, 32, 64, 128, 256))
    segment: int = param(256, "keys sorted together, a multiple of block_size", least=16)
    selector: str = param("mean_pool", "what scores the blocks", choices=tuple(SELECTORS))
    stride: int = param(8, "antidiagonal: tokens per group", choices=(4, 8, 16))
    share: str = param("head", "heads that share an order of the keys", choices=("head", "group"))
    force_first: bool = param(True, "always keep the block that token 0 was moved to")
    variant: str = param(
        "corrected",
        "released: as the authors' code; corrected: its slips repaired",
        choices=("released", "corrected"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segment % self.block_size:
            raise ValueError(
                f"PBS: segment={self.segment} must be a multiple of block_size={self.block_size}"
            )
        if self.stride != type(self).stride and self.selector != "antidiagonal":
            raise ValueError(
                f"PBS: stride={self.stride} does nothing with selector={self.selector!r}, only "
                "'antidiagonal' reads it"
            )

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """Method.plan; None up to `segment` keys, for chunks shorter than a block, and for tau >= 1
        in all heads, which keeps all.

        Raises:
            ValueError: `tau` is a tuple without one number per query head.
        """
        check_sequence(q, k, q_offset)
        (heads, q_len, dim), kv_len = q.shape, k.shape[1]
        tau = per_head(self.tau, heads, q.device).expand(heads, 1, 1)
        least = min(self.tau) if isinstance(self.tau, tuple) else self.tau
        if kv_len <= self.segment or q_len < self.block_size or least >= 1:
            return None
        order = self._key_order(q[:, -self.block_size :], k, scale)
        lists = order.shape[0]
        kv_head = torch.arange(lists, device=q.device) * k.shape[0] // lists
        masks = []
        # A few lists at a time: sorted keys of all query heads would be many copies of K.
        step = max(1, _SORTED_ELEMENTS // (kv_len * dim))
        for first in range(0, lists, step):
            part = slice(first, min(first + step, lists))
            query_heads = slice(part.start * heads // lists, part.stop * heads // lists)
            keys = k[kv_head[part, None], order[part]]
            scores = SELECTORS[self.selector](q[query_heads], keys, scale, self)
            masks.append(self._choose(scores, order[part], tau[query_heads]))
        mask = to_query_grid(torch.cat(masks), q_len, q_offset, self.block_size)
        plan = BlockPlan(q_len, kv_len, self.block_size, key_order=order.to(torch.int32))
        mask &= self._in_sight(order, plan.last_rows(q.device)).repeat_interleave(heads // lists, 0)
        return dataclasses.replace(plan, runs=(RunList.from_mask(mask, self.block_size),))

    def pool_queries(self, q: Tensor, kv_len: int) -> Tensor:
        """Mean of each query block, float32 `[heads, rows, dim]`; `q` ends at `kv_len`."""
        block, offset = self.block_size, kv_len - q.shape[1]
        if self.variant == "released":
            q = F.pad(q, (0, 0, offset % block, -kv_len % block))
            offset -= offset % block
        return pool_mean(q, block, offset)

    def _key_order(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """int64 `[heads or kv_heads, kv_len]`: the key in each slot, from the last queries `q`."""
        kv_heads, kv_len, _ = k.shape
        if self.share == "group":
            q = proxy_heads(q, kv_heads)
        whole = kv_len // self.segment * self.segment
        score = key_scores(q, k[:, :whole], scale).view(len(q), -1, self.segment)
        order = score.argsort(dim=-1, descending=True, stable=True)
        slot = torch.arange(kv_len, device=q.device)
        order += slot[: whole : self.segment, None]
        return torch.cat([order.flatten(1), slot[whole:].expand(len(q), -1)], 1)

    def _choose(self, scores: Tensor, order: Tensor, tau: Tensor) -> Tensor:
        """bool like `scores [heads, rows, blocks]`: blocks to keep; rows are the last of a grid."""
        heads, rows, blocks = scores.shape
        block = torch.arange(blocks, device=scores.device)
        segment = block * self.block_size // self.segment
        own = segment[-rows:, None]
        mass = mass_of(scores, segment < own)
        ranked, index = mass.sort(dim=-1, descending=True, stable=True)
        running = ranked.cumsum(-1)
        keep_all = tau >= 1  # float32 sums may end a little below 1, or above
        taken = (F.pad(running[..., :-1], (1, 0)) < tau) | keep_all
        if self.variant == "released":
            taken &= (running[..., -1:] >= tau) | keep_all
        kept = torch.zeros_like(taken).scatter_(-1, index, taken) & (segment < own)
        kept |= segment == own
        if self.force_first:
            first = (order == 0).int().argmax(-1) // self.block_size
            kept |= (block == first[:, None]).repeat_interleave(heads // len(order), 0)[:, None]
        return kept

    def _in_sight(self, order: Tensor, last_row: Tensor) -> Tensor:
        """bool `[lists, query blocks, blocks]`: does a block hold a key that some row may see?"""
        filled = F.pad(order, (0, -order.shape[1] % self.block_size), value=order.shape[1])
        earliest = filled.view(len(order), -1, self.block_size).amin(-1)
        return earliest[:, None] <= last_row[:, None]
