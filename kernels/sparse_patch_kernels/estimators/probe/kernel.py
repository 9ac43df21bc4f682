"""What a few queries give to each key and to each distance, from two passes over the keys.

A pass is cut into chunks of keys, a program each, so that a few queries fill a GPU. The first
leaves the log of what every row sums to over every chunk; the second makes the logits again and
writes sums of probabilities. Nothing of heads x queries x keys is stored.

Lines of equal distance cross the tiles of keys. R rows by N keys touch N + R - 1 distances: some
from where the tile begins, some from where the next one does. So the rows of a tile are turned
around, each by its distance from the last one, until equal distances are columns, and both sums of
each column are written; what a distance gets from two tiles is added at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton.launch import launch
from ...triton.tiles import (
    LN2,
    LOG2E,
    load_split,
    log2_add,
    log2_sum,
    power_of_two,
    products,
    split_dim,
)

__all__ = ["key_scores", "probe_lines"]

# Keys of a program (32 heads at 4k keys then make two for each SM of an H100) and of its tiles.
_CHUNK, _BLOCK_N = 512, 64
# Most rows of a tile, so that two programs share an SM. To turn rows around takes more registers;
# and of no more rows than keys, distances stay within two tiles.
_BLOCK_M, _TURNED_M = 128, 64


def probe_lines(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `plain.probe_lines`: float32 `[heads, kv_len]` twice."""
    vertical, parts = _sums(q, k, scale, causal=True)
    slash = torch.zeros_like(vertical)
    kv_len, rows = k.shape[1], power_of_two(q.shape[1], 16, _TURNED_M)
    for tile in range(parts.shape[1]):
        for half in range(2):
            shift = tile * rows + half * _BLOCK_N
            slash[:, shift:] += parts[:, tile, half, : max(kv_len - shift, 0)]
    return vertical, slash


def key_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """As `plain.key_scores`: float32 `[heads, kv_len]`."""
    return _sums(q, k, scale, causal=False)[0]


