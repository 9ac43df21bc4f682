"""HiP: a beam search down a binary tree of key leaves finds the keys of each query block.

Between sink and window, keys are cut into leaves of `block_k` tokens. For every block of queries
the search starts from K = mask_k / block_k equal chunks of leaves; then, until all are single
leaves, it splits each chunk in two, scores each half by the one leaf that represents it,

    score = max over sampled rows of the block and sampled keys of the leaf of q . k,

and keeps the K best halves. That is ceil(log2(leaves / K)) rounds of 2 K leaves a block: O(T log T)
in all. A row attends the K leaves of its block, the first `sink` keys and its last `window` keys,
token-exact. `beam_factor` makes the search wider, and keeps the K best leaves of its last round.

Source: HiP (arXiv:2406.09827, ICLR 2025), compared with lists that the authors' code v1.1 made.
What differs from it: scores are ranked in float32 (theirs pass a sigmoid in bf16, where large ones
tie); the first chunks are equal unless `init="aligned"`; and while decode steps reuse a list, the
window's left edge stays where it was, so that no token falls between the two. The leaves are
coarser and the budget larger than the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from sparse_patch_kernels import BlockPlan, RunList
from sparse_patch_kernels.estimators.tree_search import Tree, search_leaves
from torch import Tensor

from ..registry import Examples, Knob, Method, check_sequence, param, register


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

    dense_layers: int = param(
        3, "number of first layers that sparse_patch.patch keeps exact", least=0
    )
    block_q: int = param(64, "query rows that share a list", least=1)
    stride_q: int = param(2, "score every stride_q-th row of a query block", least=1)
    block_k: int = param(8, "tokens per leaf", least=1)
    stride_k: int = param(1, "score every stride_k-th key of a leaf", least=1)
    mask_k: int = param(1024, "tokens that the search keeps, besides sink and window", least=1)
    sink: int = param(16, "first tokens that every query keeps", least=0)
    window: int = param(256, "latest tokens that a query keeps, itself included", least=1)
    rep: str = param("center", "which leaf represents a chunk", choices=("center", "first"))
    init: str = param(
        "floor", "first chunks: equal, or cut at powers of two", choices=("floor", "aligned")
    )
    beam_factor: int = param(1, "factor by which the search is wider than what it keeps", least=1)
    row_causal: bool = param(True, "score a key only with rows whose window it has left")
    refresh: int = param(8, "decode steps that share one list; 0: decoding is exact", least=0)

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
        """See Method.decode; the memory is the last list and the number of keys it was made at."""
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
        leaves, count = search_leaves(q, k, scale, self.tree)
        return RunList(self.sink + leaves * self.block_k, count, self.block_k)

    @property
    def tree(self) -> Tree:
        """The parameters of the search."""
        return Tree(**{field.name: getattr(self, field.name) for field in fields(Tree)})
