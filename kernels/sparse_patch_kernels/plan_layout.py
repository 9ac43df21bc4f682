"""PlanLayout: the fields of a BlockPlan, and the positions of its blocks, rows and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .runs import RunList


@dataclass(frozen=True, eq=False)
class PlanLayout:
    """The fields of a BlockPlan, which documents and checks them."""

    q_len: int
    kv_len: int
    block_q: int
    runs: tuple[RunList, ...] = ()
    sink: int = 0
    window: int = 0
    key_order: Tensor | None = None

    @property
    def n_q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def q_offset(self) -> int:
        """Position of query row 0."""
        return self.kv_len - self.q_len

    @property
    def heads(self) -> int:
        """Number of heads with their own choice of keys; divides the query heads of a call."""
        order = 1 if self.key_order is None else self.key_order.shape[0]
        return max([order, *(run.heads for run in self.runs)])

    def row_range(self, block: int) -> tuple[int, int]:
        """Positions `[first, end)` of the rows of query block `block`."""
        first = self.q_offset + block * self.block_q
        return first, min(first + self.block_q, self.kv_len)

    def last_rows(self, device: torch.device | None = None) -> Tensor:
        """int64 `[n_q_blocks]`: position of the last row of each query block."""
        ends = torch.arange(1, self.n_q_blocks + 1, device=device) * self.block_q
        return (self.q_offset + ends).clamp(max=self.kv_len) - 1

    def group_ends(self, pool: int) -> Tensor:
        """int64 `[orders, kv_len // pool]`: the row from which on each pooled group is visible.

        `orders` is 1, or that of `key_order`.
        """
        order = self.key_order
        if order is None:
            device = self.runs[0].start.device if self.runs else None
            order = torch.arange(self.kv_len, device=device)[None]
        whole = order[:, : self.kv_len // pool * pool].long()
        return whole.reshape(order.shape[0], -1, pool).amax(-1)

    def listed_keys(self, head: int, block: int) -> Tensor:
        """bool `[kv_len]`: keys in the unpooled runs of one query block, by their own positions."""
        device = self.runs[0].start.device if self.runs else None
        listed = torch.zeros(self.kv_len, dtype=torch.bool, device=device)
        for run in self.runs:
            if run.pool > 1:
                continue
            count = int(run.count[head * run.count.shape[0] // self.heads, block])
            start = run.start[head * run.start.shape[0] // self.heads, block, :count].long()
            keys = (start[:, None] + torch.arange(run.width, device=device)).flatten()
            listed[keys[keys < self.kv_len]] = True
        if self.key_order is not None:
            order = self.key_order[head * self.key_order.shape[0] // self.heads].long()
            listed = torch.empty_like(listed).index_copy_(0, order, listed)
        return listed

    def pooled_keys(self, run: RunList, head: int, block: int) -> Tensor:
        """int64 `[groups, pool]`: the keys of each group of a pooled run list, for one query block.

        A row sees a group if none of its keys is after the row. A group that the end of the
        sequence cuts short is left out.
        """
        count = int(run.count[head * run.count.shape[0] // self.heads, block])
        start = run.start[head * run.start.shape[0] // self.heads, block, :count].long()
        slots = start[:, None] + torch.arange(run.width, device=start.device)
        groups = slots.reshape(-1, run.pool)
        groups = groups[groups[:, -1] < self.kv_len]
        if self.key_order is None:
            return groups
        return self.key_order[head * self.key_order.shape[0] // self.heads].long()[groups]

    def block_mask(self, head: int, block: int) -> Tensor:
        """bool `[rows, kv_len]`: which single keys each row of one query block sees."""
        listed = self.listed_keys(head, block)
        key = torch.arange(self.kv_len, device=listed.device)
        row = torch.arange(*self.row_range(block), device=listed.device)[:, None]
        return (listed | (key < self.sink) | (row - key < self.window)) & (key <= row)
