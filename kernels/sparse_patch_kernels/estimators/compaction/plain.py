"""Index lists of the marked entries of a mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...dispatch import has_kernel, has_native

_AT_ONCE = 1 << 20  # entries sorted together on a CPU


def lists_at_once(x: Tensor) -> Iterator[slice]:
    """Slices of `x [lists, ...]` to sort together: on a CPU a few MiB each.

    A sort returns int64 and makes copies, several times the memory of the result.
    """
    lists = x.shape[0]
    step = lists if x.device.type != "cpu" else max(1, _AT_ONCE // max(1, x[:1].numel()))
    yield from (slice(first, first + step) for first in range(0, lists, step))


@has_kernel
@has_native
def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The indices at which each row of a mask is true.

    Args:
        mask: bool `[lists, rows, n]`.

    Returns:
        int32 `[lists, rows, m]`, the marked entries of each row, ascending, then padding from `[0,
        n)`; and int32 `[lists, rows]`, their number. `m` is at most `n` and at least the largest
        count.
    """
    count = mask.sum(-1, dtype=torch.int32)
    longest = max(1, int(count.max()))
    index = torch.empty(*count.shape, longest, dtype=torch.int32, device=mask.device)
    for part in lists_at_once(mask):
        # A stable sort by "not marked" puts the marked ones first and keeps them ascending.
        order = mask[part].logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
        index[part] = order[..., :longest]
    return index, count
