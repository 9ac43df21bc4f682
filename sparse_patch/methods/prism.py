"""Prism: mean-pooled scores of two RoPE bands, each at its own temperature, joined.

Averaging a block cancels its fast rotations and leaves the slow ones, which then drown what the
fast ones say about position. So fast and slow dimensions are scored separately. With pair i of a
head being the dimensions (i, i + d/2), ordered from fast to slow,

    high band: the first `high` of the pairs       low band: the last `low` of them
    T = sqrt(d_band / d) * rms(Q_band) / rms(Q) * rms(K_band) / rms(K)
    p[m, n] = softmax over causal n of  Q_band[m] . K_band[n] / (sqrt(d_band) * T)

where Q and K are block means and rms runs over a head's blocks and the band's dimensions. A row
keeps a block when either band does: the union of two top-p sets, plus the first block and its own.
Other policies join the choices of the two bands in the same way.

Source: Prism (arXiv:2602.08426); the bands are its 64 and 96 of 128 dimensions as fractions. They
assume rotary embedding over the whole head in the rotate-half layout, as in Llama, Qwen and most
models of Transformers; in a model that rotates otherwise they are just two sets of dimensions. The
scale of the model stands in place of 1/sqrt(d).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from sparse_patch_kernels.estimators.pooling import grouped_scores, pool_mean
from torch import Tensor

from .. import selection
from ..block_scorer import BlockScorer
from ..registry import Examples, Knob, param, register
from ..selection import BlockGrid


@register("prism")
@dataclass(frozen=True)
class Prism(BlockScorer):
    """Mean-pooled scores of fast and slow RoPE dimensions, each with its own temperature."""

    source: ClassVar[str] = "arXiv:2602.08426"
    examples: ClassVar[Examples] = {
        "sparse": {"block_size": 16, "gamma": 0.5},
        "everything": {"gamma": 1.0},
    }
    knob: ClassVar[Knob | None] = Knob.share("gamma")
    forced_first: ClassVar[bool] = False

    gamma: float | tuple[float, ...] = param(
        0.95, "top_p and budgets: share of the mass to keep", above=0, upto=1, per_head=True
    )
    high: float = param(0.5, "share of the RoPE pairs in the fast band", above=0, upto=1)
    low: float = param(0.75, "share of the RoPE pairs in the slow band", above=0, upto=1)

    def block_scores(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> Tensor:
        """Log mass of each block pair, once per band; `choose` joins them.

        Returns:
            float32 `[2, heads, rows, blocks]`, the high band first.

        Raises:
            ValueError: head_dim is odd.
        """
        dim = q.shape[2]
        if dim % 2:
            raise ValueError(f"Prism: rotary pairs need an even head_dim, got {dim}")
        queries, keys = pool_mean(q, self.block_size, q_offset), pool_mean(k, self.block_size)
        pairs = torch.arange(dim, device=q.device) % (dim // 2)
        n_high, n_low = (max(1, round(share * dim / 2)) for share in (self.high, self.low))
        bands = pairs < n_high, pairs >= dim // 2 - n_low
        return torch.stack([_band_scores(queries, keys, band, scale) for band in bands])

    def choose(
        self, scores: Tensor, grid: BlockGrid, q: Tensor, k: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """BlockScorer.choose of each band of `scores [2, heads, rows, blocks]`, joined."""
        high, low = (super(Prism, self).choose(band, grid, q, k, scale) for band in scores)
        return selection.ranking_of(selection.mask_of(*high) | selection.mask_of(*low))


def _band_scores(q: Tensor, k: Tensor, band: Tensor, scale: float) -> Tensor:
    """Logits of one band at its temperature, from block means.

    1 / (sqrt(d_band) * T) is scale * d / d_band over the two energy ratios, with scale 1/sqrt(d).
    """
    share = float(band.float().mean())
    scores = grouped_scores(q[..., band], k[..., band], scale / share)
    energy = _energy(q, band).view(k.shape[0], -1) * _energy(k, band)[:, None]
    return scores / energy.flatten()[:, None, None]


def _energy(x: Tensor, band: Tensor) -> Tensor:
    """rms of a band over rms of all, per head: `[heads, blocks, dim]` -> `[heads]`."""
    of_band, of_all = (y.square().mean((1, 2)).sqrt() for y in (x[..., band], x))
    tiny = 1e-12  # an all-zero head has flat scores, not NaN
    return of_band.clamp(min=tiny) / of_all.clamp(min=tiny)
