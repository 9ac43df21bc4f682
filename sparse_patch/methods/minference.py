"""MInference 1.0: each head keeps its vertical and slash lines, or has one of two other patterns.

vertical_and_slash (default): attention of the last 64 queries, summed down the columns and along
the diagonals, names `vertical` key columns (the first 30 forced) and `slash` distances (the nearest
100 forced). For 64 query rows, the keys at the chosen distances are gathered into tiles of 64 that
begin anywhere; chosen columns outside of the tiles are listed one by one.

block_sparse: of the blocks of 64 keys, the `topk` with the largest mean(q) . mean(k), without scale
or softmax. stream_llm: the first `sink` keys and the latest `window`. A layer whose heads all have
the same sizes is token-exact; in a mixed one the window is rounded up to whole tiles: it is exact
for the first of 64 query rows and up to 63 keys longer for the others.

`patterns=` reads the tables that the authors ship: a list with an entry per layer, each an object
"head" -> [type, size1, size2, score]. The sizes are vertical and slash, topk and nothing, sink and
window. A head without an entry takes `pattern` and its sizes.

Source: MInference (arXiv:2407.02490, NeurIPS 2024); the line search, the walk and the defaults
follow the authors' code (microsoft/MInference). Its block_sparse forces no block at all, so a query
may not even see itself: `variant="released"` does that, the default forces the diagonal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from sparse_patch_kernels import BlockPlan, RunList
from sparse_patch_kernels.estimators.pooling import pool_mean
from torch import Tensor

from ..lines import line_runs, top_lines
from ..registry import Examples, Knob, Method, check_sequence, param, register
from ..selection import BlockGrid, mask_of, rank, to_query_grid
from ..tables import entry_of, read_layers

BLOCK = 64
_READS: Mapping[str, tuple[str, ...]] = {
    "vertical_and_slash": ("vertical", "slash"),
    "block_sparse": ("topk",),
    "stream_llm": ("sink", "window"),
}
_OWNER = "MInference: patterns"

Entry = tuple[int, str, int, int]  # head, type, size1, size2: a line of a layer's table


class Pattern(NamedTuple):
    """What one head keeps; the sizes are those of `_READS`, in that order."""

    kind: str
    size1: int
    size2: int

    def keeps_all(self, kv_len: int) -> bool:
        if self.kind == "block_sparse":
            return self.size1 * BLOCK >= kv_len
        return max(self.size1, self.size2) >= kv_len


def _keeps(x: float) -> dict[str, Any]:
    """Vertical and slash lines, in the proportion of the defaults; 30 and 50 at least."""
    return {"vertical": max(30, round(1000 * x)), "slash": max(50, round(6096 * x))}


@register("minference")
@dataclass(frozen=True)
class MInference(Method):
    """Vertical and slash lines of a probe, or the pattern that a table gives a head."""

    source: ClassVar[str] = "arXiv:2407.02490"
    examples: ClassVar[Examples] = {
        "sparse": {"vertical": 30, "slash": 50},
        "everything": {"slash": 100000},
    }
    knob: ClassVar[Knob | None] = Knob(_keeps, 0.008, 20.0)
    spans_heads: ClassVar[tuple[str, ...]] = ("patterns", "heads")
    files: ClassVar[tuple[str, ...]] = ("patterns",)

    pattern: str = param(
        "vertical_and_slash", "pattern of the heads that no table lists", choices=tuple(_READS)
    )
    vertical: int = param(1000, "vertical_and_slash: number of key columns, at least 30", least=1)
    slash: int = param(6096, "vertical_and_slash: number of distances, at least 50", least=1)
    topk: int = param(100, "block_sparse: blocks of 64 per row", least=1)
    sink: int = param(1024, "stream_llm: first tokens", least=0)
    window: int = param(4096, "stream_llm: latest tokens, the query included", least=1)
    patterns: str | None = param(
        None, "JSON file of patterns per layer and head, as MInference ships them", kind=str
    )
    heads: tuple[Entry, ...] | None = param(
        None, "one layer's table: (head, pattern, size1, size2), ...", kind=tuple
    )
    variant: str = param(
        "corrected",
        "block_sparse: corrected always keeps the diagonal, released may not",
        choices=("corrected", "released"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for kind, names in _READS.items():
            for name in names:
                if kind != self.pattern and getattr(self, name) != default[name]:
                    raise ValueError(
                        f"MInference: {name}={getattr(self, name)!r} does nothing with "
                        f"pattern={self.pattern!r}, which reads {', '.join(_READS[self.pattern])}"
                    )
        if self.patterns is not None and self.heads is not None:
            raise ValueError("MInference: patterns (a file) or heads (one layer's), not both")
        for layer in range(len(self._layers) if self.patterns is not None else 0):
            self._entries(layer)
        if self.heads is not None:
            object.__setattr__(self, "heads", _checked("MInference: heads", self.heads))

    @cached_property
    def _layers(self) -> list[Any]:
        """Entries of the patterns file, one per layer."""
        assert self.patterns is not None
        return read_layers(_OWNER, self.patterns)

    def _entries(self, layer: int) -> tuple[Entry, ...]:
        """A layer of the patterns file, in the form of `heads`."""
        assert self.patterns is not None
        table = entry_of(self._layers, layer, _OWNER, self.patterns)
        where = f"{_OWNER}: {self.patterns!r}, layer {layer}"
        if not isinstance(table, dict):
            shape = 'an object "head" -> [type, size1, size2, score]'
            raise ValueError(f"{where}: must be {shape}, got {str(table)[:80]}")
        heads = []
        for name, row in table.items():
            head = int(name) if name.isdecimal() and len(name) < 10 else name
            heads.append((head, *(row[:3] if isinstance(row, list) and len(row) <= 4 else [row])))
        return _checked(where, heads)

    def for_layer(self, layer: int) -> MInference:
        """This method with one layer's entries of the patterns file as its `heads`.

        Raises:
            ValueError: the file has no such layer.
        """
        if self.patterns is None:
            return self
        return dataclasses.replace(self, patterns=None, heads=self._entries(layer) or None)

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """Method.plan; None where the sizes of every head cover all keys.

        Raises:
            ValueError: `patterns` is set (use `for_layer` first), or an entry names a head that q
                does not have.
        """
        check_sequence(q, k, q_offset)
        patterns = self._patterns(q.shape[0])
        q_len, kv_len = q.shape[1], k.shape[1]
        if all(pattern.keeps_all(kv_len) for pattern in patterns):
            return None
        if len(set(patterns)) == 1 and patterns[0].kind == "stream_llm":
            _, sink, window = patterns[0]
            return BlockPlan(q_len, kv_len, BLOCK, sink=sink, window=window)
        blocks = [h for h, pattern in enumerate(patterns) if pattern.kind == "block_sparse"]
        lines = [h for h in range(len(patterns)) if h not in blocks]
        tiles, runs = [], []
        if lines:
            columns, slashes = _lines(q, k, scale, patterns)
            line_tiles, singles = line_runs(columns[lines], slashes[lines], q_len, BLOCK)
            tiles.append((lines, line_tiles))
            if singles.start.shape[2]:
                runs.append(_join([(lines, singles)], q.shape[0]))
        if blocks:
            mask = _best_blocks(q, k, patterns, force=self.variant == "corrected")
            tiles.append((blocks, RunList.from_mask(mask[blocks], BLOCK)))
        return BlockPlan(q_len, kv_len, BLOCK, (_join(tiles, q.shape[0]), *runs))

    def _patterns(self, n_heads: int) -> list[Pattern]:
        """The pattern of each head."""
        if self.patterns is not None:
            raise ValueError(
                f"{_OWNER}={self.patterns!r} differ by layer: plan with for_layer(i).plan(...)"
            )
        size1, size2 = [*(getattr(self, name) for name in _READS[self.pattern]), 0][:2]
        result = [Pattern(self.pattern, size1, size2)] * n_heads
        for head, kind, first, second in self.heads or ():
            if head >= n_heads:
                raise ValueError(
                    f"MInference: the table lists head {head}; this layer has {n_heads} heads"
                )
            result[head] = Pattern(kind, first, second)
        return result


def _checked(where: str, entries: Iterable[Any]) -> tuple[Entry, ...]:
    """The entries as tuples.

    Raises:
        ValueError: an entry is not a head, a known type and two sizes, or a head is listed twice.
    """
    result: dict[int, Entry] = {}
    for entry in entries:
        if not _is_entry(entry):
            raise ValueError(
                f"{where}: {str(entry)[:80]} must be a head index, one of {', '.join(_READS)}, and "
                "two sizes, whole numbers (topk and window from 1)"
            )
        head, kind, size1, size2 = entry
        if head in result:
            raise ValueError(f"{where}: head {head} is listed twice")
        result[head] = (head, kind, size1, size2)
    return tuple(result.values())


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, (list, tuple)) or len(entry) != 4:
        return False
    head, kind, size1, size2 = entry
    whole = all(type(number) is int and 0 <= number < 2**62 for number in (head, size1, size2))
    known = isinstance(kind, str) and kind in _READS
    return whole and known and {"block_sparse": size1, "stream_llm": size2}.get(kind) != 0


def _lines(q: Tensor, k: Tensor, scale: float, patterns: list[Pattern]) -> tuple[Tensor, Tensor]:
    """bool `[heads, kv_len]` twice: the columns and the distances that each head keeps.

    A stream_llm head keeps its first columns and its shortest distances, a head that keeps
    everything all distances; the rows of a block_sparse head mean nothing.
    """
    position = torch.arange(k.shape[1], device=q.device)
    size1, size2 = torch.tensor([p[1:] for p in patterns], device=q.device).unbind(1)
    columns, slashes = top_lines(q[:, -BLOCK:], k, scale, size1, size2)
    stream = torch.tensor([p.kind == "stream_llm" for p in patterns], device=q.device)[:, None]
    columns = torch.where(stream, position < size1[:, None], columns)
    slashes = torch.where(stream, position < size2[:, None], slashes)
    # Tiles list everything more briefly than single columns.
    whole = torch.tensor([p.keeps_all(len(position)) for p in patterns], device=q.device)[:, None]
    return columns & ~whole, slashes | whole


def _best_blocks(q: Tensor, k: Tensor, patterns: list[Pattern], *, force: bool) -> Tensor:
    """bool `[heads, query blocks, key blocks]`: the best blocks, size1 per head."""
    heads, q_len, _ = q.shape
    kv_heads, kv_len, _ = k.shape
    grid = BlockGrid(q_len, kv_len, BLOCK, BLOCK, q.device)
    pooled_q, pooled_k = pool_mean(q, BLOCK, grid.q_offset), pool_mean(k, BLOCK)
    if not force and kv_len % BLOCK:  # the released code averages over padding too
        pooled_k[:, -1] *= kv_len % BLOCK / BLOCK
    scores = pooled_q.reshape(kv_heads, -1, q.shape[2]) @ pooled_k.mT
    causal = grid.causal()
    forced = grid.forced(0, 1) if force else torch.zeros_like(causal)
    order = rank(scores.view(heads, grid.rows, grid.blocks), causal, forced)
    sizes = torch.tensor([pattern.size1 for pattern in patterns], device=q.device)
    mask = mask_of(order, torch.minimum(sizes[:, None], causal.sum(-1)))
    return to_query_grid(mask, q_len, grid.q_offset, BLOCK)


def _join(parts: list[tuple[list[int], RunList]], n_heads: int) -> RunList:
    """One run list for all heads, from lists of one width, each for some of the heads."""
    first = parts[0][1]
    n = max(part.start.shape[2] for _, part in parts)
    start = first.start.new_zeros(n_heads, first.start.shape[1], n)
    count = first.count.new_zeros(n_heads, first.count.shape[1])
    for index, part in parts:
        start[index, :, : part.start.shape[2]] = part.start
        count[index] = part.count
    return RunList(start, count, first.width)
