"""Attention mass of block pairs, from a sample of queries and keys or from antidiagonal sums.

Logits are made once. For every row and block of keys one number is left, the log of what the block
adds to the row's sum, or the block's largest logit. Then `_block_scores` knows what each row sums
to, and reduces the rows of each query block. The numbers left take a small part of the memory of
the logits, one in 128 where blocks hold 128 keys, and at most _ELEMENTS of them are held at a time.
To make the logits a second time instead would cost as many products as the first, and products
are what takes the time.

Every query block has as many slots as rows may be sampled of it; where it has fewer, slots stay
empty. Heads of a KV group take turns in the list of rows: a tile of rows reads keys once for all
heads, and its positions are few, so that little of what it computes lies in the future.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton.launch import Chip, chip_of, launch
from ...triton.tiles import (
    LN2,
    LOG2E,
    load_rows,
    load_split,
    log2_add,
    log2_sum,
    power_of_two,
    products,
    split_dim,
)

__all__ = ["antidiagonal_scores", "pooled_rows", "token_scores"]

# Numbers left for rows and blocks of keys, at a time: 128 MiB.
_ELEMENTS = 1 << 25
# Keys of a program of `_token_parts`: enough to make up for loading the queries.
_CHUNK = 1024
# Numbers that a program of `_block_scores` reads at a time: 32 a thread.
_COMBINED = 4096


def token_scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    *,
    block: int,
    block_k: int | None = None,
    stride_q: int = 1,
    stride_k: int = 1,
    reduce: str = "sum",
) -> Any:
    """As `plain.token_scores`: float32 `[heads, rows, blocks]`.

    NotImplemented where a key block holds more than 256 sampled keys, or no power of two of them.
    """
    block_k = block_k or block
    if block_k % stride_k or not _fits(block_k // stride_k, 256):
        return NotImplemented
    return _scores(q, k, scale, block, block_k, stride_q, stride_k, reduce, None)


def antidiagonal_scores(q: Tensor, k: Tensor, scale: float, *, block: int, stride: int) -> Any:
    """As `plain.antidiagonal_scores`: float32 `[heads, rows, blocks]`.

    Rows of groups are read where they lie. NotImplemented where a block holds more than 128
    groups, or no power of two of them.
    """
    groups = block // stride
    if not _fits(groups, 128):
        return NotImplemented
    return _scores(q, k, scale / stride, groups, groups, 1, 1, "sum", stride)


def pooled_rows(
    q: Tensor,
    k: Tensor,
    scale: float,
    rows: Tensor,
    seen: Tensor,
    *,
    width: int,
    largest: bool = False,
) -> Any:
    """As `plain.pooled_rows`: float32 `[heads, n, ceil(n_keys / width)]`.

    NotImplemented for the largest of a block, and where `width` is above 256 or no power of two.
    """
    if largest or not _fits(width, 256):
        return NotImplemented
    q = q.to(torch.promote_types(q.dtype, k.dtype))
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    (heads, _, _), (kv_heads, end, _), n = q.shape, k.shape, len(rows)
    columns = triton.cdiv(end, width)
    part = torch.empty(heads * n, columns, dtype=torch.float32, device=q.device)
    sample = {
        "part": part,
        "first_block": 0,
        "n_rows": n,
        "offset": 0,
        "end": end,
        "columns": columns,
        "BLOCK": 1,
        "SLOTS": 1,
        "STRIDE_Q": 1,
        "STRIDE_K": 1,
        "GROUP": heads // kv_heads,
        "WIDTH": width,
    }
    listed = rows.contiguous(), seen.contiguous()
    _launch_tokens(q, k, scale, sample, part, end, listed)
    hidden = torch.arange(0, end, width, device=q.device) >= seen[:, None]
    part = part.view(kv_heads, n, -1, columns).masked_fill_(hidden[:, None], float("-inf"))
    mass = part.mul_(LN2.value).softmax(-1)
    return mass.transpose(1, 2).reshape(heads, n, columns)


def _fits(width: int, most: int) -> bool:
    return width == power_of_two(width) and width <= most


def _scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    block: int,
    block_k: int,
    stride_q: int,
    stride_k: int,
    reduce: str,
    fold: int | None,
) -> Tensor:
    """Scores of tokens, or of groups of `fold` tokens; blocks and strides count these."""
    q = q.to(torch.promote_types(q.dtype, k.dtype))
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    (heads, q_len, _), (kv_heads, kv_len, _) = q.shape, k.shape
    offset, end = (kv_len - q_len) // (fold or 1), triton.cdiv(kv_len, fold or 1)
    first_block, n_blocks = offset // block, triton.cdiv(end, block)
    columns, slots = triton.cdiv(end, block_k), triton.cdiv(block, stride_q)
    result = torch.empty(
        heads, n_blocks - first_block, columns, dtype=torch.float32, device=q.device
    )
    step = min(max(1, _ELEMENTS // (heads * slots * columns)), n_blocks - first_block)
    part = torch.empty(heads * step * slots, columns, dtype=torch.float32, device=q.device)
    norm, norm_width = part, block_k // stride_k
    if reduce == "max":
        chunks = triton.cdiv(triton.cdiv(end, stride_k), _CHUNK)
        norm = torch.empty(heads * step * slots, chunks, dtype=torch.float32, device=q.device)
        norm_width = _CHUNK
    for first in range(first_block, n_blocks, step):
        blocks = min(step, n_blocks - first)
        sample = {
            "part": part,
            "first_block": first,
            "n_rows": blocks * slots,
            "offset": offset,
            "end": end,
            "columns": columns,
            "BLOCK": block,
            "SLOTS": slots,
            "STRIDE_Q": stride_q,
            "STRIDE_K": stride_k,
            "GROUP": heads // kv_heads,
            "WIDTH": block_k // stride_k,
        }
        seen = triton.cdiv(min((first + blocks) * block, end), stride_k)
        if fold is None:
            _launch_tokens(q, k, scale, sample, norm, seen)
        else:
            _launch_groups(q, k, scale, sample, seen, fold)
        tile = power_of_two(slots)
        combine = {
            **sample,
            "norm": norm,
            "norms": norm.shape[1],
            "result": result,
            "result_head": result.stride(0),
            "first_row": first - first_block,
            "NORM_WIDTH": norm_width,
            "SLOT_TILE": tile,
            "STEP": max(16, _COMBINED // tile),
            "REDUCE": reduce,
        }
        launch(_block_scores, (blocks, heads, 1), combine, (triton.Config({}, num_warps=8),), ())
    return result


def _launch_tokens(
    q: Tensor,
    k: Tensor,
    scale: float,
    sample: dict[str, Any],
    norm: Tensor,
    seen: int,
    listed: tuple[Tensor, Tensor] | None = None,
) -> None:
    """`listed`: rows of q, and the keys that each sees, in place of the sample's slots."""
    dim, width, rows = q.shape[2], sample["WIDTH"], sample["n_rows"] * sample["GROUP"]
    d0, d1 = split_dim(dim)
    # 128 x 128 leaves a thread 128 registers: two programs on an SM, of which one multiplies while
    # the other adds up.
    block_m, block_n = (128, 128) if width <= 128 else (64, 256)
    chip, row_bytes = chip_of(q), dim * q.element_size()
    if chip.backend == "hip" and row_bytes > 384:
        block_m = 64  # 128 spill
    arguments = {
        **sample,
        **_rows(q, k),
        "scale": scale,
        "norm": norm,
        "norms": norm.shape[1],
        "listed_row": sample["part"] if listed is None else listed[0],
        "listed_seen": sample["part"] if listed is None else listed[1],
        "LISTED": listed is not None,
        "LARGEST": norm is not sample["part"],
        "DIM": dim,
        "D0": d0,
        "D1": d1,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "CHUNK": _CHUNK,
    }
    grid = (triton.cdiv(seen, _CHUNK), triton.cdiv(rows, block_m), k.shape[0])
    # Two tiles of keys on their way; one where two do not fit.
    fits = _staged(2, block_n * row_bytes, chip)
    stages = (2, 1) if fits else (1,)
    configs = [triton.Config({}, num_warps=8, num_stages=n) for n in stages]
    launch(_token_parts, grid, arguments, configs, ("DIM", "WIDTH", "GROUP", "LARGEST"))


