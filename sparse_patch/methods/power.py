"""Power: a window, the first block, and blocks at power-of-two distances. Static.

With D = m - n blocks between query block m and key block n, n is kept iff

    D < local_blocks   or   D is a power of two   or   n < sink_blocks

so a row keeps about local_blocks + log2(m) blocks, and after l layers information from 2^l blocks
reaches a token. All heads share one list.

Source: PowerAttention (arXiv:2503.03588), algorithm 1; defaults are its 256, 5 and 1. The pattern
needs no training but its quality does: the paper continues training and keeps two of every seven
layers dense, without saying which. Here the first two layers stay dense unless `dense_layers` (or
that argument of `sparse_patch.patch`, which takes indices too) says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparse_patch_kernels import BlockPlan
from torch import Tensor

from ..registry import Examples, Knob, Method, check_sequence, param, register
from ..selection import BlockGrid, to_query_grid


@register("power")
@dataclass(frozen=True)
class Power(Method):
    """Sink, window, and blocks at power-of-two distances."""

    source: ClassVar[str] = "arXiv:2503.03588"
    examples: ClassVar[Examples] = {
        "sparse": {"block_size": 16, "local_blocks": 2},
        "everything": {"local_blocks": 10000},
    }
    knob: ClassVar[Knob | None] = Knob.count("local_blocks", 1, 2048, block_size=64)

    block_size: int = param(256, "tokens per block", choices=(16, 32, 64, 128, 256))
    local_blocks: int = param(5, "latest blocks that a row keeps, its own included", least=1)
    sink_blocks: int = param(1, "first blocks that every row keeps", least=0)
    dense_layers: int = param(
        2, "number of first layers that sparse_patch.patch keeps exact", least=0
    )

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """Method.plan; None where the pattern leaves nothing out."""
        check_sequence(q, k, q_offset)
        q_len, kv_len, block = q.shape[1], k.shape[1], self.block_size
        grid = BlockGrid(q_len, kv_len, block, block, q.device)
        distance, causal = grid.distance(), grid.causal()
        power = (distance & (distance - 1)) == 0
        kept = causal & (power | grid.forced(self.sink_blocks, self.local_blocks))
        if bool((kept == causal).all()):
            return None
        mask = to_query_grid(kept[None], q_len, q_offset, block)
        return BlockPlan.from_block_mask(
            mask, block_q=block, block_k=block, q_len=q_len, kv_len=kv_len
        )
