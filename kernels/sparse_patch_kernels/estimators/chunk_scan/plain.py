"""Binary scans through chunks of keys, as in InfiniteHiP (arXiv:2502.08910)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import has_native
from .. import TILE_ELEMENTS


@has_native
def scan_chunks(
    queries: Tensor, k: Tensor, starts: Tensor, limit: Tensor, end: Tensor, chunk: int
) -> Tensor:
    """Best score on the path of a binary scan through each chunk, for some query blocks.

    Args:
        queries: `[heads, blocks, groups, dim]`, in k's dtype or float32.
        k: `[kv_heads, kv_len, dim]`.
        starts: int64 `[1 or heads, blocks, n]`, where chunks of `chunk` tokens begin, ascending.
        limit: int64 `[blocks]`: intervals that begin after it are not scanned.
        end: int64 `[blocks]`: chunks are cut off here.

    Returns:
        float32 `[heads, blocks, n]`; -inf where a chunk begins after the limit.
    """
    heads, blocks, _, dim = queries.shape
    best = torch.full((heads, *starts.shape[1:]), float("-inf"), device=starts.device)
    step = max(1, TILE_ELEMENTS // (heads * max(1, starts.shape[2]) * 2 * dim))
    for first in range(0, blocks, step):
        tile = slice(first, first + step)
        # Starts ascend, so the ones up to the limit come first.
        n = int((starts[:, tile] <= limit[tile, None]).sum(-1).max())
        best[:, tile, :n] = _scan(
            queries[:, tile].float(),
            k,
            starts[:, tile, :n].expand(heads, -1, -1),
            limit[tile, None],
            end[tile, None],
            chunk,
        )
    return best


def _scan(
    queries: Tensor, k: Tensor, left: Tensor, limit: Tensor, end: Tensor, chunk: int
) -> Tensor:
    right = torch.minimum(left + chunk, end)
    best = torch.full(left.shape, float("-inf"), device=left.device)
    # The authors scan once more at a single key, which has been scored already.
    for _ in range(max(1, (chunk - 1).bit_length())):
        active = (left < right) & (left <= limit)
        middle = (left + right) // 2
        keys = torch.stack([(left + middle) // 2, (middle + right) // 2], -1)
        scores = _scores(queries, k, keys)
        best = torch.where(active, torch.maximum(best, scores.amax(-1)), best)
        goes_left = scores[..., 0] > scores[..., 1]
        right = torch.where(active & goes_left, middle, right)
        left = torch.where(active & ~goes_left, middle, left)
    return best


def _scores(queries: Tensor, k: Tensor, keys: Tensor) -> Tensor:
    """float32, q . k of the best group of rows, for positions `keys [heads, blocks, n, 2]`."""
    heads = len(keys)
    kv_head = torch.arange(heads, device=keys.device) * len(k) // heads
    picked = k[kv_head[:, None, None], keys.flatten(2).clamp(max=k.shape[1] - 1)]
    return (queries @ picked.float().mT).amax(2).view(keys.shape)
