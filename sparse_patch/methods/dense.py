"""Dense: every causal block, through the sparse op. The control that any method is compared with.

It costs what exact attention costs and must give the same answer; what differs is the code that
runs. For a baseline in time, use the unpatched model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from sparse_patch_kernels import BlockPlan, RunList
from torch import Tensor

from ..registry import Examples, Method, check_sequence, param, register


@register("dense")
@dataclass(frozen=True)
class Dense(Method):
    """Keeps everything: the control for correctness."""

    examples: ClassVar[Examples] = {"sparse": {"block_size": 16}, "everything": {}}

    block_size: int = param(128, "query rows and keys per block, tokens", least=1)

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan:
        check_sequence(q, k, q_offset)
        q_len, kv_len, block = q.shape[1], k.shape[1], self.block_size
        blank = BlockPlan(q_len, kv_len, block)
        starts = torch.arange(0, kv_len, block, device=q.device, dtype=torch.int32)
        count = (blank.last_rows(q.device) // block + 1).to(torch.int32)
        runs = RunList(starts.expand(1, blank.n_q_blocks, -1), count[None], block)
        return BlockPlan(q_len, kv_len, block, (runs,))
