"""Which leaves, chunks and rows a tree search has: numbers, from lengths and parameters alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """How to search; the method `hip` has and describes the same parameters."""

    block_q: int
    stride_q: int
    block_k: int
    stride_k: int
    mask_k: int
    sink: int
    window: int
    rep: str
    init: str
    beam_factor: int
    row_causal: bool

    @property
    def keep(self) -> int:
        """Leaves that a query block keeps."""
        return -(-self.mask_k // self.block_k)

    @property
    def chunks(self) -> int:
        """Chunks that a round of search keeps."""
        return self.keep * self.beam_factor

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

    def by_rounds(self, n_leaves: Tensor) -> Iterator[tuple[int, Tensor]]:
        """How many rounds of search blocks need, and which: for every number but none."""
        largest = self.edges(n_leaves, self.chunks).diff().amax(-1)
        # One at least: a beam wider than the leaves still has to choose among them.
        rounds = torch.tensor([max(1, (n - 1).bit_length()) for n in largest.tolist()])
        rounds = rounds.masked_fill(n_leaves <= self.keep, 0)
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
