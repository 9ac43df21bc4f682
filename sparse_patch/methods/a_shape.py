"""A-shape: the first tokens and a sliding window, nothing else. Token-exact.

Key j is kept for query i iff j < sink or i - j < window. Positions stay the model's own (unlike
StreamingLLM, which renumbers them inside its cache).

Source: StreamingLLM (arXiv:2309.17453) as MInference (arXiv:2407.02490) uses it for prefill;
defaults are MInference's n_init and n_local.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparse_patch_kernels import BlockPlan
from torch import Tensor

from ..registry import Examples, Knob, Method, check_sequence, param, register


@register("a_shape")
@dataclass(frozen=True)
class AShape(Method):
    """Sink tokens and a local window."""

    source: ClassVar[str] = "arXiv:2309.17453, as in MInference"
    examples: ClassVar[Examples] = {
        "sparse": {"sink": 3, "window": 21, "block_size": 16},
        "everything": {"window": 10000},
    }
    knob: ClassVar[Knob | None] = Knob.count("window", sink=64)

    sink: int = param(128, "first tokens that every query keeps", least=0)
    window: int = param(3968, "latest tokens that a query keeps, itself included", least=1)
    block_size: int = param(128, "query rows per block", least=1)

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        check_sequence(q, k, q_offset)
        q_len, kv_len = q.shape[1], k.shape[1]
        if kv_len <= self.window:
            return None
        return BlockPlan(q_len, kv_len, self.block_size, sink=self.sink, window=self.window)
