"""Compiled C++ for what costs most when methods choose: `src/selection.cpp`.

Each function has the arguments and the result, up to rounding, of the plain one that gives its work
away to it (`dispatch.has_native`), and NotImplemented for what it cannot take. bfloat16 is
multiplied as such where the CPU can, and added in float32.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any, Protocol

import torch
from torch import Tensor

from .compile import DTYPES, load

# Keys of a block lie in a thread's cache until the block's largest logit is known.
_WIDEST = 1024


def _fields(*names: str) -> list[tuple[str, Any]]:
    return [(name, c_int64) for name in names]


class Tree(Protocol):
    """What a search asks of `sparse_patch.methods.hip.Hip`, which describes it."""

    block_k: int
    stride_k: int
    mask_k: int
    sink: int
    window: int
    rep: str
    init: str
    beam_factor: int
    row_causal: bool

    def leaf_counts(self, q_len: int, q_offset: int) -> Tensor: ...
    def sampled_rows(self, q_len: int) -> Tensor: ...
    def edges(self, n_leaves: Tensor, chunks: int) -> Tensor: ...
    def by_rounds(
        self, n_leaves: Tensor, keep: int, chunks: int
    ) -> Iterator[tuple[int, Tensor]]: ...


class _Inputs(Structure):
    """As in selection.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k")),
        *_fields("q_head", "q_row", "k_head", "k_row", "heads", "kv_heads", "dim"),
        *((name, c_int32) for name in ("threads", "bfloat16")),
    )


class _Masses(Structure):
    """As in selection.cpp."""

    _fields_ = (
        ("inputs", _Inputs),
        *((name, c_void_p) for name in ("out", "rows", "seen")),
        *_fields("n_rows", "width", "blocks"),
        ("scale", c_float),
        ("largest", c_int32),
    )


class _Search(Structure):
    """As in selection.cpp."""

    _fields_ = (
        ("inputs", _Inputs),
        *((name, c_void_p) for name in ("leaves", "count", "rows", "limit")),
        *((name, c_void_p) for name in ("rounds", "n_leaves", "edges")),
        *_fields("n_blocks", "n_rows", "chunks", "keep", "sink", "leaf", "step", "last_leaf"),
        *((name, c_int32) for name in ("center", "equal")),
    )


class _Scans(Structure):
    """As in selection.cpp."""

    _fields_ = (
        ("inputs", _Inputs),
        *((name, c_void_p) for name in ("best", "starts", "limit", "end")),
        *_fields("lists", "n_blocks", "n_rows", "n", "chunk", "kv_len"),
    )


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
    """See sparse_patch.scoring."""
    inputs = _inputs(q, k)
    if inputs is None or scale <= 0 or width > _WIDEST:
        return NotImplemented
    rows, seen = rows.contiguous(), seen.contiguous()
    blocks = -(-int(seen.max()) // width)
    out = torch.empty(len(q), len(rows), blocks, dtype=torch.float32)
    pointers = (x.data_ptr() for x in (out, rows, seen))
    _run("masses", _Masses(inputs, *pointers, len(rows), width, blocks, scale, largest))
    return out


def search_leaves(q: Tensor, k: Tensor, scale: float, tree: Tree) -> Any:
    """See sparse_patch.methods.hip."""
    inputs = _inputs(q, k)
    if inputs is None or scale <= 0:
        return NotImplemented
    heads, q_len, _ = q.shape
    q_offset = k.shape[1] - q_len
    keep = -(-tree.mask_k // tree.block_k)
    chunks = keep * tree.beam_factor
    n_leaves = tree.leaf_counts(q_len, q_offset)
    leaves = torch.arange(keep, dtype=torch.int32).repeat(heads, len(n_leaves), 1)
    count = n_leaves.clamp(max=keep).to(torch.int32).repeat(heads, 1)
    rounds = torch.zeros_like(n_leaves)
    for n, blocks in tree.by_rounds(n_leaves, keep, chunks):
        rounds[blocks] = n
    rows = tree.sampled_rows(q_len)
    limit = rows + q_offset - tree.window if tree.row_causal else None
    edges = tree.edges(n_leaves, chunks)
    call = _Search(
        inputs,
        *(x.data_ptr() for x in (leaves, count, rows)),
        None if limit is None else limit.data_ptr(),
        *(x.data_ptr() for x in (rounds, n_leaves, edges)),
        *(len(n_leaves), rows.shape[1], chunks, keep, tree.sink),
        *(tree.block_k, tree.stride_k, int(n_leaves.max()) - 1),
        tree.rep == "center",
        tree.init == "floor",
    )
    _run("search", call)
    return leaves, count


def scan_chunks(
    queries: Tensor, k: Tensor, starts: Tensor, limit: Tensor, end: Tensor, chunk: int
) -> Any:
    """See sparse_patch.methods.infinite_hip."""
    heads, n_blocks, n_rows, dim = queries.shape
    queries, k, starts = queries.contiguous(), k.to(queries.dtype), starts.contiguous()
    inputs = _inputs(queries.view(heads, -1, dim), k)
    if inputs is None:
        return NotImplemented
    best = torch.empty(heads, *starts.shape[1:], dtype=torch.float32)
    call = _Scans(
        inputs,
        *(x.data_ptr() for x in (best, starts, limit, end)),
        *(len(starts), n_blocks, n_rows, starts.shape[2], chunk, k.shape[1]),
    )
    _run("scan", call)
    return best


def _inputs(q: Tensor, k: Tensor) -> _Inputs | None:
    """q `[heads, n, dim]` and k `[kv_heads, m, dim]` for C++; None for what it cannot take."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or _library() is None:
        return None
    if not 0 < q.numel() or not 0 < k.numel() or q.stride(2) != 1 or k.stride(2) != 1:
        return None
    if k.dtype == torch.bfloat16 and q.shape[2] % 2:
        return None
    return _Inputs(
        *(x.data_ptr() for x in (q, k)),
        *(x.stride(i) for x in (q, k) for i in (0, 1)),
        *(len(q), len(k), q.shape[2]),
        torch.get_num_threads(),
        k.dtype == torch.bfloat16,
    )


@functools.lru_cache(None)
def _library() -> Any:
    """The C functions; None where they cannot be had or are not wanted."""
    library = load("selection")
    for name in ("masses", "search", "scan") if library else ():
        getattr(library, f"sparse_patch_{name}").restype = ctypes.c_int
    return library


def _run(name: str, call: Structure) -> None:
    if getattr(_library(), f"sparse_patch_{name}")(ctypes.byref(call)):
        raise MemoryError("selection: no memory for a tile of scores")
