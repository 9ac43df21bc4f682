"""The op for PyTorch: one opaque function of tensors, so that it does not break a compiled graph.

Only compiled code uses it; an eager call runs its backend directly.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import BlockPlan
from .runs import RunList


def run(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the backend that `choose_backend` returned."""
    name = ".reference" if backend == "reference" else f".{backend}.forward"
    module = importlib.import_module(name, __package__)
    out, lse = module.block_sparse_attention(q, k, v, plan, scale, softcap, sinks)
    return out, lse


def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    backend: str,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`run` as a node of a graph that is being traced."""
    out, lse = _attention(
        q,
        k,
        v,
        [run.start for run in plan.runs],
        [run.count for run in plan.runs],
        [run.width for run in plan.runs],
        [run.pool for run in plan.runs],
        plan.key_order,
        sinks,
        plan.block_q,
        plan.sink,
        plan.window,
        scale,
        softcap,
        backend,
    )
    return out, lse


@torch.library.custom_op("sparse_patch::block_sparse_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Sequence[Tensor],
    counts: Sequence[Tensor],
    widths: Sequence[int],
    pools: Sequence[int],
    key_order: Tensor | None,
    sinks: Tensor | None,
    block_q: int,
    sink: int,
    window: int,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    runs = tuple(map(RunList, starts, counts, widths, pools))
    plan = BlockPlan(q.shape[1], k.shape[1], block_q, runs, sink, window, key_order)
    return run(backend, q, k, v, plan, scale, softcap, sinks)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_rest: object, **_more: object) -> tuple[Tensor, Tensor]:
    heads, q_len, _ = q.shape
    out = q.new_empty(q_len, heads, v.shape[2]).transpose(0, 1)
    return out, q.new_empty(heads, q_len, dtype=torch.promote_types(q.dtype, torch.float32))
