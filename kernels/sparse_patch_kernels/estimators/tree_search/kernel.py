"""HiP's tree search, all heads and query blocks at a time: a round is two launches.

`_cut_leaves` cuts the leaves of every query block into its first chunks, which all heads share.
Then, round for round, `_score_halves` scores the halves of each chunk, and `_keep_best` keeps the
best. How many rounds a block needs follows from lengths alone: nothing here waits for the device.

The first round is that of all blocks. The heads of a KV group have the same chunks there, and their
rows share the tiles of keys, which cost more to fetch than to multiply. After it the blocks with
the most leaves go on alone, others join them, and all have their last round together.

A half that is represented by its parent's leaf has its score already. That holds for all left
halves where the first leaf represents a chunk. Where the middle one does, it holds for the right
halves of the last round, in which no chunk has more than two leaves.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton.launch import launch
from ...triton.tiles import split_dim
from .tree import Tree

__all__ = ["search_leaves"]

# Beyond these the plain search runs: rows of a block or keys of a leaf that fill more than a tile,
# or more chunks than one program ranks in its registers.
_MOST_ROWS = 128
_MOST_KEYS = 128
_MOST_CHUNKS = 4096

# Room for the chunks and scores of a round: heads are searched in parts if need be.
_SCRATCH_BYTES = 256 << 20
# Programs that fill a device: with fewer blocks and heads, each scores but a part of the chunks.
_PROGRAMS = 1024

# What handles the chunks of one block: one warp needs no barriers, but more than 512 halves would
# not fit its registers.
_ONE_WARP = (triton.Config({}, num_warps=1, num_stages=1),)
_EIGHT_WARPS = (triton.Config({}, num_warps=8, num_stages=1),)

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_EMPTY = tl.constexpr(torch.iinfo(torch.int32).min)


def search_leaves(q: Tensor, k: Tensor, scale: float, tree: Tree) -> tuple[Tensor, Tensor] | Any:
    """See `plain.search_leaves`; the lists are padded with 0.

    Of equal scores the earlier leaf wins, as there. Scores that differ by rounding may be ranked
    otherwise, and so may NaN. NotImplemented with more than 128 sampled rows a block, 128 sampled
    keys a leaf or 4096 chunks.
    """
    search = _Search(tree, q, k)
    if search.rows > _MOST_ROWS or search.keys > _MOST_KEYS or search.n_chunks > _MOST_CHUNKS:
        return NotImplemented
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    leaves = q.new_empty(q.shape[0], search.blocks, search.keep, dtype=torch.int32)
    count = q.new_empty(q.shape[0], search.blocks, dtype=torch.int32)
    first, extent = search.cut_leaves(q)
    for heads, kv_heads in search.parts(q.shape[0], k.shape[0]):
        out = leaves[heads], count[heads]
        chunks, scores = search.scratch(q[heads])
        for left in search.rounds_left():
            now = chunks if left else first
            search.score_halves(q[heads], k[kv_heads], scale, now, scores, extent, left)
            search.keep_best(now, chunks, scores, extent, out, left)
    return leaves, count


class _Search:
    """The launches, and the numbers that follow from lengths and parameters.

    A chunk is an int64: its first leaf in the upper half, how many it has in the lower one. Chunks
    are `[lists, blocks, n_chunks]`, scores of halves float32 `[heads, blocks, 2 * n_chunks]`.
    """

    def __init__(self, tree: Tree, q: Tensor, k: Tensor) -> None:
        self.tree, self.q_len, self.kv_len = tree, q.shape[1], k.shape[1]
        self.blocks = -(-self.q_len // tree.block_q)
        self.rows = -(-min(tree.block_q, self.q_len) // tree.stride_q)
        self.keys = -(-tree.block_k // tree.stride_k)
        self.keep, self.n_chunks = tree.keep, tree.chunks
        self.per_block = _ONE_WARP if self.n_chunks <= 256 else _EIGHT_WARPS

    def rounds(self, block: int) -> int:
        """Rounds that a block needs, or a few more with `init="aligned"`; later blocks no fewer."""
        tree = self.tree
        end = min((block + 1) * tree.block_q, self.q_len) + self.kv_len - self.q_len
        n = -(-max(0, end - tree.window - tree.sink) // tree.block_k)
        largest = max(1, -(-n // self.n_chunks))
        if tree.init == "aligned":
            power = 1 << n.bit_length() >> 1
            largest += max(1, -(-power // self.n_chunks)) - 1
        return max(1, (largest - 1).bit_length())

    def rounds_left(self) -> Iterator[int]:
        """0 for the first round, of every block. Then how many rounds are left, this one included,
        for the blocks that have so many left."""
        yield 0
        yield from range(self.rounds(self.blocks - 1) - 1, 0, -1)

    def first_block(self, left: int) -> int:
        """Where the blocks begin that have more than `left` rounds."""
        return bisect.bisect(range(self.blocks), left, key=self.rounds)

    def parts(self, heads: int, kv_heads: int) -> Iterator[tuple[slice, slice]]:
        """Query heads and their KV heads, as many at a time as there is room for."""
        group = heads // kv_heads
        # Eight bytes for a chunk, and as many for the scores of its halves.
        step = max(1, _SCRATCH_BYTES // (group * self.blocks * self.n_chunks * 16))
        for first in range(0, kv_heads, step):
            end = min(first + step, kv_heads)
            yield slice(first * group, end * group), slice(first, end)

    def scratch(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Chunks of every head of `q`, and scores of their halves."""
        shape = q.shape[0], self.blocks, self.n_chunks
        return (
            q.new_empty(shape, dtype=torch.int64),
            q.new_empty(*shape[:2], 2 * self.n_chunks, dtype=torch.float32),
        )

    def cut_leaves(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The first chunks, for all heads, and int32 `[blocks, 2]`: the rounds of search that a
        block needs, and how many of its chunks are to be scored in the first."""
        chunks = q.new_empty(1, self.blocks, self.n_chunks, dtype=torch.int64)
        extent = q.new_empty(self.blocks, 2, dtype=torch.int32)
        arguments = {
            "chunks": chunks,
            "extent": extent,
            "q_len": self.q_len,
            "kv_len": self.kv_len,
            "n_chunks": self.n_chunks,
            "keep": self.keep,
            "block_q": self.tree.block_q,
            "block_k": self.tree.block_k,
            "sink": self.tree.sink,
            "window": self.tree.window,
            "ALIGNED": self.tree.init == "aligned",
            "CHUNKS": triton.next_power_of_2(self.n_chunks),
        }
        launch(_cut_leaves, (self.blocks,), arguments, self.per_block, ())
        return chunks, extent

    def score_halves(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        chunks: Tensor,
        scores: Tensor,
        extent: Tensor,
        left: int,
    ) -> None:
        """Score the halves that do not have their parent's score."""
        tree, dim, group = self.tree, q.shape[2], q.shape[0] // k.shape[0]
        centre = tree.rep == "center"
        score_left, score_right = left == 0 or centre, left != 1 or not centre
        n_halves = self.n_chunks * (score_left + score_right)
        rows = max(16, triton.next_power_of_2(self.rows))
        width = triton.next_power_of_2(self.keys)
        # How many heads of a group share a program: one, once each has its own chunks. Float32 is
        # multiplied without tensor cores, where so large a tile finds no room in the registers.
        shares = left == 0 and q.element_size() <= 2
        heads = min(triton.next_power_of_2(group), _MOST_ROWS // rows) if shares else 1
        groups = -(-group // heads) * k.shape[0]
        first_block = self.first_block(left)
        blocks = self.blocks - first_block
        # Halves for a program: whole tiles, of whichever configuration.
        tile = _MOST_KEYS // width
        span = -(-n_halves // max(1, _PROGRAMS // (blocks * groups)))
        span = -(-span // tile) * tile
        d0, d1 = split_dim(dim)
        arguments = {
            "q": q,
            "k": k,
            "chunks": chunks,
            "scores": scores,
            "extent": extent,
            "scale": scale,
            "q_stride_h": q.stride(0),
            "q_stride_n": q.stride(1),
            "k_stride_h": k.stride(0),
            "k_stride_n": k.stride(1),
            "q_len": self.q_len,
            "kv_len": self.kv_len,
            "blocks": self.blocks,
            "first_block": first_block,
            "left": left,
            "span": span,
            "n_chunks": self.n_chunks,
            "group": group,
            "rows": self.rows,
            "keys": self.keys,
            "block_q": tree.block_q,
            "stride_q": tree.stride_q,
            "block_k": tree.block_k,
            "stride_k": tree.stride_k,
            "sink": tree.sink,
            "window": tree.window,
            "FIRST": left == 0,
            "LEFT": score_left,
            "RIGHT": score_right,
            "CENTRE": centre,
            "ROW_CAUSAL": tree.row_causal,
            "HEADS": heads,
            "ROWS": rows,
            "WIDTH": width,
            "DIM": dim,
            "D0": d0,
            "D1": d1,
        }
        configs = _tiles(width, dim * q.element_size())
        grid = (blocks, groups, -(-n_halves // span))
        launch(_score_halves, grid, arguments, configs, ("HEADS", "ROWS", "WIDTH", "DIM"))

    def keep_best(
        self,
        chunks: Tensor,
        kept: Tensor,
        scores: Tensor,
        extent: Tensor,
        out: tuple[Tensor, Tensor],
        left: int,
    ) -> None:
        """Put the best halves of `chunks` into `kept`, and to `scores` what their own halves have
        from them; or, in a block's last round, its leaves and their count to `out`."""
        first_block = self.first_block(left)
        arguments = {
            "chunks": chunks,
            "kept_chunks": kept,
            "scores": scores,
            "extent": extent,
            "leaves": out[0],
            "count": out[1],
            "blocks": self.blocks,
            "first_block": first_block,
            "left": left,
            "n_chunks": self.n_chunks,
            "keep": self.keep,
            "FIRST": left == 0,
            "HALVES": triton.next_power_of_2(2 * self.n_chunks),
        }
        grid = (self.blocks - first_block, scores.shape[0])
        launch(_keep_best, grid, arguments, self.per_block, ())


@functools.lru_cache(None)
def _tiles(width: int, key_bytes: int) -> tuple[triton.Config, ...]:
    """How many keys to score at a time, of leaves of `width` keys.

    Keys are gathered, which takes long. The first stage of three gets chunks, the second keys, so
    one tile is under way while another is multiplied. With 32 KiB a tile, two or three programs
    find room beside one another. Devices with less shared memory take the smaller ones.
    """
    keys = 128 if key_bytes <= 256 else 64
    return tuple(
        triton.Config({"KEYS": max(width, n)}, num_warps=warps, num_stages=stages)
        for n, warps, stages in ((keys, 4, 3), (keys, 8, 3), (keys // 2, 4, 4), (keys // 2, 4, 2))
    )


@triton.jit
def _half_of(chunk, right):
    """First leaf and size of the right or left half. The left half of a single leaf is empty."""
    start = (chunk >> 32).to(tl.int32)
    size = chunk.to(tl.int32)
    half = size // 2
    return tl.where(right, start + half, start), tl.where(right, size - half, half)


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def _cut_leaves(
    chunks,
    extent,
    q_len,
    kv_len,
    n_chunks,
    keep,
    block_q,
    block_k,
    sink,
    window,
    ALIGNED: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One program per query block."""
    block = tl.program_id(0)
    end = tl.minimum((block + 1) * block_q, q_len) + kv_len - q_len
    n = tl.cdiv(tl.maximum(end - window - sink, 0), block_k)
    bits = tl.arange(0, 32)
    used = n_chunks
    step = 1
    if ALIGNED:
        power = 1 << tl.sum(((n >> bits) > 1).to(tl.int32))  # the largest up to n
        step = tl.cdiv(power, n_chunks)
    else:
        # Chunks of two leaves already score them all; a wide beam needs no more of them.
        used = tl.maximum(1, tl.minimum(n_chunks, tl.cdiv(n, 2)))
    chunk = tl.arange(0, CHUNKS)
    start = (chunk.to(tl.int64) * n // used).to(tl.int32)
    stop = ((chunk + 1).to(tl.int64) * n // used).to(tl.int32)
    start -= start % step
    size = tl.where(chunk < used, stop - stop % step - start, 0)
    packed = (start.to(tl.int64) << 32) | size.to(tl.int64)
    tl.store(chunks + block.to(tl.int64) * n_chunks + chunk, packed, mask=chunk < n_chunks)
    # Rounds are the bits of the largest size less one.
    rounds = tl.sum((((tl.max(size) - 1) >> bits) > 0).to(tl.int32))
    tl.store(extent + 2 * block, tl.maximum(rounds, 1))
    # A block that keeps all its leaves has nothing to score.
    tl.store(extent + 2 * block + 1, tl.where(n > keep, used, 0))


@triton.jit(do_not_specialize=["q_len", "kv_len", "blocks", "first_block", "left", "span"])
def _score_halves(
    q,
    k,
    chunks,
    scores,
    extent,
    scale,
    q_stride_h,
    q_stride_n,
    k_stride_h,
    k_stride_n,
    q_len,
    kv_len,
    blocks,
    first_block,
    left,
    span,
    n_chunks,
    group,
    rows,
    keys,
    block_q,
    stride_q,
    block_k,
    stride_k,
    sink,
    window,
    FIRST: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CENTRE: tl.constexpr,
    ROW_CAUSAL: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program per query block, HEADS heads of a KV group, and `span` halves.

    Columns are the sampled rows of the heads, rows the sampled keys of some leaves: a tile of keys
    is fetched once, and the maximum over its columns and over the WIDTH keys of a leaf stays.
    """
    LEAVES: tl.constexpr = KEYS // WIDTH
    block = tl.program_id(0) + first_block
    part = tl.program_id(1)
    parts = tl.cdiv(group, HEADS)
    kv_head = (part // parts).to(tl.int64)
    member = part % parts * HEADS + tl.arange(0, HEADS)
    lo = tl.program_id(2) * span
    n_halves = n_chunks
    if FIRST:
        n_halves = 2 * tl.load(extent + 2 * block + 1)
    elif LEFT and RIGHT:
        n_halves = 2 * n_chunks
    # With aligned chunks a block may need fewer rounds than the grid was made for.
    hi = tl.where(tl.load(extent + 2 * block) > left, tl.minimum(lo + span, n_halves), lo)

    # What is too many repeats the last head, row or key, which changes no maximum.
    column = tl.arange(0, HEADS * ROWS)
    head = tl.minimum(part % parts * HEADS + column // ROWS, group - 1)
    row = tl.minimum(column % ROWS, rows - 1)
    row = block * block_q + tl.minimum((row + 1) * stride_q, block_q) - 1
    row = tl.minimum(row, q_len - 1)
    q += (kv_head * group + head) * q_stride_h + row.to(tl.int64) * q_stride_n
    d0 = tl.arange(0, D0)
    q0 = tl.load(q[None, :] + d0[:, None], mask=d0[:, None] < DIM, other=0)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = tl.load(q[None, :] + d1[:, None], mask=d1[:, None] < DIM, other=0)
    limit = row + (kv_len - q_len - window)

    pair = (kv_head * group + part % parts * HEADS) * blocks + block
    chunks += (block if FIRST else pair) * n_chunks
    scores += (pair + tl.arange(0, HEADS) * blocks)[None, :] * 2 * n_chunks
    k += kv_head * k_stride_h
    of_leaf = tl.arange(0, KEYS) // WIDTH
    sample = tl.minimum(tl.arange(0, KEYS) % WIDTH, keys - 1) * stride_k
    for first in range(lo, hi, LEAVES):
        half = first + of_leaf
        if LEFT and RIGHT:
            chunk = tl.load(chunks + half // 2, mask=half < hi, other=0)
            start, size = _half_of(chunk, half % 2 == 1)
            there = size > 0
        else:
            chunk = tl.load(chunks + half, mask=half < hi, other=0)
            start, size = _half_of(chunk, tl.full([KEYS], RIGHT, tl.int1))
            there = chunk.to(tl.int32) > 1
        leaf = start
        if CENTRE:
            leaf += size // 2
        key = sink + leaf * block_k + sample
        at = k + key.to(tl.int64) * k_stride_n
        there = there[:, None]
        keys0 = tl.load(at[:, None] + d0[None, :], mask=there & (d0[None, :] < DIM), other=0)
        dots = tl.dot(keys0, q0, input_precision="ieee")
        if D1 > 0:
            keys1 = tl.load(at[:, None] + d1[None, :], mask=there & (d1[None, :] < DIM), other=0)
            dots = tl.dot(keys1, q1, dots, input_precision="ieee")
        dots *= scale
        if ROW_CAUSAL:
            dots = tl.where(key[:, None] > limit[None, :], _LOWEST, dots)
        best = tl.max(tl.reshape(dots, [KEYS, HEADS, ROWS]), 2)
        best = tl.max(tl.reshape(best, [LEAVES, WIDTH, HEADS]), 1)

        # Once more, a leaf a number: which scores are new.
        half = first + tl.arange(0, LEAVES)
        if LEFT and RIGHT:
            slot = half
            fresh = half < hi
        else:
            slot = 2 * half + RIGHT
            fresh = tl.load(chunks + half, mask=half < hi, other=0).to(tl.int32) > 1
        tl.store(scores + slot[:, None], best, mask=fresh[:, None] & (member < group)[None, :])


@triton.jit(do_not_specialize=["blocks", "first_block", "left"])
def _keep_best(
    chunks,
    kept_chunks,
    scores,
    extent,
    leaves,
    count,
    blocks,
    first_block,
    left,
    n_chunks,
    keep,
    FIRST: tl.constexpr,
    HALVES: tl.constexpr,
):
    """One program per query block and head."""
    block = tl.program_id(0) + first_block
    head = tl.program_id(1).to(tl.int64)
    rounds = tl.load(extent + 2 * block)
    if rounds > left:
        pair = head * blocks + block
        half = tl.arange(0, HALVES)
        chunks += (block if FIRST else pair) * n_chunks
        chunk = tl.load(chunks + half // 2, mask=half < 2 * n_chunks, other=0)
        start, size = _half_of(chunk, half % 2 == 1)
        # Where all halves are kept nothing was scored, and whatever is read here does no harm.
        scores += pair * 2 * n_chunks
        score = tl.load(scores + half, mask=size > 0, other=0.0)

        # The integer with its order: 0 and -0 are one, and what is empty comes last.
        order = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
        order = tl.where(order < 0, order ^ 0x7FFFFFFF, order)
        order = tl.where(size > 0, tl.maximum(order, _EMPTY + 1), _EMPTY)
        is_last = (rounds == 1) if FIRST else (left == 1)
        wanted = tl.where(is_last, keep, n_chunks)
        # The largest number that so many reach, bit by bit from the top.
        least = tl.full([], _EMPTY, tl.int32)
        bit = least
        for _ in range(32):
            more = least ^ bit
            least = tl.where(tl.sum((order >= more).to(tl.int32)) >= wanted, more, least)
            bit = (bit >> 1) & 0x7FFFFFFF
        above = order > least
        equal = ((order == least) & (size > 0)).to(tl.int32)
        spare = wanted - tl.sum(above.to(tl.int32))
        kept = above | ((equal > 0) & (tl.cumsum(equal, 0) <= spare))
        n_kept = tl.sum(kept.to(tl.int32))
        slot = tl.cumsum(kept.to(tl.int32), 0) - 1

        tl.debug_barrier()  # what comes takes the place of what other threads may still be reading
        if is_last:
            leaves += pair * keep
            tl.store(leaves + slot, start, mask=kept)
            tl.store(leaves + half, tl.zeros_like(half), mask=(half >= n_kept) & (half < keep))
            tl.store(count + pair, n_kept)
        else:
            packed = (start.to(tl.int64) << 32) | size.to(tl.int64)
            rest = (half >= n_kept) & (half < n_chunks)
            kept_chunks += pair * n_chunks
            tl.store(kept_chunks + slot, packed, mask=kept)
            tl.store(kept_chunks + half, tl.zeros_like(packed), mask=rest)
            tl.store(scores + 2 * slot, score, mask=kept)
            tl.store(scores + 2 * slot + 1, score, mask=kept)
