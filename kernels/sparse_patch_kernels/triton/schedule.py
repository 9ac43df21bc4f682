"""The order in which the programs of the forward kernel start, as one kernel.

KV head by KV head, since their keys stay in the cache, and of each the longest rows first, so that
the last to finish are short. The place of a task is the number of tasks of its KV head that go
before it: counted, which for the hundreds to thousands there are takes a GPU less time than a sort.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..plan import BlockPlan
from .launch import launch
from .layout import KeyList
from .tiles import power_of_two


@triton.jit
def _work(
    unit, block, here, table, counts, count_lists, units, n_blocks, reach,
    UNITS: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """How many keys tasks walk, at most: int32 like `unit` and `block`; -1 where not `here`."""
    entry = table + block * (5 + LISTS)
    n_rows = tl.load(entry + 1, mask=here, other=0)
    first = tl.load(entry + 2, mask=here, other=0)
    work = tl.minimum(first + n_rows, reach)
    for i in tl.static_range(LISTS):
        row = unit * count_lists[i] // units
        work += tl.load(counts[i] + row * n_blocks + block, mask=here, other=0) * UNITS[i]
    return tl.where(here, work, -1)


@triton.jit
def longest_first(
    out, table, counts, count_lists, units, units_per_head, n_blocks, reach,
    UNITS: tl.constexpr, LISTS: tl.constexpr, TASKS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Place TASKS tasks of one KV head. reach: keys of sink and window together."""
    n = units_per_head * n_blocks
    first = tl.program_id(1) * n
    task = tl.program_id(0) * TASKS + tl.arange(0, TASKS)
    mine = _work(
        (first + task) // n_blocks, task % n_blocks, task < n, table, counts, count_lists, units,
        n_blocks, reach, UNITS, LISTS,
    )  # fmt: skip
    place = tl.zeros([TASKS], tl.int32)
    for start in range(0, n, OTHERS):
        other = start + tl.arange(0, OTHERS)
        work = _work(
            (first + other) // n_blocks, other % n_blocks, other < n, table, counts, count_lists,
            units, n_blocks, reach, UNITS, LISTS,
        )  # fmt: skip
        longer = work[None, :] > mine[:, None]
        # Of equals the first goes first: places must differ.
        longer = longer | ((work[None, :] == mine[:, None]) & (other[None, :] < task[:, None]))
        place += tl.sum(longer.to(tl.int32), 1)
    tl.store(out + first + place, first + task, mask=task < n)


def schedule(
    plans: Sequence[BlockPlan], lists: Sequence[KeyList], table: Tensor, units: int, kv_heads: int
) -> Tensor:
    """int32 `[units * blocks]`: tasks, `unit * blocks + block`, in the order to start them.

    Args:
        plans: one a sequence, all of one form.
        lists: their run lists, see `layout.key_lists`.
        table: see `layout.block_table`.
        units: heads, or groups of heads that share a tile; a multiple of `kv_heads`.
        kv_heads: KV heads.
    """
    blocks = len(table)
    out = table.new_empty(units * blocks)
    tasks = units // kv_heads * blocks
    per_program = power_of_two(tasks, 16, 64)
    launch(
        longest_first,
        (-(-tasks // per_program), kv_heads),
        {
            "out": out,
            "table": table,
            "counts": tuple(one.count for one in lists),
            "count_lists": tuple(one.count.shape[0] for one in lists),
            "units": units,
            "units_per_head": units // kv_heads,
            "n_blocks": blocks,
            "reach": plans[0].sink + plans[0].window,
            "UNITS": tuple(one.units for one in lists),
            "LISTS": len(lists),
            "TASKS": per_program,
            "OTHERS": power_of_two(tasks, 16, 128),
        },
        [triton.Config({}, num_warps=4)],
        [],
    )
    return out
