"""XAttention: blocks are scored by sums along the antidiagonals of small tiles.

Every vertical and every slash line crosses an antidiagonal, so a few sums see them all. Tokens are
cut into groups of `stride`; query group a scores key group c <= a by

    x[a, c] = scale / stride * sum_p q[a * stride + stride - 1 - p] . k[c * stride + p]

A block's mass is what softmax over c puts into it, and a row takes its best blocks until they hold
`gamma` of its mass. Block 0 and the diagonal are always kept, and their mass counts first.

Source: XAttention (arXiv:2503.16428, ICML 2025); scores, forced blocks and defaults follow the
authors' code (mit-han-lab/x-attention, its Triton path). `rule="released"` also follows its slip:
in the first chunk of queries (`chunk_size` tokens; up to 16K that is all of them) block 0 is not
counted as forced, and the mass that is compared with the target lags one block behind, so about one
block more is kept. A later call over a filled cache has no such chunk. The thresholds per layer and
head that the authors tuned are read with `thresholds=`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from sparse_patch_kernels import BlockPlan
from sparse_patch_kernels.estimators.token_scores import antidiagonal_scores
from torch import Tensor

from ..block_scorer import BlockScorer, per_head
from ..registry import Examples, Knob, param, register
from ..selection import BlockGrid, mass_of
from ..tables import entry_of, read_layers

_OWNER = "XAttention: thresholds"


@register("xattention")
@dataclass(frozen=True)
class XAttention(BlockScorer):
    """Antidiagonal sums of small tiles score the blocks."""

    source: ClassVar[str] = "arXiv:2503.16428"
    examples: ClassVar[Examples] = {
        "sparse": {"block_size": 16, "gamma": 0.6, "stride": 4},
        "everything": {"gamma": 1.0},
    }
    knob: ClassVar[Knob | None] = Knob.share("gamma")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"s16": {"stride": 16}}
    spans_heads: ClassVar[tuple[str, ...]] = ("thresholds",)
    files: ClassVar[tuple[str, ...]] = ("thresholds",)

    gamma: float | tuple[float, ...] = param(
        0.9,
        "top_p, per_head_budget: share of the mass to keep; 0: forced blocks only",
        least=0,
        upto=1,
        per_head=True,
    )
    thresholds: str | None = param(
        None, "JSON file of gamma per layer and head, [[...], ...]", kind=str
    )
    stride: int = param(8, "tokens per group, and per antidiagonal", choices=(4, 8, 16))
    rule: str = param(
        "intended",
        "top_p as intended, or as the authors' code computes it",
        choices=("intended", "released"),
    )
    chunk_size: int | None = param(
        None, "released: tokens per chunk, whole blocks; None: chosen by length, as by the authors",
        least=1, kind=int,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule == "released" and self.select != "top_p":
            raise ValueError(
                f"XAttention: rule='released' needs select='top_p', not {self.select!r}"
            )
        if self.chunk_size is not None and self.rule != "released":
            raise ValueError(f"XAttention: chunk_size={self.chunk_size} needs rule='released'")
        if self.chunk_size is not None and self.chunk_size % self.block_size:
            raise ValueError(
                f"XAttention: chunk_size={self.chunk_size} must be a multiple of "
                f"block_size={self.block_size}"
            )
        if self.thresholds is not None:
            self._check_thresholds()

    def _check_thresholds(self) -> None:
        if self.select not in ("top_p", "per_head_budget") or self.gamma != type(self).gamma:
            raise ValueError(
                f"{_OWNER}={self.thresholds!r} replaces gamma, which only top_p and "
                f"per_head_budget read; got select={self.select!r}, gamma={self.gamma!r}"
            )
        for layer, row in enumerate(self._layers):
            if not (isinstance(row, list) and row and all(_is_share(number) for number in row)):
                raise ValueError(
                    f"{_OWNER}: {self.thresholds!r}, layer {layer}: {str(row)[:80]} must be a list "
                    "of numbers from 0 to 1, one per query head"
                )

    @cached_property
    def _layers(self) -> list[Any]:
        """Rows of the thresholds file, one per layer."""
        assert self.thresholds is not None
        return read_layers(_OWNER, self.thresholds)

    def for_layer(self, layer: int) -> XAttention:
        """This method with the thresholds of one layer as its `gamma`.

        Raises:
            ValueError: the thresholds file has no such layer.
        """
        if self.thresholds is None:
            return self
        gamma = tuple(entry_of(self._layers, layer, _OWNER, self.thresholds))
        return dataclasses.replace(self, gamma=gamma, thresholds=None)

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """See BlockScorer.plan.

        Raises:
            ValueError: `thresholds` is set (use `for_layer` first), or its row for this layer does
                not have one number per query head.
        """
        if self.thresholds is not None:
            raise ValueError(
                f"{_OWNER}={self.thresholds!r} differ by layer: plan with for_layer(i).plan(...)"
            )
        return super().plan(q, k, scale=scale, q_offset=q_offset)

    def block_scores(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> Tensor:
        return antidiagonal_scores(q, k, scale, block=self.block_size, stride=self.stride)

    def choose(
        self, scores: Tensor, grid: BlockGrid, q: Tensor, k: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        order, count = super().choose(scores, grid, q, k, scale)
        if self.rule == "released" and grid.q_offset == 0:
            rows = (self.chunk_size or _released_chunk(grid.kv_len)) // self.block_size
            slipped = self._first_chunk_count(scores[:, :rows], grid)
            # Never below the intended rule's count, which other parameters may have raised.
            count[:, :rows] = torch.maximum(count[:, :rows], slipped)
        return order, count

    def _first_chunk_count(self, scores: Tensor, grid: BlockGrid) -> Tensor:
        """int64 `[heads, rows]`: blocks that the released code keeps in its first chunk.

        A row's own block is forced; any other (block 0 too) is taken while the mass before the
        previous one is below the target; then the sinks are added.
        """
        rows = scores.shape[1]
        mass = mass_of(scores, grid.causal()[:rows])
        own = grid.forced(0, self.local_blocks)[:rows].expand_as(mass)
        counted = (mass * own).sum(-1, keepdim=True).double()
        others, order = mass.masked_fill(own, 0.0).sort(dim=-1, descending=True, stable=True)
        running = counted + others.double().cumsum(-1)
        nothing = torch.zeros_like(counted)
        lagging = torch.cat([nothing, counted, running[..., :-2]], -1)[..., : mass.shape[-1]]
        target = mass.double().sum(-1, keepdim=True) * per_head(
            self.gamma, mass.shape[0], mass.device
        )
        taken = torch.zeros_like(own).scatter_(-1, order, lagging < target) & (mass > 0)
        return (taken | own | grid.forced(self.sink_blocks, 0)[:rows]).sum(-1)


def _released_chunk(kv_len: int) -> int:
    """Tokens per chunk that the authors' code takes for a prompt of this length."""
    power = 1 << (kv_len - 1).bit_length()
    return max(2048, min(max(2048, power), (1 << 28) // power))


def _is_share(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and 0 <= number <= 1
