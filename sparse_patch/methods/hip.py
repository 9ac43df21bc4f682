"""HiP: a beam search down a binary tree of key leaves finds what each query block looks at.

Between sink and window, keys are cut into leaves of `block_k` tokens. For every block of queries
the search starts from K = mask_k / block_k equal chunks of leaves; then, until all are single
leaves, it splits each chunk in two, scores each half by the one leaf that represents it,

    score = max over sampled rows of the block and sampled keys of the leaf of q . k,

and keeps the K best halves. That is ceil(log2(leaves / K)) rounds of 2 K leaves a block: O(T log T)
in all. A row attends the K leaves of its block, the first `sink` keys and its last `window` keys,
token-exact. `beam_factor` makes the search wider, and keeps the K best leaves of its last round.

Source: HiP (arXiv:2406.09827, ICLR 2025), compared with lists that the authors' code v1.1 made.
What differs from it: scores are ranked in float32 (theirs pass a sigmoid in bf16, where large ones
tie); the first chunks are equal unless `init="aligned"`; and a list that decode steps reuse holds
the window's left edge where it was, so that no token falls between the two. The leaves are coarser
and the budget larger than the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sparse_patch_kernels import BlockPlan, RunList
from sparse_patch_kernels.dispatch import has_kernel, has_native
from torch import Tensor

from ..registry import Examples, Knob, Method, check_sequence, param, register
from ..scoring import TILE_ELEMENTS


@register("hip")
@dataclass(frozen=True)
class Hip(Method):
    """Key leaves found by a tree search per query block, a sink and a window; in decoding too."""

    source: ClassVar[str] = "arXiv:2406.09827"
    examples: ClassVar[Examples] = {
        "sparse": {"mask_k": 32, "block_q": 16, "block_k": 4, "sink": 4, "window": 16},
        "everything": {"mask_k": 100000},
    }
    knob: ClassVar[Knob | None] = Knob.count("mask_k", 8)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"block_q": 32, "block_k": 2, "mask_k": 512}
    }

    dense_layers: int = param(3, "first layers that sparse_patch.patch keeps exact", least=0)
    block_q: int = param(64, "query rows that share a list", least=1)
    stride_q: int = param(2, "score every so many rows of a query block", least=1)
    block_k: int = param(8, "tokens per leaf", least=1)
    stride_k: int = param(1, "score every so many keys of a leaf", least=1)
    mask_k: int = param(1024, "tokens the search keeps, beside sink and window", least=1)
    sink: int = param(16, "first tokens that every query keeps", least=0)
    window: int = param(256, "latest tokens that a query keeps, itself included", least=1)
    rep: str = param("center", "which leaf represents a chunk", choices=("center", "first"))
    init: str = param(
        "floor", "first chunks: equal, or cut at powers of two", choices=("floor", "aligned")
    )
    beam_factor: int = param(1, "search so many times wider, keep the best leaves", least=1)
    row_causal: bool = param(True, "a key scores with those rows only whose window it has left")
    refresh: int = param(8, "decode steps that use one list; 0: decode is exact", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < self.block_k:
            raise ValueError(
                f"Hip: window={self.window} must be at least block_k={self.block_k}: the last leaf "
                "before the window may reach into it, but not past the end"
            )

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """See Method.plan; None up to `mask_k + sink + window` keys, all of which it would keep."""
        check_sequence(q, k, q_offset)
        q_len, kv_len = q.shape[1], k.shape[1]
        if kv_len <= self.mask_k + self.sink + self.window:
            return None
        runs = self._search(q, k, scale)
        return BlockPlan(q_len, kv_len, self.block_q, (runs,), self.sink, self.window)

    @property
    def sparse_decode(self) -> bool:
        return self.refresh > 0

    def decode(
        self, q: Tensor, k: Tensor, *, scale: float, memory: Any
    ) -> tuple[BlockPlan | None, Any]:
        """See Method.decode; the memory is the last list and how many keys there were then."""
        kv_len = k.shape[1]
        if memory is None or kv_len - memory[1] >= self.refresh:
            plan = self.plan(q, k, scale=scale, q_offset=kv_len - 1)
            return plan, None if plan is None else (plan.runs, kv_len)
        runs, built = memory
        # The window grows with the steps: its left edge stays where the list ends.
        window = self.window + kv_len - built
        return BlockPlan(1, kv_len, self.block_q, runs, self.sink, window), memory

    def _search(self, q: Tensor, k: Tensor, scale: float) -> RunList:
        """The leaves that each head and query block keeps."""
        leaves, count = search_leaves(q, k, scale, self)
        return RunList(self.sink + leaves * self.block_k, count, self.block_k)

    def leaf_counts(self, q_len: int, q_offset: int) -> Tensor:
        """int64 `[blocks]`: leaves between the sink and the window of the block's last row."""
        ends = torch.arange(self.block_q, q_len + self.block_q, self.block_q).clamp(max=q_len)
        far = (ends + q_offset - self.window - self.sink).clamp(min=0)
        return -(-far // self.block_k)

    def sampled_rows(self, q_len: int) -> Tensor:
        """int64 `[blocks, rows]`: the last of every `stride_q` rows, and of the call where it ends.

        A row may come twice, which changes no maximum.
        """
        first = torch.arange(0, q_len, self.block_q)[:, None]
        n = -(-min(self.block_q, q_len) // self.stride_q)
        row = torch.arange(1, n + 1) * self.stride_q - 1
        return (first + row.clamp(max=self.block_q - 1)).clamp(max=q_len - 1)

    def by_rounds(self, n_leaves: Tensor, keep: int, chunks: int) -> Iterator[tuple[int, Tensor]]:
        """How many rounds of search blocks need, and which: for every number but none."""
        largest = self.edges(n_leaves, chunks).diff().amax(-1)
        # One at least: a beam wider than the leaves still has to choose among them.
        rounds = torch.tensor([max(1, (n - 1).bit_length()) for n in largest.tolist()])
        rounds = rounds.masked_fill(n_leaves <= keep, 0)
        for n in sorted(set(rounds.tolist()) - {0}):
            yield n, (rounds == n).nonzero()[:, 0]

    def edges(self, n_leaves: Tensor, chunks: int) -> Tensor:
        """int64 `[n, chunks + 1]`: bounds of the first chunks of `n_leaves [n]`, in leaves."""
        edges = torch.arange(chunks + 1) * n_leaves[:, None] // chunks
        if self.init == "floor":
            return edges
        powers = [1 << n.bit_length() >> 1 for n in n_leaves.tolist()]
        step = torch.tensor([max(1, -(-power // chunks)) for power in powers])[:, None]
        return edges - edges % step

    def _descend(
        self, score: _LeafScorer, edges: Tensor, rounds: int, keep: int
    ) -> tuple[Tensor, Tensor]:
        """Search from the chunks between `edges [n, chunks + 1]` down to leaves.

        Returns:
            int32 `[n, keep]`, the leaves, ascending, and `[n]`, how many of them hold.
        """
        start, size = edges[:, :-1], edges.diff()
        for last_round in [False] * (rounds - 1) + [True]:
            # Chunks stay ordered by start, so that of equal scores the earlier one wins. The left
            # half of a single leaf is empty, and the right one is the leaf.
            half = size // 2
            start = torch.stack([start, start + half], -1).flatten(1)
            size = torch.stack([half, size - half], -1).flatten(1)
            middle = start + size // 2 if self.rep == "center" else start
            scores = score(middle).masked_fill_(size == 0, float("-inf"))
            order = scores.argsort(dim=-1, descending=True, stable=True)
            best = order[:, : keep if last_round else edges.shape[1] - 1].sort(dim=-1).values
            start, size = start.gather(1, best), size.gather(1, best)
        # Aligned chunks may leave too few: what is empty goes to the end.
        order = (size == 0).to(torch.uint8).argsort(dim=-1, stable=True)
        return start.gather(1, order).int(), size.sum(-1, dtype=torch.int32)


@has_kernel("tree_search")
@has_native
def search_leaves(q: Tensor, k: Tensor, scale: float, tree: Hip) -> tuple[Tensor, Tensor]:
    """The leaves that each head and query block keeps, counted from the sink.

    Args:
        q: `[heads, q_len, dim]`, the last rows of the sequence.
        k: `[kv_heads, kv_len, dim]`.
        tree: how to search.

    Returns:
        int32 `[heads, blocks, ceil(mask_k / block_k)]`, ascending, and `[heads, blocks]`, how many
        of them hold; the rest is padding.
    """
    heads, q_len, dim = q.shape
    group, q_offset, device = heads // k.shape[0], k.shape[1] - q_len, q.device
    keep = -(-tree.mask_k // tree.block_k)
    chunks = keep * tree.beam_factor
    n_leaves = tree.leaf_counts(q_len, q_offset)
    leaves = torch.arange(keep, device=device, dtype=torch.int32).repeat(heads, len(n_leaves), 1)
    count = n_leaves.clamp(max=keep).to(device, torch.int32).repeat(heads, 1)
    # A view: leaf i of KV head h is keys[h, i].
    keys = k[:, tree.sink : tree.sink + int(n_leaves.max()) * tree.block_k]
    keys = keys.view(k.shape[0], -1, tree.block_k, dim)[:, :, :: tree.stride_k]
    rows = tree.sampled_rows(q_len).to(device)
    # So many pairs of a query block and a head at a time that their gathered keys fit a tile.
    step = max(1, TILE_ELEMENTS // (2 * chunks * keys.shape[2] * dim))
    for rounds, blocks in tree.by_rounds(n_leaves, keep, chunks):
        for part in torch.split(torch.cartesian_prod(blocks, torch.arange(heads)), step):
            n = n_leaves[part[:, 0]]
            width = chunks
            if rounds == 1 and tree.init == "floor":  # scores every leaf: two a chunk will do
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
            leaves[head, block], count[head, block] = tree._descend(score, edges, rounds, keep)
    return leaves, count


@dataclass(frozen=True)
class _LeafScorer:
    """Scores the leaves of n (query block, head) pairs.

    Attributes:
        tree: says where leaves lie and which of their keys are sampled.
        queries: float32 `[n, rows, dim]`, scaled.
        limit: int64 `[n, rows]`, ascending: the latest key that counts for a row; None: all do.
        keys: `[kv_heads, leaves, sampled keys, dim]`.
        kv_head: int64 `[n, 1]`.
    """

    tree: Hip
    queries: Tensor
    limit: Tensor | None
    keys: Tensor
    kv_head: Tensor

    def __call__(self, leaf: Tensor) -> Tensor:
        """float32 `[n, m]`: max of q . k over rows and keys, for leaves `leaf [n, m]`.

        A leaf out of every row's limit gets the lowest finite number. An index past the last leaf
        is taken for it.
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
