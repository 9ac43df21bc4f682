"""InfiniteHiP: stages of ever finer chunks, each pruned by a binary scan of every chunk.

Between sink and window, keys are cut into chunks. For every block of queries a stage scans all its
chunks: it halves a chunk, goes on in the half whose middle key scores more, down to a single key;

    score of a key   = max over the block's rows, averaged by `stride_q`, of q . k
    score of a chunk = that of the best key on its path, over all heads (`lists="shared"`)

The best chunks, `keep` tokens of them, are cut up for the next stage. A row attends what the last
stage keeps, the first `sink` keys and its last `window` keys, token-exact. The first stage costs
O(T^2 / chunk), the others O(T). In decoding every stage runs at an interval of its own, and
between its runs the later ones work on what it left.

Source: InfiniteHiP (arXiv:2502.08910), its pruning only: no position extension, no offloading.
`variant="released"` keeps what the authors' code v1.2 kept: there, chunks inside the window compete
too; a scan may read keys after the query block if the window is shorter than two of the first
chunks; and if those are shorter than the block, keys just before the window of its last rows are no
candidates. By default none of this happens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from sparse_patch_kernels import BlockPlan, RunList
from sparse_patch_kernels.estimators import TILE_ELEMENTS
from sparse_patch_kernels.estimators.chunk_scan import scan_chunks
from sparse_patch_kernels.estimators.pooling import pool_mean
from torch import Tensor

from ..registry import Examples, Knob, Method, check_sequence, param, register

# Fills up lists of chunk starts: after every position, so that lists stay ascending.
_NONE = torch.iinfo(torch.int32).max


def _keeps(x: float) -> dict[str, Any]:
    """What each stage keeps, in the proportion of the defaults."""
    keep = tuple(max(8, round(x * n)) for n in (32768, 8192, 2048))
    return {"sink": 64, "window": 256, "keep": keep, "early_keep": max(8, round(4096 * x))}


@register("infinite_hip")
@dataclass(frozen=True)
class InfiniteHip(Method):
    """Chunks pruned in stages from coarse to fine, a sink and a window; in decoding too."""

    source: ClassVar[str] = "arXiv:2502.08910"
    examples: ClassVar[Examples] = {
        "sparse": {
            "chunks": (16, 4),
            "keep": (32, 16),
            "stride_q": (2, 1),
            "refresh": (4, 2),
            "early_layers": 0,
            "block_q": 16,
            "sink": 4,
            "window": 16,
        },
        "everything": {"window": 100000},
    }
    knob: ClassVar[Knob | None] = Knob(_keeps, 0.004, 16.0)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "3k": {},  # the defaults
        "3k-fast": {"refresh": (32, 16, 8)},
        "3k-flash": {"refresh": (96, 24, 8)},
        "5k": {"chunks": (64, 32, 16), "keep": (32768, 16384, 4096)},
    }

    chunks: tuple[int, ...] = param((256, 32, 8), "tokens per chunk, of each stage")
    keep: tuple[int, ...] = param((32768, 8192, 2048), "tokens kept by each stage")
    stride_q: tuple[int, ...] = param((4, 4, 1), "query rows averaged into one, of each stage")
    refresh: tuple[int, ...] = param(
        (16, 8, 4), "decode steps between runs of each stage; all 0: decoding is exact"
    )
    early_layers: int = param(3, "number of first layers that use early_keep", least=0)
    early_keep: int = param(4096, "minimum tokens kept by the last stage of those layers", least=1)
    block_q: int = param(64, "query rows that share a list", least=1)
    sink: int = param(256, "first tokens that every query keeps", least=0)
    window: int = param(
        1024, "latest tokens that a query keeps; at least a chunk of the first stage", least=1
    )
    lists: str = param(
        "shared", "one list for all heads, or one per head", choices=("shared", "each")
    )
    variant: str = param(
        "corrected",
        "released: as the authors' code; corrected: its slips repaired",
        choices=("released", "corrected"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"chunks": 1, "keep": 1, "stride_q": 1, "refresh": 0}.items():
            value = getattr(self, name)
            if not all(type(n) is int and n >= least for n in value):
                raise ValueError(f"InfiniteHip: {name}={value} must be whole numbers >= {least}")
            if len(value) != len(self.chunks):
                raise ValueError(
                    f"InfiniteHip: {name}={value} must have one number for each of the "
                    f"{len(self.chunks)} stages in chunks={self.chunks}"
                )
        if any(a % b for a, b in zip(self.chunks, self.chunks[1:], strict=False)):
            raise ValueError(f"InfiniteHip: chunks={self.chunks}: each must divide the one before")
        if any(self.block_q % stride for stride in self.stride_q):
            raise ValueError(
                f"InfiniteHip: stride_q={self.stride_q} must divide block_q={self.block_q}"
            )
        if any(self.refresh) and not all(self.refresh):
            raise ValueError(f"InfiniteHip: refresh={self.refresh} must be all 0 or all above 0")

    def for_layer(self, layer: int) -> InfiniteHip:
        if layer >= self.early_layers:
            return self
        last = max(self.keep[-1], self.early_keep)
        return dataclasses.replace(self, keep=(*self.keep[:-1], last))

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """See Method.plan; None up to `sink + window` keys and the least that a stage keeps."""
        check_sequence(q, k, q_offset)
        if self._keeps_all(k.shape[1]):
            return None
        n_blocks = -(-q.shape[1] // self.block_q)
        step = self._blocks_at_once(q, k.shape[1])
        width = -(-self.keep[-1] // self.chunks[-1])
        parts = []
        for first in range(0, n_blocks, step):
            rows = q[:, first * self.block_q : (first + step) * self.block_q]
            offset = q_offset + first * self.block_q
            starts = self._run_stages(rows, k, scale, offset)[-1]
            parts.append(F.pad(starts, (0, width - starts.shape[-1]), value=_NONE))
        return self._plan_of(torch.cat(parts, 1), q.shape[1], k.shape[1], self._window)

    @property
    def sparse_decode(self) -> bool:
        return any(self.refresh)

    def decode(
        self, q: Tensor, k: Tensor, *, scale: float, memory: Any
    ) -> tuple[BlockPlan | None, Any]:
        """See Method.decode; a stage runs at its interval, or when an earlier one runs.

        The memory is the number of steps so far, the number of keys when the first stage last ran,
        and what each stage passed on.
        """
        kv_len = k.shape[1]
        if self._keeps_all(kv_len):
            return None, None
        lists: tuple[Tensor, ...]
        step, built, lists = memory or (0, kv_len, ())
        due = [stage for stage, interval in enumerate(self.refresh) if step % interval == 0]
        if due:
            lists = self._run_stages(q, k, scale, kv_len - 1, lists[: due[0]])
            built = built if due[0] else kv_len
        # Keys that leave the window after the first stage ran are in no list, so the window grows.
        plan = self._plan_of(lists[-1], 1, kv_len, self._window + kv_len - built)
        return plan, (step + 1, built, lists)

    @property
    def _window(self) -> int:
        return max(self.window, self.chunks[0])

    def _keeps_all(self, kv_len: int) -> bool:
        # In the released variant keys in the window may take the place of others.
        spare = 0 if self.variant == "released" else min(self.keep)
        return kv_len <= self.sink + self._window + spare

    def _blocks_at_once(self, q: Tensor, kv_len: int) -> int:
        """Query blocks whose scores fit a tile."""
        most = -(-kv_len // self.chunks[0])
        for kept, chunk in zip(self.keep, self.chunks[1:], strict=False):
            most = max(most, -(-kept // chunk))
        return max(1, TILE_ELEMENTS // (q.shape[0] * most))

    def _plan_of(self, starts: Tensor, q_len: int, kv_len: int, window: int) -> BlockPlan:
        count = (starts < kv_len).sum(-1, dtype=torch.int32)
        runs = RunList(starts.to(torch.int32), count, self.chunks[-1])
        return BlockPlan(q_len, kv_len, self.block_q, (runs,), self.sink, window)

    def _run_stages(
        self, q: Tensor, k: Tensor, scale: float, q_offset: int, done: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, ...]:
        """What each stage passes on: int64 `[lists, blocks, n]`, starts of chunks, ascending.

        Args:
            q: `[heads, rows, dim]`, the rows of some query blocks; row 0 is position `q_offset`.
            done: what the first stages passed on earlier; only the others run.
        """
        first = torch.arange(q_offset, q_offset + q.shape[1], self.block_q)
        last = (first + self.block_q).clamp(max=q_offset + q.shape[1]) - 1
        limit, end = last - self._window, last + 1
        stop = int(limit[-1]) + 1
        if self.variant == "released":
            limit = (first - max(0, self.window - self.chunks[0])).clamp(min=0)
            end = torch.full_like(end, k.shape[1])
            stop = min(int(limit[-1]) + 1, k.shape[1] - self.window)
        grid = torch.arange(self.sink, max(stop, self.sink), self.chunks[0])
        starts = done[-1] if done else grid.to(q.device).expand(1, len(first), -1)
        lists = list(done)
        for stage in range(len(done), len(self.chunks)):
            queries = _group_rows(q, self.block_q, self.stride_q[stage], scale)
            scores = scan_chunks(
                queries, k, starts, limit.to(q.device), end.to(q.device), self.chunks[stage]
            )
            if self.lists == "shared":
                scores = scores.amax(0, keepdim=True)
            starts = self._prune(stage, starts, scores)
            lists.append(starts)
        return tuple(lists)

    def _prune(self, stage: int, starts: Tensor, scores: Tensor) -> Tensor:
        """The best chunks of `starts [1 or lists, blocks, n]`, cut for the next stage."""
        chunk = self.chunks[stage]
        order = scores.argsort(dim=-1, descending=True, stable=True)
        best = order[..., : -(-self.keep[stage] // chunk)].sort(dim=-1).values
        kept = starts.expand_as(scores).gather(-1, best)
        kept = kept.masked_fill(scores.gather(-1, best).isneginf(), _NONE)
        smaller = self.chunks[min(stage + 1, len(self.chunks) - 1)]
        parts = torch.arange(0, chunk, smaller, device=kept.device)
        return (kept[..., None] + parts).flatten(-2).clamp(max=_NONE)


def _group_rows(q: Tensor, block: int, stride: int, scale: float) -> Tensor:
    """`[heads, rows, dim]` -> `[heads, blocks, groups, dim]`: means of `stride` rows, scaled.

    The last group may be smaller, and is repeated where the last block has fewer groups. Single
    rows are not multiplied by a positive scale, which changes no ranking.
    """
    n = q.shape[1]
    means = q if stride == 1 and scale > 0 else pool_mean(q, stride) * scale
    if n % block == 0:
        return means.reshape(len(q), n // block, block // stride, q.shape[2])
    first = torch.arange(0, n, block, device=q.device)[:, None] // stride
    group = torch.arange(-(-min(block, n) // stride), device=q.device)
    return means[:, (first + group).clamp(max=means.shape[1] - 1)]
