"""Is every method right on this device? Its plans beside the CPU's, and patched into every family
of tiny models that the tests have."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from sparse_patch_eval.base.rows import Row
from sparse_patch_kernels import BlockPlan, block_sparse_attention, reference
from torch import Tensor

import sparse_patch
from gpu_checks import inputs
from gpu_checks.parity import name_of
from gpu_checks.stage import Lacking, Stage, Work

HEADS, KV_HEADS = 4, 2
# A layer in which no method is exact because it is one of the first.
LAYER = 3
# Of what either plan keeps: scores that differ by rounding may rank otherwise.
AGREEMENT = 0.95
DECODE_STEPS = 4
# Logits are of magnitude 1, in float32; as the tests have it.
LOGITS = 1e-5
# Methods patched in one item: where a family's shapes are rare, each has kernels to compile.
TOGETHER = 5


def items(stage: Stage) -> list[tuple[str, Work]]:
    """Families, which take longest, then every method with short blocks and with its defaults."""
    examples, zoo = (importlib.import_module(f"tests.{x}") for x in ("methods.examples", "zoo"))
    names = stage.scale.compared or tuple(examples.SPARSE)
    sets = {name: {"short blocks": examples.SPARSE[name], "defaults": {}} for name in names}
    groups = [names[i : i + TOGETHER] for i in range(0, len(names), TOGETHER)]
    return [
        *(
            (
                f"models of {family}, {group[0]} to {group[-1]}",
                partial(_compare_models, stage, family, group),
            )
            for family in stage.scale.families or tuple(zoo.FAMILIES)
            for group in groups
        ),
        *(
            (f"{name}, {which}", partial(_compare_plans, stage, name, which, parameters))
            for name in names
            for which, parameters in sets[name].items()
        ),
    ]


# --- plans ---------------------------------------------------------------------------------------


def _compare_plans(
    stage: Stage, name: str, which: str, parameters: dict[str, Any]
) -> Iterable[Row]:
    """A row per dtype and pair of lengths."""
    launch = importlib.import_module("sparse_patch_kernels.triton.launch")
    method = sparse_patch.get_method(name, **parameters).for_layer(LAYER)
    for dtype in stage.scale.dtypes[:2]:
        for q_len, kv_len in stage.scale.method_lengths:
            q, k, v = _tensors(stage, q_len, kv_len, dtype)
            scale = q.shape[2] ** -0.5
            row: Row = {
                "kind": "method",
                "what": name,
                "parameters": which,
                "dtype": name_of(dtype),
            }
            row |= {"q_len": q_len, "kv_len": kv_len}
            with launch.forcing(0):
                plan = method.plan(q, k, scale=scale, q_offset=kv_len - q_len)
                own = method.plan(q.cpu(), k.cpu(), scale=scale, q_offset=kv_len - q_len)
                if plan is None or own is None:
                    yield {**row, "exact": True, "ok": plan is own}
                    continue
                shares = [_of_allowed(q, k, v, plan)]
                if method.sparse_decode:
                    shares += _decoded(method, q, k, v)
            agreement = _agreement(plan, own)
            yield {
                **row,
                "density": plan.density,
                "agreement": agreement,
                "of_allowed": max(shares),
                "ok": agreement >= AGREEMENT and all(share <= 1 for share in shares),
            }


def _tensors(stage: Stage, q_len: int, kv_len: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    device, dim = stage.device, stage.scale.dim
    made = (
        inputs.queries(device, HEADS, q_len, dim, end=kv_len, seed=q_len),
        inputs.keys(device, KV_HEADS, kv_len, dim, seed=kv_len),
        device.randn(KV_HEADS, kv_len, dim, seed=1),
    )
    return tuple(x.to(dtype) for x in made)


def _of_allowed(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> float:
    """The op's largest error against the reference in float64, as a share of what is allowed."""
    out = block_sparse_attention(q, k, v, plan, backend="triton")
    both = torch.cat([v, v.abs()], 2).double()
    want, _ = reference.block_sparse_attention(
        q.double(), k.double(), both, plan, q.shape[2] ** -0.5
    )
    want, size = want[..., : v.shape[2]], want[..., v.shape[2] :]
    limit = inputs.allowed(size, q.dtype)
    if any(run.pool > 1 for run in plan.runs) and q.dtype != torch.float32:
        limit = limit + inputs.allowed_of_means(q, k, size, q.shape[2] ** -0.5)[1]
    share = (out.double() - want).abs() / limit
    return float(share.max()) if bool(torch.isfinite(share).all()) else float("inf")


def _decoded(method: Any, q: Tensor, k: Tensor, v: Tensor) -> list[float]:
    """As `_of_allowed`, for the last steps of a growing cache, the memory handed on."""
    memory, shares = None, []
    for n in range(k.shape[1] - DECODE_STEPS + 1, k.shape[1] + 1):
        row, keys = q[:, -1:], k[:, :n]
        plan, memory = method.decode(row, keys, scale=q.shape[2] ** -0.5, memory=memory)
        if plan is not None:
            shares.append(_of_allowed(row, keys, v[:, :n], plan))
    return shares


def _agreement(plan: BlockPlan, own: BlockPlan) -> float:
    """Of the (row, key) pairs that either plan keeps, the share that both keep."""
    masks = (one.to_dense_mask(one.q_len, one.kv_len).cpu() for one in (plan, own))
    mine, theirs = (mask.expand(HEADS, -1, -1) for mask in masks)
    return float((mine & theirs).sum() / (mine | theirs).sum())


# --- models --------------------------------------------------------------------------------------


def _compare_models(stage: Stage, family: str, names: Iterable[str]) -> Iterable[Row]:
    """A row, of a batch of two rows, the first of them padded on the left.

    A method that keeps everything must answer as eager attention, and one that does not must
    answer to a padded row as to that row alone.
    """
    launch = importlib.import_module("sparse_patch_kernels.triton.launch")
    examples, zoo = (importlib.import_module(f"tests.{x}") for x in ("methods.examples", "zoo"))
    try:
        model = zoo.build(family).to(stage.device.torch)
    except zoo.NoSuchFamily as reason:
        raise Lacking(str(reason)) from reason
    batch = {
        name: x.to(stage.device.torch) for name, x in zoo.batch(stage.scale.model_tokens).items()
    }
    real = batch["attention_mask"].bool()
    options: dict[str, Any] = {"min_length": 0, "min_queries": 0, "dense_layers": 0}
    kept, alone, wrong = {}, {}, []
    with launch.forcing(0):
        eager = zoo.logits(model, **batch)
        for name in names:
            with sparse_patch.patch(model, name, **options, **examples.KEEP_ALL[name]):
                got = zoo.logits(model, **batch)
            kept[name] = float((got - eager)[real].abs().max())
            with sparse_patch.patch(model, name, **options, **examples.SPARSE[name]) as handle:
                padded = zoo.logits(model, **batch)[0, zoo.PADS :]
                layers = sum(layer.sparse_calls > 0 for layer in handle.report().layers)
                single = zoo.logits(model, input_ids=batch["input_ids"][:1, zoo.PADS :])[0]
            alone[name] = float((padded - single).abs().max())
            near = kept[name] <= LOGITS and alone[name] <= LOGITS  # false for NaN
            if not near or layers != zoo.SPARSE_LAYERS.get(family, zoo.LAYERS):
                wrong.append(name)
    yield {
        "kind": "family",
        "what": family,
        "methods": len(kept),
        "keeps_all": max(kept.values()),
        "padded": max(alone.values()),
        "wrong": wrong,
        "ok": not wrong,
    }
