"""Calls of the estimators, with the arguments that methods call them with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from sparse_patch_kernels.estimators.compaction import kernel as compaction
from sparse_patch_kernels.estimators.pooling import kernel as pooling
from sparse_patch_kernels.estimators.probe import kernel as probe
from sparse_patch_kernels.estimators.threshold import kernel as threshold
from sparse_patch_kernels.estimators.token_scores import kernel as token_scores
from sparse_patch_kernels.estimators.tree_search import Tree
from sparse_patch_kernels.estimators.tree_search import kernel as tree_search
from torch import Tensor

from kernel_checks.case import DIMS, DTYPES, HEADS, KV_HEADS, TOKENS, Case, empty


def estimators() -> Iterator[Case]:
    """Calls of the estimators: the first of each family in all dimensions."""
    for family, shapes in ESTIMATORS.items():
        for number, (shape, call) in enumerate(shapes.items()):
            first = number == 0
            for dim, dtype in _ESTIMATOR_DIMS if first else [(128, "bf16")]:
                yield Case(
                    family=family,
                    shape=shape,
                    dim=dim,
                    v_dim=dim,
                    dtype=dtype,
                    call=partial(call, dim, DTYPES[dtype]),
                    every_config=first and (dim, dtype) == (128, "bf16"),
                    quick=first and family == "probe" and (dim, dtype) == (128, "bf16"),
                )
    yield Case("threshold", "256 x 256", 0, 0, "fp32", _threshold, every_config=True)
    yield Case("compaction", "256 blocks", 0, 0, "bool", _compact, every_config=True, quick=True)


_ESTIMATOR_DIMS = [*((dim, "bf16") for dim, v_dim in DIMS if dim == v_dim), (128, "fp16")]


def _queries(dim: int, dtype: torch.dtype, rows: int = TOKENS, heads: int = HEADS) -> Tensor:
    return empty(heads, rows, dim, dtype=dtype)


def _keys(dim: int, dtype: torch.dtype) -> Tensor:
    return empty(KV_HEADS, TOKENS, dim, dtype=dtype)


def _probe_lines(rows: int, dim: int, dtype: torch.dtype) -> None:
    probe.probe_lines(_queries(dim, dtype, rows), _keys(dim, dtype), dim**-0.5)


def _key_scores(dim: int, dtype: torch.dtype) -> None:
    probe.key_scores(_queries(dim, dtype, 128), _keys(dim, dtype), dim**-0.5)


def _token_scores(how: Mapping[str, Any], dim: int, dtype: torch.dtype) -> None:
    q, k = _queries(dim, dtype), _keys(dim, dtype)
    token_scores.token_scores(q, k, dim**-0.5, **how)


def _pooled_rows(width: int, dim: int, dtype: torch.dtype) -> None:
    q, k = _queries(dim, dtype), _keys(dim, dtype)
    rows = empty(TOKENS // 32, dtype=torch.int64)
    token_scores.pooled_rows(q, k, dim**-0.5, rows, rows, width=width)


def _proxy_scores(proxies: int, strides: tuple[int, int], dim: int, dtype: torch.dtype) -> None:
    """Proxy heads, means of heads, are as many for keys as for queries."""
    q = empty(proxies, TOKENS, dim, dtype=dtype)
    stride_q, stride_k = strides
    token_scores.token_scores(
        q, q, dim**-0.5, block=128, stride_q=stride_q, stride_k=stride_k, reduce="max"
    )


def _antidiagonals(stride: int, dim: int, dtype: torch.dtype) -> None:
    q, k = _queries(dim, dtype), _keys(dim, dtype)
    token_scores.antidiagonal_scores(q, k, dim**-0.5, block=128, stride=stride)


def _pool(block: int, dim: int, dtype: torch.dtype) -> None:
    pooling.pool_mean(_keys(dim, dtype), block)


def _compact() -> None:
    blocks = TOKENS // 128
    compaction.compact(empty(HEADS, blocks, blocks, dtype=torch.bool))


def _threshold() -> None:
    blocks = TOKENS // 128
    threshold.largest_within(empty(HEADS, blocks * blocks, dtype=torch.float32), 0.9)


def _search(changes: Mapping[str, Any], dim: int, dtype: torch.dtype) -> None:
    tree = Tree(**{**HIP, **changes})
    tree_search.search_leaves(_queries(dim, dtype), _keys(dim, dtype), dim**-0.5, tree)


HIP: dict[str, Any] = {
    "block_q": 64, "stride_q": 2, "block_k": 8, "stride_k": 1, "mask_k": 1024, "sink": 16,
    "window": 256, "rep": "center", "init": "floor", "beam_factor": 1, "row_causal": True,
}  # fmt: skip
"""The defaults of the method `hip`."""

ESTIMATORS: dict[str, dict[str, Callable[[int, torch.dtype], None]]] = {
    "probe": {
        "128 queries, lines": partial(_probe_lines, 128),
        "64 queries, lines": partial(_probe_lines, 64),
        "128 queries, keys": _key_scores,
    },
    "token_scores": {
        "1 query of 16, sum": partial(_token_scores, {"block": 128, "stride_q": 16}),
        "blocks of 64 x 16": partial(_token_scores, {"block": 64, "block_k": 16, "stride_q": 16}),
        "listed rows, blocks of 16": partial(_pooled_rows, 16),
        "listed rows, blocks of 128": partial(_pooled_rows, 128),
        "1 query of 16, largest, proxy heads": partial(_proxy_scores, KV_HEADS, (16, 1)),
        "1 query and key of 4, largest, one proxy": partial(_proxy_scores, 1, (4, 4)),
    },
    "antidiagonals": {
        "groups of 8": partial(_antidiagonals, 8),
        "groups of 16": partial(_antidiagonals, 16),
    },
    "pooling": {"blocks of 128": partial(_pool, 128), "blocks of 64": partial(_pool, 64)},
    "tree_search": {
        "leaves of 8": partial(_search, {}),
        "leaves of 2": partial(_search, {"block_q": 32, "block_k": 2}),
    },
}
"""By family: what methods call."""
