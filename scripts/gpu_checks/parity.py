"""Is the op right? Against the reference in float64, for every kind of plan and shape."""

from __future__ import annotations

import dataclasses
import importlib
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sparse_patch_eval.base.rows import Row
from sparse_patch_kernels import BlockPlan, RunList, block_sparse_attention, reference
from torch import Tensor

from gpu_checks import inputs
from gpu_checks.scale import Scale
from gpu_checks.stage import Stage, Work


@dataclass(frozen=True)
class Case:
    """One call of the op.

    Attributes:
        name: what it is about.
        kind: of plan, see `make_plan`.
        lists: heads that the plan tells apart; default: all.
        softcap, sinks: with them.
        packed: as the second of three sequences of one launch.
        transposed: q, k and v in memory as `[seq, heads, dim]`, which models hand over.
    """

    name: str
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    v_dim: int
    block_q: int
    block_k: int
    kind: str = "blocks"
    lists: int | None = None
    softcap: float | None = None
    sinks: bool = False
    packed: bool = False
    transposed: bool = False


def cases(scale: Scale) -> list[Case]:
    """What is compared, the most telling first."""
    n, block = scale.tokens, scale.block
    base = Case("blocks", 8, 2, n, n, scale.dim, scale.dim, block, block)
    if not scale.on_gpu:
        base = dataclasses.replace(base, heads=4)

    def like(name: str, **changes: Any) -> Case:
        return dataclasses.replace(base, name=name, **changes)

    half, small = block // 2, max(8, block // 8)
    ragged = {"q_len": n - n // 8 - 3, "kv_len": n - n // 8 - 3}
    return [
        base,
        like(f"blocks of {half}", block_q=half, block_k=half),
        like(f"blocks of {block} x {half}", block_k=half),
        *(like(f"runs of {k}", block_q=half, block_k=k) for k in (1, 2, 4, 8)),
        like("sink and window", kind="sink+window"),
        like("runs of 8, sink and window", kind="sink+window", block_q=half, block_k=8),
        like("sink and window alone", kind="no runs"),
        like("key order", kind="order"),
        like("key order, sink and window", kind="order+sink+window"),
        like("keys in order of segments", kind="segments"),
        like("ranked lists", kind="ranked", lists=2),
        like("ranked lists, sink and window", kind="ranked+sink+window", lists=2),
        like("rest pooled", kind="pooled"),
        like("rest pooled, key order", kind="pooled+order"),
        like("two lists that overlap", kind="two lists"),
        like("a list per KV head", lists=2),
        like("heads in one tile", lists=2, block_q=small, block_k=small),
        like("softcap", softcap=20.0),
        like("attention sinks", sinks=True),
        like("softcap, attention sinks, key order", kind="order", softcap=20.0, sinks=True),
        like("several sequences", packed=True, kind="sink+window"),
        like("ragged end", **ragged),
        like("q_offset", q_len=n // 3 + 5),
        like("q_offset, key order", q_len=n // 3 + 5, kind="order"),
        like("one query", q_len=1, kind="sink+window"),
        like("one KV head", kv_heads=1),
        like("as many KV heads", kv_heads=base.heads),
        like("12 heads, 4 KV heads", heads=12, kv_heads=4, **ragged),
        like("transposed", transposed=True),
        *(
            like(f"head_dim {d}, {v}", dim=d, v_dim=v, heads=4, **ragged)
            for d, v in scale.dims
        ),
    ]  # fmt: skip


def make_plan(case: Case, seed: int) -> BlockPlan:
    """A random plan of the case's kind, on the CPU, where plans are checked as they are made."""
    draw = torch.Generator().manual_seed(seed)
    heads = case.lists or case.heads
    n_q, n_k = -(-case.q_len // case.block_q), -(-case.kv_len // case.block_k)
    # About 16 runs of 128 keys, at most half of them; the same in keys where runs are shorter.
    mask = torch.rand(heads, n_q, n_k, generator=draw) < 0.4
    base = BlockPlan.from_block_mask(
        mask,
        block_q=case.block_q,
        block_k=case.block_k,
        q_len=case.q_len,
        kv_len=case.kv_len,
    )
    (tokens,) = base.runs
    past = torch.arange(1, n_k + 1) * case.block_k <= base.last_rows()[:, None] + 1 - case.block_q
    changes: dict[str, Any] = {}
    if "no runs" in case.kind:
        changes["runs"] = ()
    if "window" in case.kind or "no runs" in case.kind:
        changes |= {"sink": 5, "window": case.block_q + 3}
    if "order" in case.kind:
        orders = [torch.randperm(case.kv_len, generator=draw) for _ in range(case.kv_heads)]
        changes["key_order"] = torch.stack(orders).int()
    if "segments" in case.kind:  # sorted within each two blocks, as PBS does
        near = torch.arange(case.kv_len) // (2 * case.block_k)
        shape = (case.kv_heads, case.kv_len)
        changes["key_order"] = (near + 0.9 * torch.rand(shape, generator=draw)).argsort(-1).int()
    if "ranked" in case.kind:
        changes["runs"] = (_ranked(case, base, draw),)
    if "pooled" in case.kind:
        rest = RunList.from_mask(~mask & past, case.block_k, pool=case.block_k)
        changes["runs"] = (tokens, rest)
    if "two lists" in case.kind:
        other = torch.rand(heads, n_q, n_k, generator=draw) < 0.3
        seen = torch.arange(n_k) * case.block_k <= base.last_rows()[:, None]
        changes["runs"] = (tokens, RunList.from_mask(other & seen, case.block_k))
    return dataclasses.replace(base, **changes)


def _ranked(case: Case, plan: BlockPlan, draw: torch.Generator) -> RunList:
    """A list in no order for all heads of a KV group; each head takes a beginning of its own."""
    seen = plan.last_rows() // case.block_k + 1
    shape = (case.kv_heads, plan.n_q_blocks, int(seen[-1]))
    worth = torch.rand(shape, generator=draw)
    worth.masked_fill_(torch.arange(shape[2]) >= seen[:, None], -1)
    order = worth.argsort(-1, descending=True)
    count = (torch.rand(case.heads, plan.n_q_blocks, generator=draw) * (seen + 1)).int()
    return RunList((order * case.block_k).int(), count, case.block_k)


def on_device(plan: BlockPlan, device: torch.device) -> BlockPlan:
    runs = tuple(
        dataclasses.replace(run, start=run.start.to(device), count=run.count.to(device))
        for run in plan.runs
    )
    order = None if plan.key_order is None else plan.key_order.to(device)
    return dataclasses.replace(plan, runs=runs, key_order=order)


def items(stage: Stage) -> list[tuple[str, Work]]:
    """Every case in every dtype with the default configuration, then with the others."""
    scale = stage.scale
    listed: list[tuple[str, Work]] = []
    for dtype in scale.dtypes:
        step = 1 if dtype == scale.dtypes[0] else scale.thinned
        listed += [
            (f"{case.name}, {name_of(dtype)}", partial(_compare, stage, case, dtype, [0]))
            for case in cases(scale)[::step]
        ]
    # The interpreter runs the first configuration only.
    others = [1, 2, 3, 4] if scale.on_gpu else [1]
    for case in cases(scale) if scale.on_gpu else cases(scale)[:1]:
        name = f"{case.name}, {name_of(scale.dtype)}, other configurations"
        listed.append((name, partial(_compare, stage, case, scale.dtype, others)))
    return listed


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def poison() -> None:
    """From now on `torch.empty` and its like give NaN or absurd numbers (see
    `torch.utils.deterministic.fill_uninitialized_memory`): what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.simplefilter("ignore")  # some plain functions have no deterministic form


def _compare(stage: Stage, case: Case, dtype: torch.dtype, configs: list[int]) -> Iterable[Row]:
    """A row per configuration: errors of the op, and of plain PyTorch in the same dtype."""
    launch = importlib.import_module("sparse_patch_kernels.triton.launch")
    seed = sum(map(ord, case.name))
    q, k, v = _tensors(stage, case, dtype, seed)
    scale = 1 / math.sqrt(case.dim)
    plan = on_device(make_plan(case, seed), stage.device.torch)
    more: dict[str, Any] = {"softcap": case.softcap}
    if case.sinks:
        more["sinks"] = torch.linspace(-2, 3, case.heads, device=q.device)
    both = torch.cat([v, v.abs()], 2).double()
    exact, lse = reference.block_sparse_attention(
        q.double(), k.double(), both, plan, scale, **_doubled(more)
    )
    exact, size = exact[..., : case.v_dim], exact[..., case.v_dim :]
    plain, _ = reference.block_sparse_attention(q, k, v, plan, scale, **more, acc=dtype)
    limit, lse_limit = inputs.allowed(size, dtype), inputs.FLOAT32 * (1 + lse.abs())
    if "pooled" in case.kind and dtype != torch.float32:
        moved, more_allowed = inputs.allowed_of_means(q, k, size, scale)
        limit, lse_limit = limit + more_allowed, lse_limit + moved
    for index in configs:
        with launch.forcing(index):
            out, got_lse = _attend(stage, case, q, k, v, plan, scale, more)
            again = out
            if stage.scale.on_gpu or case.name == "blocks":
                again, _ = _attend(stage, case, q, k, v, plan, scale, more)
        blind = lse.isneginf()
        same_blind = torch.equal(got_lse.isneginf(), blind)
        error = (out.double() - exact).abs()
        lse_error = (got_lse.double() - lse).abs().masked_fill(blind, 0)
        plain_error = float((plain.double() - exact).abs().max())
        ok = (
            same_blind
            and bool((error <= limit).all())  # false for NaN
            and bool((lse_error <= lse_limit).all())
            and torch.equal(out, again)
        )
        yield {
            "kind": "parity",
            "what": case.name,
            "dtype": name_of(dtype),
            "config": index,
            "ok": ok,
            "max_error": float(error.max()),
            "of_allowed": float((error / limit).max()),
            "of_plain_error": float(error.max()) / plain_error if plain_error else None,
            "lse_of_allowed": float((lse_error / lse_limit).max()),
            "repeats": torch.equal(out, again),
            "same_blind_rows": same_blind,
        }


def _doubled(more: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if isinstance(x, Tensor) else x for name, x in more.items()}


def _tensors(stage: Stage, case: Case, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    device = stage.device
    # Where means are rounded, large logits would hide all else.
    make_q = _noise if "pooled" in case.kind else inputs.queries
    made: tuple[Tensor, ...] = (
        make_q(device, case.heads, case.q_len, case.dim, end=case.kv_len, seed=seed),
        inputs.keys(device, case.kv_heads, case.kv_len, case.dim, seed=seed + 1),
        device.randn(case.kv_heads, case.kv_len, case.v_dim, seed=seed + 2),
    )
    made = tuple(x.to(dtype) for x in made)
    if case.transposed:
        return tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in made)
    return made


def _noise(device: Any, heads: int, n: int, dim: int, *, end: int, seed: int) -> Tensor:
    x: Tensor = device.randn(heads, n, dim, seed=seed)
    return x


def _attend(
    stage: Stage,
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    more: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    if not case.packed:
        return block_sparse_attention(
            q, k, v, plan, scale=scale, backend="triton", return_lse=True, **more
        )
    forward = importlib.import_module("sparse_patch_kernels.triton.forward")
    # Before it a shorter sequence, after it one with keys before its first query.
    other = dataclasses.replace(case, q_len=case.q_len // 2 + 3, kv_len=case.kv_len // 2 + 3)
    third = dataclasses.replace(case, q_len=7)
    parts, plans = [], []
    for seed, one in ((11, other), (0, case), (13, third)):
        mine = (q, k, v) if one is case else _tensors(stage, one, q.dtype, seed)
        parts.append(mine)
        plans.append(plan if one is case else on_device(make_plan(one, seed), q.device))
    joined = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    out, lse = forward.attend_packed(*joined, plans, scale, **more)
    rows = slice(other.q_len, other.q_len + case.q_len)
    return out[:, rows], lse[:, rows]
