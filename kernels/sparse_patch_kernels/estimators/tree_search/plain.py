"""A beam search down a binary tree of key leaves, as in HiP (arXiv:2406.09827)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...dispatch import has_kernel, has_native
from .. import TILE_ELEMENTS
from .tree import Tree


@has_kernel
@has_native
def search_leaves(q: Tensor, k: Tensor, scale: float, tree: Tree) -> tuple[Tensor, Tensor]:
    """The leaves that each head and query block keeps, counted from the sink.

    Args:
        q: `[heads, q_len, dim]`, the last rows of the sequence.
        k: `[kv_heads, kv_len, dim]`.
        tree: how to search.

    Returns:
        int32 `[heads, blocks, ceil(mask_k / block_k)]`, ascending, and `[heads, blocks]`, the
        number of valid ones; the rest is padding.
    """
    heads, q_len, dim = q.shape
    group, q_offset, device = heads // k.shape[0], k.shape[1] - q_len, q.device
    keep, chunks = tree.keep, tree.chunks
    n_leaves = tree.leaf_counts(q_len, q_offset)
    leaves = torch.arange(keep, device=device, dtype=torch.int32).repeat(heads, len(n_leaves), 1)
    count = n_leaves.clamp(max=keep).to(device, torch.int32).repeat(heads, 1)
    # A view: leaf i of KV head h is keys[h, i].
    keys = k[:, tree.sink : tree.sink + int(n_leaves.max()) * tree.block_k]
    keys = keys.view(k.shape[0], -1, tree.block_k, dim)[:, :, :: tree.stride_k]
    rows = tree.sampled_rows(q_len).to(device)
    # Pairs of a query block and a head per step, so that their gathered keys fit a tile.
    step = max(1, TILE_ELEMENTS // (2 * chunks * keys.shape[2] * dim))
    for rounds, blocks in tree.by_rounds(n_leaves):
        for part in torch.split(torch.cartesian_prod(blocks, torch.arange(heads)), step):
            n = n_leaves[part[:, 0]]
            width = chunks
            if rounds == 1 and tree.init == "floor":  # scores every leaf: two per chunk suffice
                width = min(chunks, -(-int(n.max()) // 2))
            edges = tree.edges(n, width).to(device)
            block, head = part.to(device).unbind(1)
            row = rows[block]
            score = _LeafScorer(
                tree,
                q[head[:, None], row].float() * scale,
                row + q_offset - tree.window if tree.row_causal else None,
                keys,
                (head // group)[:, None],
            )
            leaves[head, block], count[head, block] = _descend(tree, score, edges, rounds)
    return leaves, count


def _descend(tree: Tree, score: _LeafScorer, edges: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Search from the chunks between `edges [n, chunks + 1]` down to leaves.

    Returns:
        int32 `[n, tree.keep]`, the leaves, ascending, and `[n]`, the number of valid ones.
    """
    start, size = edges[:, :-1], edges.diff()
    for last_round in [False] * (rounds - 1) + [True]:
        # Chunks stay ordered by start, so that of equal scores the earlier one wins. The left
        # half of a single leaf is empty, and the right one is the leaf.
        half = size // 2
        start = torch.stack([start, start + half], -1).flatten(1)
        size = torch.stack([half, size - half], -1).flatten(1)
        middle = start + size // 2 if tree.rep == "center" else start
        scores = score(middle).masked_fill_(size == 0, float("-inf"))
        order = scores.argsort(dim=-1, descending=True, stable=True)
        best = order[:, : tree.keep if last_round else edges.shape[1] - 1].sort(dim=-1).values
        start, size = start.gather(1, best), size.gather(1, best)
    # Aligned chunks may give too few leaves: empty ones go to the end.
    order = (size == 0).to(torch.uint8).argsort(dim=-1, stable=True)
    return start.gather(1, order).int(), size.sum(-1, dtype=torch.int32)


@dataclass(frozen=True)
class _LeafScorer:
    """Scores the leaves of n (query block, head) pairs.

    Attributes:
        tree: the positions of leaves and of their sampled keys.
        queries: float32 `[n, rows, dim]`, scaled.
        limit: int64 `[n, rows]`, ascending: the latest key that counts for a row; None: all do.
        keys: `[kv_heads, leaves, sampled keys, dim]`.
        kv_head: int64 `[n, 1]`.
    """

    tree: Tree
    queries: Tensor
    limit: Tensor | None
    keys: Tensor
    kv_head: Tensor

    def __call__(self, leaf: Tensor) -> Tensor:
        """float32 `[n, m]`: max of q . k over rows and keys, for leaves `leaf [n, m]`.

        A leaf past every row's limit gets the lowest finite number. An index past the last leaf
        means the last leaf.
        """
        leaf = leaf.clamp(max=self.keys.shape[1] - 1)
        scores = dot(self.queries, self.keys[self.kv_head, leaf].float())
        if self.limit is not None:
            start = self.tree.sink + leaf * self.tree.block_k
            # Few leaves reach the limit of the first row: only those are masked.
            near = start + self.tree.block_k > self.limit[:, :1]
            pair, column = near.nonzero(as_tuple=True)
            sampled = torch.arange(0, self.tree.block_k, self.tree.stride_k, device=leaf.device)
            key = start[pair, column, None, None] + sampled
            late = key > self.limit[pair][..., None]
            lowest = torch.finfo(scores.dtype).min
            scores[pair, :, column] = scores[pair, :, column].masked_fill(late, lowest)
        return scores.amax(1).amax(-1)


def dot(queries: Tensor, keys: Tensor) -> Tensor:
    """`[n, rows, dim]` and `[n, leaves, keys, dim]` -> q . k `[n, rows, leaves, keys]`."""
    n, leaves, width, _ = keys.shape
    return (queries @ keys.flatten(1, 2).mT).view(n, -1, leaves, width)
