"""Block-sparse attention: one kernel for every plan.

A program owns the rows of one query block, of one head or of several that share their lists and
their KV head, and walks the keys that the lists name with an online softmax in base 2:

    sink keys, then each run list, then the window; a key that several of them name counts once.

Lists are walked in tiles of BLOCK_N keys. Runs as long as a tile are read as they lie in memory;
shorter ones are gathered, so that a tile is always full. The tiles between the first and the last
that could hide a key from some row are found by binary search and run without any mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import BlockPlan
from .launch import Chip, chip_of, launch
from .layout import KeyList, Tiling, block_table, check_form, key_lists
from .schedule import schedule
from .tiles import split_dim

__all__ = ["attend_packed", "block_sparse_attention"]

LOG2E = math.log2(math.e)
# Offsets from here on take 64 bits; 32 take half the registers.
FAR = 2**31


@triton.jit
def _load(base, row, real, step, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
          MASKED: tl.constexpr, TRANSPOSED: tl.constexpr, INDEX: tl.constexpr):  # fmt: skip
    """Columns FIRST to FIRST + WIDTH of the given rows, 0 where there is none."""
    column = FIRST + tl.arange(0, WIDTH)
    if TRANSPOSED:
        at = base + row[None, :].to(INDEX) * step + column[:, None]
        rows = real[None, :]
        columns = (column < D)[:, None]
    else:
        at = base + row[:, None].to(INDEX) * step + column[None, :]
        rows = real[:, None]
        columns = (column < D)[None, :]
    if MASKED:
        mask = rows & columns if FIRST + WIDTH > D else rows
        x = tl.load(at, mask=mask, other=0.0)
    else:
        x = tl.load(at, mask=columns, other=0.0) if FIRST + WIDTH > D else tl.load(at)
    return x


@triton.jit
def _tile(
    acc0, acc1, best, total, q0, q1, row, key, real, position,
    k, k_step, v, v_step, bias, scale, softcap, sink, window,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    INDEX: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    NOT_SINK: tl.constexpr, NOT_WINDOW: tl.constexpr, ONLY_WINDOW: tl.constexpr,
):  # fmt: skip
    """Attend one tile of keys.

    acc0, acc1 `[rows, V0 and V1]`, best and total `[rows]`: the running softmax. key, position
    `[keys]`: where a key lies in memory and in the sequence; real: is there one.
    """
    scores = tl.dot(
        q0, _load(k, key, real, k_step, D, 0, D0, MASKED, True, INDEX), input_precision="ieee"
    )
    if D1 > 0:
        part = _load(k, key, real, k_step, D, D0, D1, MASKED, True, INDEX)
        scores = tl.dot(q1, part, scores, input_precision="ieee")
    if SOFTCAP:
        # cap * tanh(x / cap), with tanh(y) = 1 - 2 / (e^2y + 1).
        tanh = 1 - 2 / (tl.exp2(scores * (scale / softcap * 2.8853900817779268)) + 1)
        scores = tanh * softcap
        scale = 1.0
    if MASKED:
        seen = real[None, :] & (position[None, :] <= row[:, None])
        if NOT_SINK:
            seen = seen & (position >= sink)[None, :]
        if NOT_WINDOW:
            seen = seen & (row[:, None] - position[None, :] >= window)
        if ONLY_WINDOW:
            seen = seen & (row[:, None] - position[None, :] < window)
        scores = tl.where(seen, scores, float("-inf"))
    # The scale, above 0, goes into the exponent: one multiply-add a score scales and shifts.
    higher = tl.maximum(best, tl.max(scores, 1) * scale + bias)
    # Rows that have seen nothing yet: a difference of infinities would be NaN.
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    probs = tl.exp2(scores * scale - (shift - bias)[:, None])
    decay = tl.exp2(best - shift)
    total = total * decay + tl.sum(probs, 1)
    values = _load(v, key, real, v_step, V, 0, V0, MASKED, False, INDEX)
    probs = probs.to(values.dtype)
    acc0 = tl.dot(probs, values, acc0 * decay[:, None], input_precision="ieee")
    if V1 > 0:
        values = _load(v, key, real, v_step, V, V0, V1, MASKED, False, INDEX)
        acc1 = tl.dot(probs, values, acc1 * decay[:, None], input_precision="ieee")
    return acc0, acc1, higher, total


@triton.jit
def _span(
    acc0, acc1, best, total, q0, q1, row, first, end, start, n_keys, list_len, order, base,
    k, k_step, v, v_step, bias, scale, softcap, sink, window,
    starts, start_lists, start_step, counts, count_lists, head, heads, block, n_blocks,
    UNITS: tl.constexpr, POOL: tl.constexpr, ORDERED: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    INDEX: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    NOT_SINK: tl.constexpr, NOT_WINDOW: tl.constexpr,
    REPEATS: tl.constexpr, LIST: tl.constexpr, ALL_UNITS: tl.constexpr, ALL_POOLS: tl.constexpr,
):  # fmt: skip
    """Attend tiles `[first, end)` of one run list.

    A run is UNITS keys long (pooled ones count as one). start: the list; list_len: its runs;
    n_keys: slots there are. order: the key, or for pooled lists the position, of each slot.
    LIST: number of the list, in ALL_UNITS and ALL_POOLS; REPEATS: it may name keys that unpooled
    lists before it name.
    """
    lane = tl.arange(0, BLOCK_N)
    for tile in tl.range(first, end):
        if UNITS >= BLOCK_N:
            PER_RUN: tl.constexpr = (UNITS + BLOCK_N - 1) // BLOCK_N
            offset = tile % PER_RUN * BLOCK_N
            first_slot = tl.load(start + tile // PER_RUN) // POOL + offset
            slot = first_slot + lane
            real = (offset + lane < UNITS) & (slot < n_keys)
        else:
            column = tile * BLOCK_N + lane
            run = column // UNITS
            real = run < list_len
            slot = tl.load(start + run, mask=real, other=0) // POOL + column % UNITS
            real = real & (slot < n_keys)
        if ORDERED:
            if MASKED:
                position = tl.load(order + slot, mask=real, other=0)
            else:
                position = tl.load(order + slot)
        elif POOL > 1:
            position = slot * POOL + (POOL - 1)
        else:
            position = slot
        for j in tl.static_range(LIST):
            if REPEATS and ALL_POOLS[j] == 1:
                at = (head * start_lists[j] // heads * n_blocks + block).to(tl.int64)
                n = tl.load(counts[j] + head * count_lists[j] // heads * n_blocks + block)
                real = real & ~_lists(starts[j] + at * start_step[j], n, ALL_UNITS[j], slot)
        key = slot
        if ORDERED and POOL == 1:
            key = position
        acc0, acc1, best, total = _tile(
            acc0, acc1, best, total, q0, q1, row, base + key, real, position,
            k, k_step, v, v_step, bias, scale, softcap, sink, window,
            D, D0, D1, V, V0, V1, INDEX, SOFTCAP, MASKED, NOT_SINK, NOT_WINDOW, False,
        )  # fmt: skip
    return acc0, acc1, best, total


@triton.jit
def _lists(start, n, width, slot):
    """Does an ascending list of `n` runs name each slot?"""
    low = slot * 0
    high = low + n
    left = n
    while left > 0:
        middle = (low + high) // 2
        open_ = low < high
        after = tl.load(start + middle, mask=open_, other=0) <= slot
        low = tl.where(open_ & after, middle + 1, low)
        high = tl.where(open_ & ~after, middle, high)
        left = left // 2
    run = tl.load(start + low - 1, mask=low > 0, other=0)
    return (low > 0) & (slot - run < width)


@triton.jit
def _runs_until(start, n, last):
    """How many runs of an ascending list begin at or before `last`."""
    low = 0
    high = n
    while low < high:
        middle = (low + high) // 2
        if tl.load(start + middle) <= last:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def _runs_within(start, n, reach, n_keys, limit, UNITS: tl.constexpr, POOL: tl.constexpr):
    """How many runs of an ascending list come before the first that is cut short, or by which a
    slot has held a token after `limit`."""
    low = 0
    high = n
    while low < high:
        middle = (low + high) // 2
        end = tl.load(start + middle) // POOL + UNITS
        within = end <= n_keys
        if within:
            within = tl.load(reach + end - 1) <= limit
        if within:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def _range(
    acc0, acc1, best, total, q0, q1, row, first, end, base,
    k, k_step, v, v_step, scale, softcap, sink, window,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    INDEX: tl.constexpr, SOFTCAP: tl.constexpr, NOT_SINK: tl.constexpr, ONLY_WINDOW: tl.constexpr,
):  # fmt: skip
    """Attend the keys at positions `[first, end)`."""
    lane = tl.arange(0, BLOCK_N)
    for tile in tl.range(first, end, BLOCK_N):
        key = tile + lane
        acc0, acc1, best, total = _tile(
            acc0, acc1, best, total, q0, q1, row, base + key, key < end, key,
            k, k_step, v, v_step, 0.0, scale, softcap, sink, window,
            D, D0, D1, V, V0, V1, INDEX, SOFTCAP, True, NOT_SINK, False, ONLY_WINDOW,
        )  # fmt: skip
    return acc0, acc1, best, total


@triton.jit
def _store(base, step, row, real, x, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """base `[rows]`: a pointer a row."""
    column = FIRST + tl.arange(0, WIDTH)
    at = (base + row.to(tl.int64) * step)[:, None] + column[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=real[:, None] & (column < D)[None, :])


@triton.jit
def block_sparse_forward(
    q, k, v, out, lse, sinks, table, schedule, heads, kv_heads, n_blocks, n_rows,
    q_head, q_step, k_head, k_step: tl.constexpr, v_head, v_step: tl.constexpr, out_head, out_step,
    # one entry a run list
    list_k, list_v, list_k_head, list_k_step: tl.constexpr, list_v_head, list_v_step: tl.constexpr,
    list_kv_heads,
    starts, start_lists, start_step, counts, count_lists, orders, reaches, order_lists,
    order_step, scale, softcap, sink, window,
    UNITS: tl.constexpr, POOLS: tl.constexpr, RANKED: tl.constexpr, REPEATS: tl.constexpr,
    LISTS: tl.constexpr,
    SUB_ROWS: tl.constexpr, SUBS: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
    ORDERED: tl.constexpr, SINK: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, INDEX: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """See the module. table: `layout.block_table`; schedule: `[units * blocks]`, longest first."""
    task = tl.load(schedule + tl.program_id(0) // SUBS)
    unit = task // n_blocks
    block = task % n_blocks
    sub = tl.program_id(0) % SUBS * SUB_ROWS
    entry = table + block * (5 + LISTS)
    n_here = tl.load(entry + 1)
    head0 = unit * PACK

    # Rows of the tile: head by head, SUB_ROWS rows each.
    lane = tl.arange(0, ROWS)
    in_block = sub + lane % SUB_ROWS
    head = head0 + lane // SUB_ROWS
    real = (in_block < n_here) & (lane // SUB_ROWS < PACK)
    q_row = tl.load(entry) + in_block
    row = tl.load(entry + 2) + in_block
    last_row = tl.load(entry + 2) + tl.minimum(n_here, sub + SUB_ROWS) - 1
    # In a short last block a whole tile may lie past its rows: such a tile must not take keys past
    # the end for seen by all.
    first_row = tl.minimum(tl.load(entry + 2) + sub, last_row)
    base = tl.load(entry + 3)
    kv_len = tl.load(entry + 4)

    q_at = q + head.to(tl.int64) * q_head + q_row.to(tl.int64) * q_step
    d0 = tl.arange(0, D0)
    q0 = tl.load(q_at[:, None] + d0[None, :], mask=real[:, None] & (d0 < D)[None, :], other=0.0)
    q1 = q0
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = tl.load(q_at[:, None] + d1[None, :], mask=real[:, None] & (d1 < D)[None, :], other=0.0)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:
        # A key with a logit of its own and no value.
        best = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
        total = total + 1.0
    acc0 = tl.zeros([ROWS, V0], tl.float32)
    acc1 = acc0
    if V1 > 0:
        acc1 = tl.zeros([ROWS, V1], tl.float32)

    kv_head = (head0 * kv_heads // heads).to(tl.int64)
    k_own = k + kv_head * k_head
    v_own = v + kv_head * v_head
    if SINK:
        acc0, acc1, best, total = _range(
            acc0, acc1, best, total, q0, q1, row, 0, tl.minimum(sink, last_row + 1), base,
            k_own, k_step, v_own, v_step, scale, softcap, sink, window,
            BLOCK_N, D, D0, D1, V, V0, V1, INDEX, SOFTCAP, False, False,
        )  # fmt: skip

    for i in tl.static_range(LISTS):
        start = (
            starts[i]
            + (head0 * start_lists[i] // heads * n_blocks + block).to(tl.int64) * start_step[i]
        )
        n = tl.load(counts[i] + head0 * count_lists[i] // heads * n_blocks + block)
        list_head = (head0 * list_kv_heads[i] // heads).to(tl.int64)
        k_here = list_k[i] + list_head * list_k_head[i]
        v_here = list_v[i] + list_head * list_v_head[i]
        order = orders[i]
        reach = reaches[i]
        key_base = tl.load(entry + 5 + i)
        if ORDERED:
            at = (head0 * order_lists[i] // heads).to(tl.int64) * order_step[i] + key_base
            order += at
            reach += at
        bias = 0.0
        if POOLS[i] > 1:
            bias = tl.log2(POOLS[i] * 1.0)
        n_keys = kv_len // POOLS[i]
        if UNITS[i] >= BLOCK_N:
            tiles = n * ((UNITS[i] + BLOCK_N - 1) // BLOCK_N)
        else:
            tiles = (n * UNITS[i] + BLOCK_N - 1) // BLOCK_N
        # Tiles [clear, hidden) hold nothing that a row must not see.
        clear = 0
        hidden = 0
        if (
            not (ORDERED and SINK) and not RANKED[i] and not REPEATS[i]
            and (UNITS[i] < BLOCK_N or UNITS[i] % BLOCK_N == 0)
        ):  # fmt: skip
            limit = first_row
            if POOLS[i] == 1 and WINDOW:
                limit = first_row - window
            if ORDERED:
                runs = _runs_within(start, n, reach, n_keys, limit, UNITS[i], POOLS[i])
            else:
                runs = _runs_until(start, n, limit + 1 - UNITS[i] * POOLS[i])
            first_run = 0
            if POOLS[i] == 1 and SINK:
                first_run = tl.minimum(runs, _runs_until(start, n, sink - 1))
            if UNITS[i] >= BLOCK_N:
                clear = first_run * (UNITS[i] // BLOCK_N)
                hidden = runs * (UNITS[i] // BLOCK_N)
            else:
                clear = (first_run * UNITS[i] + BLOCK_N - 1) // BLOCK_N
                hidden = tl.maximum(clear, runs * UNITS[i] // BLOCK_N)
            if POOLS[i] == 1 and SINK:
                acc0, acc1, best, total = _span(
                    acc0, acc1, best, total, q0, q1, row, 0, clear,
                    start, n_keys, n, order, key_base,
                    k_here, list_k_step[i], v_here, list_v_step[i], bias, scale, softcap, sink,
                    window, starts, start_lists, start_step, counts, count_lists, head0, heads,
                    block, n_blocks,
                    UNITS[i], POOLS[i], ORDERED, BLOCK_N, D, D0, D1, V, V0, V1, INDEX, SOFTCAP,
                    True, True, WINDOW, REPEATS[i], i, UNITS, POOLS,
                )  # fmt: skip
            acc0, acc1, best, total = _span(
                acc0, acc1, best, total, q0, q1, row, clear, hidden,
                start, n_keys, n, order, key_base,
                k_here, list_k_step[i], v_here, list_v_step[i], bias, scale, softcap, sink,
                window, starts, start_lists, start_step, counts, count_lists, head0, heads,
                    block, n_blocks,
                UNITS[i], POOLS[i], ORDERED, BLOCK_N, D, D0, D1, V, V0, V1, INDEX, SOFTCAP, False,
                False, False, REPEATS[i], i, UNITS, POOLS,
            )  # fmt: skip
        acc0, acc1, best, total = _span(
            acc0, acc1, best, total, q0, q1, row, hidden, tiles,
            start, n_keys, n, order, key_base,
            k_here, list_k_step[i], v_here, list_v_step[i], bias, scale, softcap, sink,
            window, starts, start_lists, start_step, counts, count_lists, head0, heads,
                    block, n_blocks,
            UNITS[i], POOLS[i], ORDERED, BLOCK_N, D, D0, D1, V, V0, V1, INDEX, SOFTCAP, True,
            POOLS[i] == 1 and SINK, POOLS[i] == 1 and WINDOW, REPEATS[i], i, UNITS, POOLS,
        )  # fmt: skip

    if WINDOW:
        first = tl.maximum(first_row - window + 1, 0)
        if SINK:
            first = tl.maximum(first, sink)
        acc0, acc1, best, total = _range(
            acc0, acc1, best, total, q0, q1, row, first, last_row + 1, base,
            k_own, k_step, v_own, v_step, scale, softcap, sink, window,
            BLOCK_N, D, D0, D1, V, V0, V1, INDEX, SOFTCAP, False, True,
        )  # fmt: skip

    # Read again: kept through the loops, these would take registers from them.
    task = tl.load(schedule + tl.program_id(0) // SUBS, volatile=True)
    lane = tl.arange(0, ROWS)
    entry = table + task % n_blocks * (5 + LISTS)
    in_block = tl.program_id(0) % SUBS * SUB_ROWS + lane % SUB_ROWS
    head = task // n_blocks * PACK + lane // SUB_ROWS
    real = (in_block < tl.load(entry + 1, volatile=True)) & (lane // SUB_ROWS < PACK)
    q_row = tl.load(entry, volatile=True) + in_block
    # Nothing seen: no output, and a log-sum-exp of -inf.
    inverse = 1 / tl.where(total == 0, 1.0, total)
    at = out + head.to(tl.int64) * out_head
    _store(at, out_step, q_row, real, acc0 * inverse[:, None], V, 0, V0)
    if V1 > 0:
        _store(at, out_step, q_row, real, acc1 * inverse[:, None], V, V0, V1)
    tl.store(
        lse + head.to(tl.int64) * n_rows + q_row,
        (best + tl.log2(total)) * 0.6931471805599453,
        mask=real,
    )


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.block_sparse_attention`; float32, bfloat16 or float16."""
    return attend_packed(q, k, v, (plan,), scale, softcap, sinks)


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plans: Sequence[BlockPlan],
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Several sequences, one after the other, in one launch.

    Args:
        q: `[heads, total queries, dim]`.
        k, v: `[kv_heads, total keys, dim]` and `[kv_heads, total keys, v_dim]`.
        plans: one a sequence, of one form: their block_q, sink, window, widths and pools agree.
        scale, softcap, sinks: see `block_sparse_attention` of the package.

    Returns:
        As `reference.block_sparse_attention`; the output's memory is laid out
        `[total queries, heads, v_dim]`, as the layer after attention wants it.

    Raises:
        ValueError: the plans differ in form.
    """
    check_form(plans)
    if scale <= 0:  # the kernel takes the largest logit before it scales
        q, scale = (q.neg(), -scale) if scale else (torch.zeros_like(q), 1.0)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (heads, n_rows, dim), kv_heads, v_dim = q.shape, k.shape[0], v.shape[2]
    plan = plans[0]
    lists = key_lists(k, v, plans)
    table = block_table(plans, lists, q.device)
    (d0, d1), (v0, v1) = split_dim(dim), split_dim(v_dim)
    columns = d0 + d1 + v0 + v1
    shared = math.gcd(heads // kv_heads, *(heads // one.heads for one in plans))
    tiling = Tiling.of(plan.block_q, shared, most_rows(columns, q.itemsize))
    units = heads // tiling.pack
    tasks = schedule(plans, lists, table, units, kv_heads)
    out = q.new_empty(n_rows, heads, v_dim).transpose(0, 1)
    lse = torch.empty(heads, n_rows, dtype=torch.float32, device=q.device)
    farthest = max(x.shape[1] * x.stride(1) for x in (k, v))
    launch(
        block_sparse_forward,
        (tiling.subs * units * len(table),),
        {
            "q": q,
            "k": k,
            "v": v,
            "out": out,
            "lse": lse,
            "sinks": q if sinks is None else sinks,
            "table": table,
            "schedule": tasks,
            "heads": heads,
            "kv_heads": kv_heads,
            "n_blocks": len(table),
            "n_rows": n_rows,
            "q_head": q.stride(0),
            "q_step": q.stride(1),
            "k_head": k.stride(0),
            "k_step": k.stride(1),
            "v_head": v.stride(0),
            "v_step": v.stride(1),
            "out_head": out.stride(0),
            "out_step": out.stride(1),
            **_list_arguments(lists, table),
            "scale": scale * LOG2E,
            "softcap": (softcap or 0.0) * LOG2E,
            "sink": plan.sink,
            "window": plan.window,
            "SUB_ROWS": tiling.sub_rows,
            "SUBS": tiling.subs,
            "PACK": tiling.pack,
            "ROWS": tiling.rows,
            "ORDERED": plan.key_order is not None,
            "SINK": plan.sink > 0,
            "WINDOW": plan.window > 0,
            "SOFTCAP": softcap is not None,
            "SINKS": sinks is not None,
            "INDEX": tl.int64 if farthest >= FAR else tl.int32,
            "D": dim,
            "D0": d0,
            "D1": d1,
            "V": v_dim,
            "V0": v0,
            "V1": v1,
        },
        configs(tiling.rows, columns, q.itemsize, tuple(one.units for one in lists), chip_of(q)),
        ["UNITS", "POOLS", "PACK", "ROWS", "ORDERED", "SINK", "WINDOW", "D", "V"],
    )
    return out, lse


def _list_arguments(lists: Sequence[KeyList], table: Tensor) -> dict[str, Any]:
    def each(of: Callable[[KeyList], Any]) -> tuple[Any, ...]:
        return tuple(of(one) for one in lists)

    # Pointers that are never read stand for orders that are not there.
    orders = [table if one.order is None else one.order for one in lists]
    reaches = [table if one.reach is None else one.reach for one in lists]
    return {
        "list_k": each(lambda one: one.k),
        "list_v": each(lambda one: one.v),
        "list_k_head": each(lambda one: one.k.stride(0)),
        "list_k_step": each(lambda one: one.k.stride(1)),
        "list_v_head": each(lambda one: one.v.stride(0)),
        "list_v_step": each(lambda one: one.v.stride(1)),
        "list_kv_heads": each(lambda one: one.k.shape[0]),
        "starts": each(lambda one: one.start),
        "start_lists": each(lambda one: one.start.shape[0]),
        "start_step": each(lambda one: one.start.shape[2]),
        "counts": each(lambda one: one.count),
        "count_lists": each(lambda one: one.count.shape[0]),
        "orders": tuple(orders),
        "reaches": tuple(reaches),
        "order_lists": tuple(x.shape[0] for x in orders),
        "order_step": tuple(x.shape[1] for x in orders),
        "UNITS": each(lambda one: one.units),
        "POOLS": each(lambda one: one.pool),
        "RANKED": each(lambda one: one.ranked),
        "REPEATS": each(lambda one: one.repeats),
        "LISTS": len(lists),
    }


def most_rows(columns: int, itemsize: int) -> int:
    """Rows of a tile: 128 in 16 bits at a head_dim of 128, fewer of wider heads.

    That fills the registers with accumulators, and the queries take 32 KiB. Products of float32 run
    outside of the tensor cores and need registers for both factors too.
    """
    rows = min(128 if itemsize == 2 else 32, 65536 // (columns * itemsize))
    return max(16, 1 << rows.bit_length() - 1)


def configs(
    rows: int, columns: int, itemsize: int, units: Sequence[int], chip: Chip
) -> tuple[triton.Config, ...]:
    """Configurations worth trying, the default first, that fit the chip's shared memory.

    Args:
        rows: rows of a tile.
        columns: numbers a key and its value hold together, padded.
        itemsize: bytes a number.
        units: keys a run of each list; what walks a list takes registers.
        chip: what it runs on.
    """
    warps = 8 if rows >= 128 or columns > 256 or len(units) > 1 else 4
    registers = None  # the most of a thread; None: ptxas weighs spills against occupancy
    # Wide tiles share the overhead of a step between more keys; more stages hide more latency.
    # 4 warps spill at 128 rows.
    tries = [(64, warps, 3), (32, warps, 3), (64, warps, 2), (32, warps, 2), (16, warps, 1)]
    if chip.arch == 90 and rows >= 64 and any(n < 64 for n in units):
        # Runs are gathered: with a third stage, ptxas 12.8 lets no product of a warp group overlap
        # another (C7515). Tiles of fewer rows have no such products, and spill with two stages.
        tries = [(64, warps, 2), (32, warps, 3), (32, warps, 2), (16, warps, 1)]
    elif chip.arch == 90 and rows == 128 and columns <= 256 and len(units) < 2:
        # Two thirds of the instructions a key that 64 take; on other chips 128 keys spill.
        tries.insert(0, (128, warps, 2))
    if itemsize > 2:
        tries = [(16, 8, 2), (16, 8, 1)]  # 32 keys spill on sm_90
        registers = None if chip.backend == "hip" else 255
    elif chip.backend == "hip":
        # 64 keys spill with 8 warps, and with 4 leave a SIMD a single wave.
        tries = [(32, warps, 2), (64, 4, 2), (16, warps, 1)]
    elif chip.shared_bytes < 128 * 1024:
        registers = 255
        if columns > 256:
            tries = [(16, warps, 3), (32, warps, 2), (16, warps, 1)]  # 32 keys spill on sm_86
    fits = [
        one for one in tries if _shared(one, rows, columns, chip) * itemsize <= chip.shared_bytes
    ]
    return tuple(
        triton.Config({"BLOCK_N": n}, num_warps=w, num_stages=stages, maxnreg=registers)
        for n, w, stages in fits
    )


def _shared(config: tuple[int, int, int], rows: int, columns: int, chip: Chip) -> int:
    """Numbers in shared memory, at most: keys and values of each stage, and queries or weights.

    Read off compiled kernels; scripts/compile_kernels.py fails where it is too little.
    """
    n, _, stages = config
    if chip.backend == "hip":
        return (stages - 1) * n * columns + rows * n
    return stages * n * columns + rows * columns // 2
