"""What a launch of the forward kernel needs beside q, k and v: lists, tables, tiles.

Built from shapes and by asynchronous tensor operations only: nothing waits for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..plan import BlockPlan
from ..runs import RunList
from .tiles import power_of_two


@dataclass(frozen=True)
class Tiling:
    """How the rows of a query block, of one head or of `pack` heads with one list, become tiles.

    Attributes:
        sub_rows: rows of a query block and head in one tile, padded to a power of two.
        subs: tiles that a query block is cut into.
        pack: heads in one tile.
        rows: rows of the tile, `sub_rows * pack` padded to a power of two, 16 or more.
    """

    sub_rows: int
    subs: int
    pack: int
    rows: int

    @classmethod
    def of(cls, block_q: int, shared: int, most: int) -> Tiling:
        """Tiles of at most `most` rows, for heads of which each `shared` have lists in common."""
        sub_rows = power_of_two(block_q, most=most)
        pack = max(n for n in range(1, shared + 1) if shared % n == 0 and n * sub_rows <= most)
        rows = power_of_two(sub_rows * pack, 16)
        return cls(sub_rows, -(-block_q // sub_rows), pack, rows)


@dataclass(frozen=True)
class KeyList:
    """One run list of all sequences, and the keys it reads.

    Attributes:
        start: int32 `[lists, blocks, n]`, contiguous.
        count: int32 `[counts, blocks]`, contiguous.
        units: keys a run; a pooled group is one key.
        pool: tokens a key.
        ranked: runs are in no order.
        k, v: `[kv heads, keys, dim]`: the call's own, or means.
        order: int32 `[orders, keys]` or None: the token in each slot, or the last of each group.
        reach: int32 like `order`: the latest token in a slot of the sequence up to here.
        base: the first key of each sequence in `k`, `v` and `order`.
        repeats: may it name keys that earlier unpooled lists name.
    """

    start: Tensor
    count: Tensor
    units: int
    pool: int
    ranked: bool
    k: Tensor
    v: Tensor
    order: Tensor | None
    reach: Tensor | None
    base: tuple[int, ...]
    repeats: bool


def key_lists(k: Tensor, v: Tensor, plans: Sequence[BlockPlan]) -> tuple[KeyList, ...]:
    """The run lists of sequences packed one after the other.

    Args:
        k, v: `[kv_heads, total keys, dim]`.
        plans: one a sequence, all of one form (see `check_form`).
    """
    kv_base = _starts([plan.kv_len for plan in plans])
    several = sum(run.pool == 1 for run in plans[0].runs) > 1
    orders = [plan.key_order for plan in plans if plan.key_order is not None]
    lists: list[KeyList] = []
    for i, run in enumerate(plans[0].runs):
        start, count, ranked = _joined_runs([plan.runs[i] for plan in plans], several)
        repeats = run.pool == 1 and any(one.pool == 1 for one in lists)
        source = (k, v, *_order_and_reach(orders), kv_base)
        if run.pool > 1:
            source = _pooled(k, v, plans, run.pool)
        lists.append(
            KeyList(start, count, run.width // run.pool, run.pool, ranked, *source, repeats)
        )
    return tuple(lists)


def _order_and_reach(orders: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """`KeyList.order` and `reach` from the order of each sequence, `[lists, slots]`."""
    if not orders:
        return None, None
    orders = [order.to(torch.int32) for order in orders]
    reach = [order.cummax(1).values for order in orders]
    return _joined(orders).contiguous(), _joined(reach).contiguous()


def _joined_runs(runs: Sequence[RunList], ascending: bool) -> tuple[Tensor, Tensor, bool]:
    """The lists of all sequences side by side: start, count, and whether they are ranked."""
    heads = max(run.heads for run in runs)
    ranked = any(run.ranked for run in runs)
    if ranked and ascending:  # to be searched, a list has to be in order
        expanded = [run.expand(heads) for run in runs]
        starts, counts, ranked = [one[0] for one in expanded], [one[1] for one in expanded], False
    else:
        starts, counts = [run.start for run in runs], [run.count for run in runs]
    longest = max(start.shape[2] for start in starts)
    if any(start.shape[2] < longest for start in starts):
        starts = [torch.nn.functional.pad(start, (0, longest - start.shape[2])) for start in starts]
    return _joined(starts).contiguous(), _joined(counts).contiguous(), ranked


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts `[heads or fewer, n, ...]` side by side, each for as many heads as the most has."""
    if len(parts) == 1:
        return parts[0]
    heads = math.lcm(*(part.shape[0] for part in parts))
    return torch.cat([part.repeat_interleave(heads // part.shape[0], 0) for part in parts], 1)


def _pooled(
    k: Tensor, v: Tensor, plans: Sequence[BlockPlan], pool: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, tuple[int, ...]]:
    """Means of each `pool` keys and values, their `KeyList.order` and `reach`, and their bases."""
    bases = _starts([plan.kv_len for plan in plans])
    keys, values, ends = [], [], []
    for plan, base in zip(plans, bases, strict=True):
        own = slice(base, base + plan.kv_len)
        order = plan.key_order
        keys.append(_means(k[:, own], order, pool))
        values.append(_means(v[:, own], order, pool))
        if order is not None:
            ends.append(plan.group_ends(pool))
    bases = _starts([one.shape[1] for one in keys])
    return _joined(keys), _joined(values), *_order_and_reach(ends), bases


def _means(x: Tensor, order: Tensor | None, pool: int) -> Tensor:
    """Means of neighbouring slots: `[kv heads x orders, n // pool, dim]`, at least one row."""
    if order is not None:
        pairs = math.lcm(x.shape[0], order.shape[0])
        pair = torch.arange(pairs, device=x.device)
        x = x[(pair * x.shape[0] // pairs)[:, None], order[pair * order.shape[0] // pairs].long()]
    whole = x.shape[1] // pool * pool
    if whole == 0:
        return x.new_zeros(x.shape[0], 1, x.shape[2])
    groups = x[:, :whole].reshape(x.shape[0], -1, pool, x.shape[2])
    return groups.mean(2, dtype=torch.float32).to(x.dtype)


def block_table(
    plans: Sequence[BlockPlan], lists: Sequence[KeyList], device: torch.device
) -> Tensor:
    """int32 `[blocks, 5 + lists]`, a row per query block of each sequence.

    First row in q, rows of the block, position of the first, first key in k, keys of the sequence;
    then the first key of the sequence in each list's own keys.
    """
    lengths = tuple((plan.q_len, plan.kv_len) for plan in plans)
    return _block_table(lengths, plans[0].block_q, tuple(one.base for one in lists), device)


@lru_cache(64)  # the layers of a model ask for the same
def _block_table(
    lengths: tuple[tuple[int, int], ...],
    block_q: int,
    bases: tuple[tuple[int, ...], ...],
    device: torch.device,
) -> Tensor:
    q_base = _starts([q_len for q_len, _ in lengths])
    kv_base = _starts([kv_len for _, kv_len in lengths])
    parts = []
    for i, (q_len, kv_len) in enumerate(lengths):
        first = torch.arange(0, q_len, block_q, dtype=torch.int32)
        same = [kv_base[i], kv_len, *(base[i] for base in bases)]
        columns = [first + q_base[i], (q_len - first).clamp(max=block_q),
                   first + kv_len - q_len, *(torch.full_like(first, x) for x in same)]  # fmt: skip
        parts.append(torch.stack(columns, 1))
    return torch.cat(parts).to(device)


def _starts(lengths: Sequence[int]) -> tuple[int, ...]:
    starts = [0]
    for length in lengths[:-1]:
        starts.append(starts[-1] + length)
    return tuple(starts)


def check_form(plans: Sequence[BlockPlan]) -> None:
    """Raise a ValueError where plans cannot share a launch."""
    first = plans[0]
    for i, plan in enumerate(plans[1:], 1):
        for name, mine, want in (
            ("block_q", plan.block_q, first.block_q),
            ("sink", plan.sink, first.sink),
            ("window", plan.window, first.window),
            ("a key_order", plan.key_order is not None, first.key_order is not None),
            ("run widths", [r.width for r in plan.runs], [r.width for r in first.runs]),
            ("pools", [r.pool for r in plan.runs], [r.pool for r in first.runs]),
        ):
            if mine != want:
                raise ValueError(
                    f"sequences of one launch must have plans of one form: {name} is {want!r} in "
                    f"plan 0 and {mine!r} in plan {i}"
                )
