"""A method on some heads only: the others see every key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_patch import BlockPlan, Method, RunList

# Keys listed together for the heads that see all; any number would do.
_WIDTH = 128


@dataclass(frozen=True)
class OnlyHeads(Method):
    """Runs a method on the query heads named per layer, and exact attention on the rest.

    Attributes:
        method: what chooses keys.
        heads: layer -> heads that run sparse; a layer that is not named runs exact.
        layer: set by `for_layer`.
    """

    method: Method = field(kw_only=True)
    heads: Mapping[int, frozenset[int]] = field(kw_only=True, repr=False)
    layer: int = -1

    def for_layer(self, layer: int) -> OnlyHeads:
        method = self.method.for_layer(layer)
        return dataclasses.replace(self, method=method, layer=layer)

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """See Method.plan; None where no head of the layer is to run sparse."""
        sparse = self.heads.get(self.layer, frozenset())
        if not sparse or self.layer < self.method.dense_layers:
            return None
        plan = self.method.plan(q, k, scale=scale, q_offset=q_offset)
        if plan is None or len(sparse) == q.shape[0]:
            return plan
        return show_all(plan, q.shape[0], sparse, q.device)


def show_all(
    plan: BlockPlan, heads: int, sparse: frozenset[int], device: torch.device
) -> BlockPlan:
    """`plan`, but heads that are not in `sparse` see every key.

    Raises:
        ValueError: the plan has pooled keys, which these heads would then see twice.
    """
    if any(run.pool > 1 for run in plan.runs):
        raise ValueError("a plan with pooled keys (rectify) cannot be kept to some heads")
    start = torch.arange(0, plan.kv_len, _WIDTH, dtype=torch.int32, device=device)
    last = plan.last_rows(device) if plan.key_order is None else plan.kv_len - 1
    seen = torch.zeros(plan.n_q_blocks, dtype=torch.int32, device=device) + last // _WIDTH + 1
    dense = torch.tensor([head not in sparse for head in range(heads)], device=device)
    every = RunList(
        start.expand(1, plan.n_q_blocks, -1), (dense[:, None] * seen).to(torch.int32), _WIDTH
    )
    return dataclasses.replace(plan, runs=(*plan.runs, every))
