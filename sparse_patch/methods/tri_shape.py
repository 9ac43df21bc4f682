"""Tri-shape: A-shape, and the last queries attend to every key.

Key j is kept for query i iff j < sink or i - j < window or i is one of the last `dense_rows`
queries. The sink and the window are token-exact. The dense rows are rounded up to whole query
blocks of `block_size` rows. With chunked prefill the last rows of every chunk are dense.

Source: MInference (microsoft/MInference, SCBench), whose n_init, n_local and n_last are the
defaults. `preset="triangle_mix"` is TriangleMix (arXiv:2507.21526): dense first layers, triangle
after, with its defaults for models of 32 layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sparse_patch_kernels import BlockPlan, RunList
from torch import Tensor

from ..registry import Examples, Knob, param, register
from .a_shape import AShape


@register("tri_shape")
@dataclass(frozen=True)
class TriShape(AShape):
    """Sink tokens, a local window, and all keys for the last queries."""

    source: ClassVar[str] = "microsoft/MInference; arXiv:2507.21526"
    examples: ClassVar[Examples] = {
        "sparse": {"sink": 3, "window": 21, "dense_rows": 5, "block_size": 16},
        "everything": {"window": 10000},
    }
    knob: ClassVar[Knob | None] = Knob.count("window", sink=64)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "triangle_mix": {"sink": 8, "window": 512, "dense_rows": 128, "dense_layers": 16}
    }

    dense_rows: int = param(
        100, "number of last query rows that attend to every key, in whole blocks", least=1
    )

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """Method.plan; None where the window or the dense rows cover everything."""
        shape = super().plan(q, k, scale=scale, q_offset=q_offset)
        if shape is None:
            return None
        dense = shape.last_rows(q.device) >= shape.kv_len - self.dense_rows
        if bool(dense.all()):
            return None
        starts = torch.arange(0, shape.kv_len, self.block_size, device=q.device)
        keys = dense[:, None] & (starts <= shape.last_rows(q.device)[:, None])
        everything = RunList.from_mask(keys[None], self.block_size)
        return dataclasses.replace(shape, runs=(everything,))
