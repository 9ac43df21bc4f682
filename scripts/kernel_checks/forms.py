"""The forms of plans that the forward kernel is compiled for: each that a method makes, and more.

A form is what of a plan, and of the call, becomes constants of the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sparse_patch_kernels import BlockPlan, RunList

from kernel_checks.case import HEADS, KV_HEADS, TOKENS, empty


@dataclass(frozen=True)
class Form:
    """What of a plan becomes constants of the kernel.

    Attributes:
        block_q: rows of a query block.
        lists: width, pool, number of lists and number of counts of each run list.
        order: is there a `key_order`.
        sequences: how many share the launch.
        softcap, sinks: options of the call.
    """

    block_q: int = 128
    lists: tuple[tuple[int, int, int, int], ...] = ((128, 1, HEADS, HEADS),)
    sink: int = 0
    window: int = 0
    order: bool = False
    sequences: int = 1
    softcap: float | None = None
    sinks: bool = False

    def plan(self) -> BlockPlan:
        """A plan of this form whose lists hold nothing."""
        blocks = -(-TOKENS // self.block_q)
        return BlockPlan(
            q_len=TOKENS,
            kv_len=TOKENS,
            block_q=self.block_q,
            runs=tuple(
                RunList(
                    empty(n, blocks, min(256, TOKENS // width), dtype=torch.int32),
                    empty(counts, blocks, dtype=torch.int32),
                    width,
                    pool,
                )
                for width, pool, n, counts in self.lists
            ),
            sink=self.sink,
            window=self.window,
            key_order=empty(HEADS, TOKENS, dtype=torch.int32) if self.order else None,
        )


OWN = HEADS
FORMS = {
    "blocks of 128": Form(),
    "blocks of 128, lists of all heads": Form(lists=((128, 1, 1, 1),)),
    "blocks of 128, ranked": Form(lists=((128, 1, KV_HEADS, OWN),)),
    "blocks of 128, sink, window": Form(sink=128, window=4096),
    "blocks of 128, key order": Form(order=True),
    "blocks of 128, some pooled": Form(lists=tuple((128, pool, OWN, OWN) for pool in (1, 2, 4, 8))),
    "blocks of 128, two sequences": Form(sequences=2),
    "blocks of 128, softcap": Form(softcap=50.0),
    "blocks of 128, attention sinks": Form(sinks=True),
    "blocks of 256": Form(256, ((256, 1, OWN, OWN),)),
    "blocks of 128 x 64": Form(128, ((64, 1, OWN, OWN),)),
    "blocks of 64": Form(64, ((64, 1, OWN, OWN),)),
    "blocks of 64, lists of a group": Form(64, ((64, 1, KV_HEADS, KV_HEADS),)),
    "blocks of 64 and single keys": Form(64, ((64, 1, OWN, OWN), (1, 1, OWN, OWN))),
    "runs of 16": Form(64, ((16, 1, OWN, OWN),)),
    "runs of 16, lists of all heads, sink, window": Form(64, ((16, 1, 1, 1),), 256, 1024),
    "runs of 8, sink, window": Form(64, ((8, 1, OWN, OWN),), 16, 256),
    "runs of 8, lists of all heads, sink, window": Form(64, ((8, 1, 1, 1),), 256, 1024),
    "runs of 2, sink, window": Form(32, ((2, 1, OWN, OWN),), 16, 256),
    "sink and window": Form(lists=(), sink=128, window=4096),
}
"""By the name under which the table has them; the first goes through all dimensions and types."""
