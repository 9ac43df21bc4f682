"""The tree search in C++."""

from __future__ import annotations

from ctypes import Structure, c_int32, c_void_p
from typing import Any

import torch
from torch import Tensor

from ...cpu import selection
from .tree import Tree


class _Search(Structure):
    """As in selection.cpp."""

    _fields_ = (
        ("inputs", selection.Inputs),
        *((name, c_void_p) for name in ("leaves", "count", "rows", "limit")),
        *((name, c_void_p) for name in ("rounds", "n_leaves", "edges")),
        *selection.fields(
            "n_blocks", "n_rows", "chunks", "keep", "sink", "leaf", "step", "last_leaf"
        ),
        *((name, c_int32) for name in ("center", "equal")),
    )


def search_leaves(q: Tensor, k: Tensor, scale: float, tree: Tree) -> Any:
    """See `plain`."""
    inputs = selection.inputs(q, k)
    if inputs is None or scale <= 0:
        return NotImplemented
    heads, q_len, _ = q.shape
    q_offset = k.shape[1] - q_len
    keep, chunks = tree.keep, tree.chunks
    n_leaves = tree.leaf_counts(q_len, q_offset)
    leaves = torch.arange(keep, dtype=torch.int32).repeat(heads, len(n_leaves), 1)
    count = n_leaves.clamp(max=keep).to(torch.int32).repeat(heads, 1)
    rounds = torch.zeros_like(n_leaves)
    for n, blocks in tree.by_rounds(n_leaves):
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
    selection.run("search", call)
    return leaves, count