def _launch_groups(
    q: Tensor, k: Tensor, scale: float, sample: dict[str, Any], seen: int, fold: int
) -> None:
    dim, rows = q.shape[2], sample["n_rows"] * sample["GROUP"]
    # Every number loaded is used once per row of the other side, and loading is what limits: so the
    # largest tile whose sums fit the registers. Without tensor cores, float32, less fits.
    block_m, block_n, piece = 128, 256, 64 if dim % 64 == 0 else 32
    chip = chip_of(q)
    if chip.backend == "cuda" and chip.shared_bytes < 128 * 1024:
        block_n = 128  # 256 spill on sm_86
    if q.dtype == torch.float32:
        block_n, piece = 128, 16
    arguments = {
        **sample,
        **_rows(q, k),
        "scale": scale,
        "q_len": q.shape[1],
        "kv_len": k.shape[1],
        "FOLD": fold,
        "DIM": dim,
        "PIECE": piece,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    grid = (triton.cdiv(seen, block_n), triton.cdiv(rows, block_m), k.shape[0])
    # 48 KiB a stage: three fit an A100, four an H100.
    stage = (block_m + block_n) * piece * q.element_size()
    configs = [
        triton.Config({}, num_warps=8, num_stages=n) for n in (3, 4, 2) if _staged(n, stage, chip)
    ]
    launch(_group_parts, grid, arguments, configs, ("DIM", "WIDTH", "GROUP", "FOLD"))


def _staged(stages: int, stage_bytes: int, chip: Chip) -> bool:
    """Do so many stages fit the shared memory, with 2 KiB for what else lies there?

    AMD's compiler keeps one of them in registers.
    """
    return (stages - (chip.backend == "hip")) * stage_bytes + 2048 <= chip.shared_bytes


def _rows(q: Tensor, k: Tensor) -> dict[str, Any]:
    return {
        "q": q,
        "k": k,
        "q_head": q.stride(0),
        "q_row": q.stride(1),
        "k_head": k.stride(0),
        "k_row": k.stride(1),
    }


@triton.jit
def _sampled(
    row,
    first_block,
    offset,
    end,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    STRIDE_Q: tl.constexpr,
):
    """Positions of slots, counted from the slots of `first_block`, and which of them are filled.

    A block's rows are its positions from `offset` to `end` that are multiples of the stride; the
    last position where none is.
    """
    block = first_block + row // SLOTS
    start = tl.maximum(block * BLOCK, offset)
    stop = tl.minimum((block + 1) * BLOCK, end)
    first = (start + STRIDE_Q - 1) // STRIDE_Q * STRIDE_Q
    position = first + row % SLOTS * STRIDE_Q
    alone = (first >= stop) & (row % SLOTS == 0)
    return tl.where(alone, stop - 1, position), alone | (position < stop)


@triton.jit(do_not_specialize=["first_block", "n_rows", "offset", "end", "columns", "norms"])
def _token_parts(
    q,
    k,
    part,
    norm,
    scale,
    q_head,
    q_row,
    k_head,
    k_row,
    first_block,
    n_rows,
    offset,
    end,
    columns,
    norms,
    listed_row,
    listed_seen,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    LISTED: tl.constexpr,
    LARGEST: tl.constexpr,
    DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of a tile of rows and a chunk of keys: what each block of keys adds to each row.

    With LARGEST the largest logit of each block, and in `norm` what the chunk adds to each row.
    """
    chunk = tl.program_id(0)
    kv_head = tl.program_id(2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if LISTED:
        filled = m < n_rows * GROUP
        position = tl.load(listed_row + m // GROUP, mask=filled, other=0).to(tl.int32)
        keys = tl.load(listed_seen + m // GROUP, mask=filled, other=0).to(tl.int32)
    else:
        position, filled = _sampled(m // GROUP, first_block, offset, end, BLOCK, SLOTS, STRIDE_Q)
        filled = filled & (m < n_rows * GROUP)
        keys = tl.where(filled, position // STRIDE_K + 1, 0)  # that each row sees
    seen_by_all = tl.min(tl.where(filled, keys, end), 0)
    first = chunk * CHUNK
    stop = tl.minimum(first + CHUNK, tl.max(keys, 0))
    if first < stop:
        head = (kv_head * GROUP + m % GROUP).to(tl.int64)
        q_rows = q + head * q_head + (position - offset).to(tl.int64) * q_row
        q0, q1 = load_split(q_rows, filled, DIM, D0, D1)
        k += kv_head.to(tl.int64) * k_head + first.to(tl.int64) * STRIDE_K * k_row
        row = kv_head.to(tl.int64) * n_rows * GROUP + m
        rows = part + row * columns
        total = tl.full([BLOCK_M], float("-inf"), tl.float32)
        for start in range(0, stop - first, BLOCK_N):
            inside = start + tl.arange(0, BLOCK_N)
            key = first + inside
            k_rows = k + inside * (STRIDE_K * k_row)
            score = products(q0, q1, q_rows, filled, k_rows, key < stop, DIM, D0, D1)
            score *= scale * LOG2E
            if first + start + BLOCK_N > seen_by_all:
                score = tl.where(key[None, :] < keys[:, None], score, float("-inf"))
            score = tl.reshape(score, [BLOCK_M, BLOCK_N // WIDTH, WIDTH])
            sums = log2_sum(score, 2)
            if LARGEST:
                total = log2_add(total, log2_sum(sums, 1))
                sums = tl.max(score, 2)
            column = (first + start) // WIDTH + tl.arange(0, BLOCK_N // WIDTH)
            mask = filled[:, None] & (column < columns)[None, :]
            tl.store(rows[:, None] + column[None, :], sums, mask=mask)
        if LARGEST:
            tl.store(norm + row * norms + chunk, total, mask=filled)


@triton.jit(
    do_not_specialize=["first_block", "n_rows", "offset", "end", "columns", "q_len", "kv_len"]
)
def _group_parts(
    q,
    k,
    part,
    scale,
    q_head,
    q_row,
    k_head,
    k_row,
    q_len,
    kv_len,
    first_block,
    n_rows,
    offset,
    end,
    columns,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    FOLD: tl.constexpr,
    DIM: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of a tile of query groups and one of key groups: what each block adds to each query group.

    A logit is a product of FOLD * DIM numbers, so here both tiles stream through, in pieces of one
    row of each group.
    """
    kv_head = tl.program_id(2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    position, filled = _sampled(m // GROUP, first_block, offset, end, BLOCK, SLOTS, STRIDE_Q)
    filled = filled & (m < n_rows * GROUP)
    keys = tl.where(filled, position + 1, 0)
    seen_by_all = tl.min(tl.where(filled, keys, end), 0)
    first = tl.program_id(0) * BLOCK_N
    if first < tl.max(keys, 0):
        head = (kv_head * GROUP + m % GROUP).to(tl.int64)
        # The last row of each query group and the first of each key group, which may lie outside.
        last_row = position * FOLD + (FOLD - 1) - (kv_len - q_len)
        q_rows = q + head * q_head + last_row.to(tl.int64) * q_row
        inside = tl.arange(0, BLOCK_N)
        k_rows = k + kv_head.to(tl.int64) * k_head + first.to(tl.int64) * (FOLD * k_row)
        k_rows += inside * (FOLD * k_row)
        first_row = (first + inside) * FOLD
        PIECES: tl.constexpr = (DIM + PIECE - 1) // PIECE
        score = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in range(0, FOLD * PIECES):
            p = i // PIECES
            start = i % PIECES * PIECE
            q_seen = filled & (last_row - p >= 0) & (last_row - p < q_len)
            k_seen = first_row + p < kv_len
            a = load_rows(q_rows - p * q_row, q_seen, start, PIECE, DIM, DIM % PIECE == 0)
            b = load_rows(k_rows + p * k_row, k_seen, start, PIECE, DIM, DIM % PIECE == 0)
            score = tl.dot(a, tl.trans(b.to(a.dtype)), score, input_precision="ieee")
        score *= scale * LOG2E
        if first + BLOCK_N > seen_by_all:
            seen = (first + inside)[None, :] < keys[:, None]
            score = tl.where(seen, score, float("-inf"))
        sums = log2_sum(tl.reshape(score, [BLOCK_M, BLOCK_N // WIDTH, WIDTH]), 2)
        column = first // WIDTH + tl.arange(0, BLOCK_N // WIDTH)
        rows = part + (kv_head.to(tl.int64) * n_rows * GROUP + m) * columns
        mask = filled[:, None] & (column < columns)[None, :]
        tl.store(rows[:, None] + column[None, :], sums, mask=mask)


@triton.jit(
    do_not_specialize=["first_block", "n_rows", "offset", "end", "columns", "norms", "first_row"]
)
def _block_scores(
    part,
    norm,
    result,
    result_head,
    first_row,
    first_block,
    n_rows,
    offset,
    end,
    columns,
    norms,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM_WIDTH: tl.constexpr,
    SLOT_TILE: tl.constexpr,
    STEP: tl.constexpr,
    REDUCE: tl.constexpr,
):
    """Of a head's query block: log mass of every key block, over its rows.

    A row's sum is that of `norm`, one number for every NORM_WIDTH keys.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.arange(0, SLOT_TILE)
    row = block * SLOTS + slot
    position, filled = _sampled(row, first_block, offset, end, BLOCK, SLOTS, STRIDE_Q)
    filled = filled & (slot < SLOTS)
    keys = tl.where(filled, position // STRIDE_K + 1, 0)
    at = ((head // GROUP).to(tl.int64) * n_rows + row) * GROUP + head % GROUP
    step = tl.arange(0, STEP)

    total = tl.full([SLOT_TILE], float("-inf"), tl.float32)
    for start in range(0, tl.cdiv(tl.max(keys, 0), NORM_WIDTH), STEP):
        column = start + step
        seen = (column * NORM_WIDTH)[None, :] < keys[:, None]
        some = tl.load(norm + at[:, None] * norms + column[None, :], mask=seen, other=float("-inf"))
        total = log2_add(total, log2_sum(some, 1))
    total = tl.where(filled, total, 0.0)

    result += head.to(tl.int64) * result_head + (first_row + block).to(tl.int64) * columns
    for start in range(0, columns, STEP):
        column = start + step
        seen = (column * WIDTH)[None, :] < keys[:, None]
        some = tl.load(
            part + at[:, None] * columns + column[None, :], mask=seen, other=float("-inf")
        )
        some -= total[:, None]
        if REDUCE == "max":
            score = tl.max(some, 0)
        elif REDUCE == "rms":
            score = log2_sum(some * 2, 0) / 2
        else:
            score = log2_sum(some, 0)
        tl.store(result + column, score * LN2, mask=column < columns)
