"""Keys and values that lie in the pages of an engine's cache, read back as tensors.

How a block of the cache is laid out inside differs by engine, CPU and version: transposed, or in
tiles for matrix units. So it is found out: numbers are written through the engine's own function,
and where they turn up is the packing. A cache that changes values (quantized) has none, and is not
read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Floating types hold numbers up to here exactly, bfloat16 being the smallest.
_DIGITS = 256

# Writes keys and values `[block, dim]` into an empty block, and returns what then lies in the parts
# of it that are for keys and for values, `[block * dim]` each.
Write = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Packing:
    """Where a block holds each element of keys or values `[block, dim]`: int64 `[block, dim]`."""

    place: Tensor

    def unpack(self, blocks: Tensor) -> Tensor:
        """`[..., block, dim]` from what lies in blocks, `[..., block * dim]`; a view if it can."""
        block, dim = self.place.shape
        steps = self._steps
        if steps == (1, block):
            return blocks.reshape(*blocks.shape[:-1], dim, block).mT
        if steps != (dim, 1):
            blocks = blocks[..., self.place.to(blocks.device).flatten()]
        return blocks.reshape(*blocks.shape[:-1], block, dim)

    @functools.cached_property
    def _steps(self) -> tuple[int, int]:
        """From a token to the next, and from a channel; 0, 0 where they are not always the same."""
        block, dim = self.place.shape
        token = int(self.place[1, 0]) if block > 1 else dim
        channel = int(self.place[0, 1]) if dim > 1 else 1
        even = token * torch.arange(block)[:, None] + channel * torch.arange(dim)
        return (token, channel) if torch.equal(self.place, even) else (0, 0)


@dataclass(frozen=True)
class Halves:
    """How blocks hold keys in their first half and values in their second, each packed."""

    keys: Packing
    values: Packing

    def __call__(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """See `Unpack`."""
        keys, values = blocks.flatten(2).chunk(2, -1)
        return self.keys.unpack(keys), self.values.unpack(values)


def find_packing(write: Write, block: int, dim: int, dtype: torch.dtype) -> Halves | None:
    """How a block of the cache packs keys and values; None: it does not hold them as they are.

    Args:
        write: the engine's.
        block: tokens in a block.
        dtype: of keys and values.
    """
    numbers = torch.arange(block * dim)
    found = [torch.zeros_like(numbers), torch.zeros_like(numbers)]
    for power in range(0, int(numbers[-1]).bit_length(), 8):
        digits = ((numbers >> power) % _DIGITS).to(dtype).view(block, dim)
        for sums, part in zip(found, write(digits, digits), strict=True):
            if part.shape != numbers.shape or part.dtype != dtype:
                return None
            sums += part.nan_to_num(-1.0).double().round().long() << power
    packings = []
    for sums in found:
        order, place = sums.sort()
        if not torch.equal(order, numbers):
            return None
        packings.append(Packing(place.view(block, dim)))
    return Halves(*packings)


def side_by_side(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token has its key and its value one after the other; see `Unpack`."""
    keys, values = blocks.chunk(2, -1)
    return keys, values


# Keys and values `[blocks, kv_heads, block, dim]` from blocks `[blocks, kv_heads, block, 2 * dim]`,
# whose inner axes are those in name only.
Unpack = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Pages:
    """The cache of one layer, and which blocks of it belong to whom.

    Attributes:
        cache: `[blocks, kv_heads, block, 2 * dim]`.
        unpack: how it is laid out.
        table: int `[sequences, most blocks]`, the blocks of each sequence of the batch, in order.
    """

    cache: Tensor
    unpack: Unpack
    table: Tensor

    def read(self, index: int, kv_len: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[kv_heads, kv_len, dim]` of a sequence of the batch."""
        used = -(-kv_len // self.cache.shape[2])
        keys, values = self.unpack(self.cache[self.table[index, :used].long()])
        return _in_a_row(keys, kv_len), _in_a_row(values, kv_len)


def _in_a_row(blocks: Tensor, kv_len: int) -> Tensor:
    """`[kv_heads, kv_len, dim]` from `[blocks, kv_heads, block, dim]`."""
    return blocks.transpose(0, 1).flatten(1, 2)[:, :kv_len]
