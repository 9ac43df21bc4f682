"""Vertical and slash lines: which ones a probe selects, and the runs that hold them (MInference).

A line is a key column, or a distance between query and key, that every query keeps.
"""

from __future__ import annotations

import torch
from sparse_patch_kernels import RunList
from sparse_patch_kernels.estimators.probe import probe_lines
from torch import Tensor

from .selection import top_mask

# First columns and shortest distances that are chosen first, and the minimum number of each.
_FORCED_COLUMNS, _LEAST_COLUMNS = 30, 30
_FORCED_SLASHES, _LEAST_SLASHES = 100, 50


def top_lines(
    q: Tensor, k: Tensor, scale: float, n_columns: Tensor, n_slashes: Tensor
) -> tuple[Tensor, Tensor]:
    """The columns and distances that hold most of a probe's attention.

    The first 30 columns and the nearest 100 distances are chosen first; where a head keeps fewer,
    the lowest of them, so distance 0 is always kept.

    Args:
        q: `[heads, n_probe, dim]`, the last rows of the sequence.
        k: `[kv_heads, kv_len, dim]`.
        n_columns, n_slashes: int64 `[heads]`, lines to keep; raised to 30 and 50.

    Returns:
        bool `[heads, kv_len]` twice: by key position, by distance.
    """
    position = torch.arange(k.shape[1], device=q.device)
    vertical, slash = probe_lines(q, k, scale)
    first, near = position < _FORCED_COLUMNS, position < _FORCED_SLASHES
    return (
        _top(vertical, first, n_columns.clamp(min=_LEAST_COLUMNS)),
        _top(slash.flip(-1), near, n_slashes.clamp(min=_LEAST_SLASHES)),
    )


def _top(mass: Tensor, forced: Tensor, count: Tensor) -> Tensor:
    return top_mask(mass.nan_to_num().masked_fill(forced, float("inf")), count)


def line_runs(columns: Tensor, slashes: Tensor, q_len: int, block: int) -> tuple[RunList, RunList]:
    """Tiles that cover every chosen distance, and the chosen columns that no tile holds.

    A query block of the positions `[end - block, end)` needs, for a distance o < end, the keys
    `[max(end - o, block) - block, max(end - o, block))`. From the farthest to the nearest, keys
    that end at most a `block` after the previous tile are covered by a whole tile that adjoins it;
    others begin a tile of their own. So tiles may hold keys that no line asked for.

    Args:
        columns: bool `[heads, kv_len]`, keys that every row keeps.
        slashes: bool `[heads, kv_len]`, distances that every row keeps; one at least per head.
        q_len: the queries are the last `q_len` positions; query blocks count from the first.
        block: tokens per query block and per tile.

    Returns:
        Run lists of width `block` and of width 1, disjoint, both `[heads, n_q_blocks, n]`.
    """
    kv_len = slashes.shape[1]
    n_blocks = -(-q_len // block)
    ends = kv_len - q_len + torch.arange(1, n_blocks + 1, device=slashes.device) * block
    last = (ends - 1).clamp(max=kv_len - 1)  # row
    start = _walk(slashes, ends, block)
    count = (start <= last[:, None]).sum(-1)
    start = start[..., : int(count.max())].to(torch.int32)
    tiles = RunList(start.contiguous(), count.to(torch.int32), block)
    return tiles, _singles(columns, tiles, last)


def _walk(slashes: Tensor, ends: Tensor, block: int) -> Tensor:
    """int64 `[heads, n_q_blocks, n]`: tile starts, ascending; starts from `ends` on are padding.

    Counted back from the end of a query block, distances mean the same for all blocks: one table of
    steps serves them all, each entering it at its own place.
    """
    heads, kv_len = slashes.shape
    distance = torch.arange(int(ends[-1]) + 1, device=slashes.device)
    # nearest[h, r]: largest chosen distance below r.
    chosen = torch.where(slashes, distance[:kv_len], -1)
    chosen = torch.nn.functional.pad(chosen, (1, len(distance) - kv_len - 1), value=-1)
    nearest = chosen.cummax(-1).values
    # A tile that ends r before its query block's end is followed by one that ends `after[h, r]`
    # before it; `-block` where no distance is left, which puts its start past the query block.
    after = torch.minimum(distance - block, nearest).masked_fill_(nearest < 0, -block)
    back = ends.expand(heads, -1)
    starts: list[Tensor] = []
    while True:
        back = after.gather(1, back.clamp(min=0))
        if not bool((back > -block).any()):
            return torch.stack(starts, -1)
        starts.append(ends - back - block)


def _singles(columns: Tensor, tiles: RunList, last: Tensor) -> RunList:
    """The columns that lie in no tile, as runs of width 1; head by head, as they may be many."""
    start, count = [], []
    for head, column in enumerate(columns):
        keys = column.nonzero()[:, 0].to(torch.int32).expand(len(last), -1).contiguous()
        begins = tiles.start[head].masked_fill(
            ~tiles.valid(tiles.heads)[head], torch.iinfo(torch.int32).max
        )
        tile = torch.searchsorted(begins, keys, right=True) - 1
        within = keys - begins.gather(1, tile.clamp(min=0)) < tiles.width
        kept = ~((tile >= 0) & within) & (keys <= last[:, None])
        # Kept keys move to the front; the others go to a slot past the last.
        slot = torch.where(kept, kept.cumsum(-1) - 1, keys.shape[1])
        count.append(kept.sum(-1, dtype=torch.int32))
        listed = keys.new_zeros(len(last), keys.shape[1] + 1).scatter_(1, slot, keys)
        start.append(listed[:, : int(count[-1].max())])
    widest = max(keys.shape[1] for keys in start)
    start = [torch.nn.functional.pad(keys, (0, widest - keys.shape[1])) for keys in start]
    return RunList(torch.stack(start), torch.stack(count), 1)