def _sums(q: Tensor, k: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Sums over keys, `[heads, kv_len]`, and, if causal, `[heads, row tiles, 2, tiled kv_len]`."""
    q = q.to(torch.promote_types(q.dtype, k.dtype))
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    (heads, n_probe, dim), (kv_heads, kv_len, _) = q.shape, k.shape
    group = heads // kv_heads
    d0, d1 = split_dim(dim)
    chunks = triton.cdiv(kv_len, _CHUNK)
    common: dict[str, Any] = {
        "q": q,
        "k": k,
        "scale": scale,
        "q_head": q.stride(0),
        "q_row": q.stride(1),
        "k_head": k.stride(0),
        "k_row": k.stride(1),
        "n_probe": n_probe,
        "kv_len": kv_len,
        "GROUP": group,
        "CAUSAL": causal,
        "DIM": dim,
        "D0": d0,
        "D1": d1,
        "BLOCK_N": _BLOCK_N,
        "CHUNK": _CHUNK,
    }
    tune_on = ("GROUP", "CAUSAL", "DIM", "BLOCK_M")

    # The rows of all heads of a KV group in one list.
    rows = power_of_two(group * n_probe, 16, _BLOCK_M)
    sums = torch.empty(kv_heads, chunks, group * n_probe, dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(group * n_probe, rows), chunks, kv_heads)
    launch(_row_sums, grid, {**common, "sums": sums, "BLOCK_M": rows}, _configs(q, rows), tune_on)

    rows = power_of_two(n_probe, 16, _TURNED_M if causal else _BLOCK_M)
    tiles = triton.cdiv(n_probe, rows)
    vertical = torch.empty(heads, tiles, kv_len, dtype=torch.float32, device=q.device)
    padded = triton.cdiv(kv_len, _BLOCK_N) * _BLOCK_N if causal else 0
    slash = torch.empty(heads, tiles, 2, padded, dtype=torch.float32, device=q.device)
    arguments = {
        **common,
        "lse": sums.logsumexp(1),
        "vertical": vertical,
        "slash": slash,
        "TILES": tiles,
        "BLOCK_M": rows,
    }
    launch(_line_sums, (group * tiles, chunks, kv_heads), arguments, _configs(q, rows), tune_on)
    return (vertical[:, 0] if tiles == 1 else vertical.sum(1)), slash


def _configs(q: Tensor, rows: int) -> tuple[triton.Config, ...]:
    # Three tiles of keys on their way where they are small; the last resort is for GPUs with 99 KiB
    # of shared memory.
    stages = (3, 2) if q.shape[2] * q.element_size() <= 256 else (2, 1)
    warps = 8 if rows == _BLOCK_M else 4
    return tuple(triton.Config({}, num_warps=warps, num_stages=n) for n in stages)


@triton.jit(do_not_specialize=["n_probe", "kv_len"])
def _row_sums(
    q,
    k,
    sums,
    scale,
    q_head,
    q_row,
    k_head,
    k_row,
    n_probe,
    kv_len,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Log of what each row sums to over each chunk of keys: `[kv_heads, chunks, rows]`."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = tl.program_id(1)
    kv_head = tl.program_id(2)
    row = m % n_probe
    head = (kv_head * GROUP + m // n_probe).to(tl.int64)
    exists = m < GROUP * n_probe
    q_rows = q + head * q_head + row.to(tl.int64) * q_row
    q0, q1 = load_split(q_rows, exists, DIM, D0, D1)
    ends = tl.zeros_like(row) + kv_len
    if CAUSAL:
        ends += row + 1 - n_probe

    first = chunk * CHUNK
    k += kv_head.to(tl.int64) * k_head + first.to(tl.int64) * k_row
    total = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in range(0, tl.minimum(CHUNK, kv_len - first), BLOCK_N):
        inside = start + tl.arange(0, BLOCK_N)
        key = first + inside
        score = products(q0, q1, q_rows, exists, k + inside * k_row, key < kv_len, DIM, D0, D1)
        score = tl.where(key[None, :] < ends[:, None], score * (scale * LOG2E), float("-inf"))
        total = log2_add(total, log2_sum(score, 1))
    at = (kv_head * tl.num_programs(1) + chunk).to(tl.int64) * (GROUP * n_probe) + m
    tl.store(sums + at, total * LN2, mask=exists)


@triton.jit(do_not_specialize=["n_probe", "kv_len"])
def _line_sums(
    q,
    k,
    lse,
    vertical,
    slash,
    scale,
    q_head,
    q_row,
    k_head,
    k_row,
    n_probe,
    kv_len,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    TILES: tl.constexpr,
    DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sums of probabilities, over n_probe, for a head's tile of rows and a chunk of keys."""
    kv_head = tl.program_id(2)
    head = (kv_head * GROUP + tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    # Tiles are counted from the last row back, and the turn of a tile's last row is 0.
    b = tl.arange(0, BLOCK_M)
    row = n_probe - (tile + 1) * BLOCK_M + b
    exists = row >= 0
    q_rows = q + head * q_head + row.to(tl.int64) * q_row
    q0, q1 = load_split(q_rows, exists, DIM, D0, D1)
    # A row that does not exist weighs e^-inf.
    base = tl.load(lse + head * n_probe + row, mask=exists, other=float("inf")) * LOG2E
    ends = tl.zeros_like(row) + kv_len
    if CAUSAL:
        ends += row + 1 - n_probe

    first = tl.program_id(1) * CHUNK
    k += kv_head.to(tl.int64) * k_head + first.to(tl.int64) * k_row
    vertical += (head * TILES + tile) * kv_len
    padded = tl.cdiv(kv_len, BLOCK_N) * BLOCK_N
    slash += (head * TILES + tile) * 2 * padded
    j = tl.arange(0, BLOCK_N)
    turn = BLOCK_M - 1 - b
    for start in range(0, tl.minimum(CHUNK, kv_len - first), BLOCK_N):
        inside = start + j
        key = first + inside
        score = products(q0, q1, q_rows, exists, k + inside * k_row, key < kv_len, DIM, D0, D1)
        score = score * (scale * LOG2E) - base[:, None]
        p = tl.exp2(tl.where(key[None, :] < ends[:, None], score, float("-inf")))
        tl.store(vertical + key, tl.sum(p, 0) / n_probe, mask=key < kv_len)
        if CAUSAL:
            p = tl.gather(p, (j[None, :] - turn[:, None]) & (BLOCK_N - 1), 1)
            here = j[None, :] >= turn[:, None]
            tl.store(slash + key, tl.sum(tl.where(here, p, 0.0), 0) / n_probe)
            tl.store(slash + padded + key, tl.sum(tl.where(here, 0.0, p), 0) / n_probe)
