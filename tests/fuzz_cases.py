"""One random case of each kind, drawn from a seed: the op, a method, a patched model.

Each `check_*` draws everything from its number, compares with the reference, and returns a line
that says what was drawn. A failed comparison is an AssertionError, a crash whatever it is.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from sparse_patch_kernels import (
    BlockPlan,
    RunList,
    block_sparse_attention,
)
from sparse_patch_kernels.cpu import native, selection
from torch import Tensor
from transformers import DynamicCache

import sparse_patch
from sparse_patch.registry import method_class
from tests.methods.examples import KEEP_ALL, SPARSE
from tests.zoo import FAMILIES, tiny_model

# Half a step of the output's dtype at magnitude 1; the kernels compute in float32, or wider.
ROUNDING = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.bfloat16: 2**-7,  # weights are rounded as well, where the CPU multiplies bf16 as such
    torch.float16: 2**-10,
}
MAX_LISTS = 300
"""Heads times query blocks of a plan: the reference loops over them."""


class Draw:
    """Two generators from one seed: numbers and choices, and tensors."""

    def __init__(self, seed: int) -> None:
        self.numbers = random.Random(seed)
        self.tensors = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """Small ones are as likely as large ones."""
        return round(low + (high - low) * self.numbers.random() ** 2)

    def one_of(self, *choices: Any) -> Any:
        return self.numbers.choice(choices)

    def chance(self, share: float) -> bool:
        return self.numbers.random() < share

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.tensors)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.tensors)

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.tensors) < self.numbers.random()


def draw_lengths(draw: Draw, most: int = 700) -> tuple[int, int]:
    """(q_len, kv_len)"""
    kv_len = draw.integer(1, most)
    return draw.one_of(kv_len, kv_len, draw.integer(1, kv_len)), kv_len


def draw_heads(draw: Draw) -> tuple[int, int]:
    """(heads, kv_heads)"""
    kv_heads = draw.one_of(1, 1, 2, 3)
    return kv_heads * draw.one_of(1, 2, 3, 4), kv_heads


KINDS = ("random", "drift", "constant keys", "zeros", "large", "tiny", "outliers")


def draw_sequence(
    draw: Draw, heads: tuple[int, int], lengths: tuple[int, int], dim: int, kind: str
) -> tuple[Tensor, Tensor]:
    """q `[heads, q_len, dim]` and k `[kv_heads, kv_len, dim]`, float32."""
    q, k = draw.normal(heads[0], lengths[0], dim), draw.normal(heads[1], lengths[1], dim)
    if kind == "drift":  # neighbours are alike, and the first key is a sink
        drift = draw.normal(1, lengths[1], dim).cumsum(1) / lengths[1] ** 0.5
        k += 3 * drift
        k[:, 0] *= 3
        q += 3 * drift[:, lengths[1] - lengths[0] :] + k[:, :1].mean(0)
    elif kind == "constant keys":
        k = k[:, :1].expand_as(k)
    elif kind == "zeros":
        q, k = q * draw.one_of(0, 1), k * 0
    elif kind == "large":
        q, k = q * 100, k * 100  # logits of 1e4 and more
    elif kind == "tiny":
        q, k = q * 1e-39, k * 1e-20  # denormal in float32, 0 in float16
    elif kind == "outliers":
        k[:, draw.permutation(lengths[1])[:3]] *= 30
        q[:, :, 0] *= 20
    return q, k


def laid_out(draw: Draw, x: Tensor) -> Tensor:
    """The same values, however they lie in memory."""
    layout = draw.one_of("plain", "rows first", "columns first", "every other", "part", "shared")
    if layout == "rows first":  # as Transformers has it
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "columns first":
        return x.mT.contiguous().mT
    if layout == "every other":
        return x.repeat_interleave(2, 2)[..., ::2]
    if layout == "part":  # of a longer cache
        return torch.cat([x, x], 1)[:, x.shape[1] :]
    if layout == "shared" and torch.equal(x, x[:1].expand_as(x)):
        return x[:1].expand_as(x)
    return x


# --- the op --------------------------------------------------------------------------------------


def draw_plan(draw: Draw, heads: int, kv_heads: int, q_len: int, kv_len: int) -> BlockPlan:
    """A lawful plan with any of what a plan may hold."""
    block_q = draw.integer(max(1, -(-q_len * heads // MAX_LISTS)), 140)
    blank = BlockPlan(q_len, kv_len, block_q)
    middle = draw.one_of(kv_heads, heads // kv_heads)
    sharing = functools.partial(draw.one_of, 1, middle, heads)
    change = {
        "sink": draw.one_of(0, 0, draw.integer(0, kv_len + 9)),
        "window": draw.one_of(0, 1, draw.integer(0, kv_len + 9)),
    }
    if draw.chance(0.3):
        order = torch.stack([draw_order(draw, kv_len) for _ in range(sharing())])
        change["key_order"] = order.to(draw.one_of(torch.int32, torch.int64))
    blank = dataclasses.replace(blank, **change)
    kind = draw.one_of("none", "grid", "anywhere", "anywhere", "two", "ranked", "pooled")
    if kind == "pooled":
        levels = draw_levels(draw, blank, sharing())
        try:
            return dataclasses.replace(blank, runs=levels)
        except ValueError as error:  # sink or window reach into what is pooled
            if "overlaps" not in str(error):
                raise
            return dataclasses.replace(blank, runs=levels, sink=0, window=0)
    lists = {
        "none": (),
        "grid": (draw_grid,),
        "anywhere": (draw_anywhere,),
        "two": (draw_grid, draw_anywhere),
        "ranked": (draw_ranked,),
    }[kind]
    return dataclasses.replace(blank, runs=tuple(one(draw, blank, sharing()) for one in lists))


def draw_order(draw: Draw, n: int) -> Tensor:
    """Any order, or one that is shuffled within segments only."""
    if draw.chance(0.5):
        return draw.permutation(n)
    segment = draw.integer(1, n)
    jitter = torch.rand(n, generator=draw.tensors) * 0.9
    return (torch.arange(n) // segment + jitter).argsort()


def first_after(plan: BlockPlan) -> Tensor:
    """int64 `[n_q_blocks]`: where a run of each query block may begin no more."""
    if plan.key_order is not None:
        return torch.full((plan.n_q_blocks,), plan.kv_len)
    return plan.last_rows() + 1


def draw_grid(draw: Draw, plan: BlockPlan, lists: int) -> RunList:
    width = draw.one_of(plan.block_q, draw.integer(1, 140))
    starts = torch.arange(0, plan.kv_len, width)
    mask = draw.mask(lists, plan.n_q_blocks, len(starts)) & (starts < first_after(plan)[:, None])
    run = RunList.from_mask(mask, width)
    return dataclasses.replace(run, on_grid=draw.chance(0.5))


def draw_anywhere(draw: Draw, plan: BlockPlan, lists: int) -> RunList:
    """Runs off any grid; the padding after them is rubbish."""
    width = draw.integer(1, 90)
    ends = first_after(plan)
    n = draw.integer(1, max(1, plan.kv_len // width))
    gaps = torch.randint(0, draw.integer(1, 60) + 1, (lists, plan.n_q_blocks, n))
    start = (gaps + width).cumsum(2) - width
    count = (start < ends[:, None]).sum(2)
    count = (count * torch.rand(count.shape, generator=draw.tensors) * 1.3).long().minimum(count)
    rubbish = torch.arange(n) >= count[..., None]
    start[rubbish] = draw.one_of(-1, 0, 2**31 - 1, plan.kv_len)
    return RunList(start.int(), count.int(), width)


def draw_ranked(draw: Draw, plan: BlockPlan, lists: int) -> RunList:
    """One list for all heads, best first; each head takes a beginning of its own."""
    width = draw.integer(1, 140)
    seen = (first_after(plan) - 1) // width + 1
    start = torch.full((1, plan.n_q_blocks, int(seen.max())), -1)
    for block, n in enumerate(seen.tolist()):
        start[0, block, :n] = draw.permutation(n) if lists > 1 else torch.arange(n)
    count = torch.rand(lists, plan.n_q_blocks, generator=draw.tensors) * (seen + 1)
    return RunList((start * width).int(), count.int(), width)


def draw_levels(draw: Draw, plan: BlockPlan, lists: int) -> tuple[RunList, ...]:
    """Each cell of a grid is shown whole, as means of some size, or not at all."""
    pools = draw.one_of((2,), (2, 4), (4, 8), (3,), (16,))
    width = pools[-1] * draw.one_of(1, 2, 5)
    starts = torch.arange(0, plan.kv_len, width)
    shape = (lists, plan.n_q_blocks, len(starts))
    level = torch.randint(0, len(pools) + 2, shape, generator=draw.tensors)
    level.masked_fill_(starts >= first_after(plan)[:, None], len(pools) + 1)
    pooled = (RunList.from_mask(level == i, width, pool) for i, pool in enumerate(pools, 1))
    return (RunList.from_mask(level == 0, width), *pooled)


def check_op(number: int) -> str:
    """Every way through the CPU backend equals the reference in float64."""
    draw = Draw(number)
    heads = draw_heads(draw)
    lengths = draw_lengths(draw)
    dim, v_dim = draw.one_of(draw.integer(8, 160), 16, 64), draw.integer(8, 160)
    dtype = draw.one_of(torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    kind = draw.one_of(*KINDS, "random", "drift")
    plan = draw_plan(draw, *heads, *lengths)
    more: dict[str, Any] = {"scale": draw.one_of(None, None, 0.3, 1.0, -0.2, 0.0)}
    if draw.chance(0.3):
        more["softcap"] = draw.one_of(0.5, 5.0, 50.0)
    if draw.chance(0.3):
        more["sinks"] = 3 * draw.normal(heads[0])
    q, k = (x.to(dtype) for x in draw_sequence(draw, heads, lengths, dim, kind))
    v = draw.one_of(draw.normal(heads[1], lengths[1], v_dim), torch.ones(1)).to(dtype)
    v = v.expand(heads[1], lengths[1], v_dim) if v.ndim == 1 else v
    q, k, v = (laid_out(draw, x) for x in (q, k, v))
    compiled = draw.chance(0.6)
    assert_equals_reference(q, k, v, plan, compiled=compiled, **more)
    parts = [
        f"{run.width}/{run.pool}x{run.start.shape[0]}/{run.count.shape[0]}" for run in plan.runs
    ]
    return (
        f"op: {kind}, heads {heads}, lengths {lengths}, dims {dim}/{v_dim}, {dtype}, block_q "
        f"{plan.block_q}, runs {parts}, sink {plan.sink}, window {plan.window}, order "
        f"{plan.key_order is not None}, compiled {compiled}, {sorted(more)}"
    )


@contextmanager
def without_compiler() -> Iterator[None]:
    """The op and what methods choose with, as where nothing can be compiled."""
    with (
        mock.patch.object(native, "_kernel", return_value=None),
        mock.patch.object(selection, "_library", return_value=None),
    ):
        yield


def assert_equals_reference(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, compiled: bool = True, **more: Any
) -> None:
    """`backend="cpu"`, with its compiled kernel or without, against the reference in float64."""
    wide = dict(more)
    if "sinks" in more:
        wide["sinks"] = more["sinks"].double()
    want, want_lse = block_sparse_attention(
        *(x.double() for x in (q, k, v)), plan, backend="reference", return_lse=True, **wide
    )
    with nullcontext() if compiled else without_compiler():
        out, lse = block_sparse_attention(q, k, v, plan, backend="cpu", return_lse=True, **more)
    assert out.dtype == q.dtype
    assert torch.equal(lse.isinf(), want_lse.isinf()), "rows that see nothing"
    scale = q.shape[2] ** -0.5 if more.get("scale") is None else abs(more["scale"])
    logit = scale * float(q.double().norm(dim=2).max() * k.double().norm(dim=2).max())
    logit = max([logit, *more.get("sinks", torch.zeros(1)).abs().tolist()])
    step = 1e-15 if q.dtype == torch.float64 else 1e-6  # a few of float32's: long sums
    finite = ~lse.isinf()
    slack = step * (20 + logit)
    torch.testing.assert_close(
        lse[finite].double(), want_lse[finite], atol=slack, rtol=step, msg=lambda m: f"lse: {m}"
    )
    size = max(1e-30, float(v.double().abs().max()))
    torch.testing.assert_close(
        out.double(), want, atol=size * (ROUNDING[q.dtype] + 2 * min(slack, 1)), rtol=0
    )


# --- a method ------------------------------------------------------------------------------------

FILES = {"thresholds", "patterns", "profile"}
"""Parameters that name a file."""


def draw_parameter(draw: Draw, rule: Any) -> Any:
    """A value that the rule of `param(...)` admits."""
    if rule.choices is not None:
        return draw.one_of(*rule.choices)
    if rule.kind is bool:
        return draw.chance(0.5)
    low = rule.least if rule.least is not None else (rule.above or 0)
    if rule.kind is int:
        return draw.integer(int(low), int(min(rule.upto or 300, 300)))
    high = rule.upto if rule.upto is not None else low + 2
    value = low + (high - low) * draw.numbers.random()
    return draw.one_of(value, value, high) if rule.admits(value) else high


def draw_method(draw: Draw) -> Any:
    """An example of any method, a preset or its defaults, some parameters drawn anew."""
    name = draw.one_of(*sparse_patch.list_methods())
    kind = method_class(name)
    rules = {
        field.name: field.metadata["rule"]
        for field in dataclasses.fields(kind)
        if "rule" in field.metadata and field.name not in FILES
    }
    free = [n for n, rule in rules.items() if rule.kind not in (str, tuple) or rule.choices]
    while True:
        params = dict(draw.one_of(SPARSE[name], SPARSE[name], KEEP_ALL[name], {}))
        if not params and kind.presets:
            params = dict(kind.presets[draw.one_of(*kind.presets)])
        for key in free:
            if draw.chance(0.25):
                params[key] = draw_parameter(draw, rules[key])
        try:
            return sparse_patch.get_method(name, **params)
        except ValueError:  # two parameters that do not go together
            continue


def check_method(number: int) -> str:
    """A plan is lawful, every row sees itself, and the op computes it; so do decode steps."""
    draw = Draw(number)
    method = draw_method(draw).for_layer(draw.integer(0, 20))
    heads = draw_heads(draw)
    q_len, kv_len = draw_lengths(draw)
    dim = draw.one_of(16, 32, 64, 2 * draw.integer(4, 80))
    kind = draw.one_of(*KINDS, "drift", "drift")
    dtype = draw.one_of(torch.float32, torch.float32, torch.bfloat16, torch.float16)
    if kind == "large" and dtype == torch.float16:
        dtype = torch.float32  # infinite sums, which patch() never passes on
    q, k = (x.to(dtype) for x in draw_sequence(draw, heads, (q_len, kv_len), dim, kind))
    q, k = laid_out(draw, q), laid_out(draw, k)
    v = draw.normal(heads[1], kv_len, dim).to(dtype)
    scale = draw.one_of(dim**-0.5, dim**-0.5, 0.5)
    says = f"method: {method!r}, {kind}, heads {heads}, lengths {q_len, kv_len}, dim {dim}, {dtype}"
    compiled = draw.chance(0.7)
    try:
        with nullcontext() if compiled else without_compiler():
            plan = method.plan(q, k, scale=scale, q_offset=kv_len - q_len)
    except ValueError as error:
        named = [field.name for field in dataclasses.fields(method) if field.name in str(error)]
        if not named:
            raise AssertionError(f"{says}: an error that names no parameter: {error}") from error
        return f"{says}: refused"
    if plan is None:
        return f"{says}: exact"
    try:
        assert_lawful(plan, q_len, kv_len)
        assert_equals_reference(q, k, v, plan, scale=scale, compiled=compiled)
        if method.sparse_decode and kv_len > 3:
            check_decode(draw, method, q, k, v, scale)
    except (AssertionError, ValueError) as error:
        raise AssertionError(f"{says}: {error}") from error
    return f"{says}: density {plan.density:.3f}"


def assert_lawful(plan: BlockPlan, q_len: int, kv_len: int) -> None:
    plan.check()
    assert (plan.q_len, plan.kv_len) == (q_len, kv_len)
    density = plan.head_density()
    assert bool(((density > 0) & (density <= 1 + 1e-9)).all()), f"density {density}"
    mask = plan.to_dense_mask(q_len, kv_len)
    row = torch.arange(q_len)
    assert bool(mask[:, row, row + kv_len - q_len].all()), "a row does not see itself"


def check_decode(draw: Draw, method: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Some steps over a growing cache, the memory handed on, dropped now and then."""
    memory = None
    for kv_len in range(max(1, k.shape[1] - 5), k.shape[1] + 1):
        row, keys = q[:, -1:], k[:, :kv_len]
        plan, memory = method.decode(row, keys, scale=scale, memory=memory)
        if draw.chance(0.2):
            memory = None
        if plan is not None:
            assert_lawful(plan, 1, kv_len)
            assert_equals_reference(row, keys, v[:, :kv_len], plan, scale=scale)


# --- a patched model -----------------------------------------------------------------------------

SLIDING = {"mistral_swa", "gemma2", "gemma3", "gpt_oss", "cohere2", "llama4_text"}
"""Families whose windows are counted in places of the batch, pads included."""
ROUTED = {"gpt_oss", "qwen3_moe", "mixtral", "deepseek_v3", "llama4_text"}
"""Families with experts: float32 only, and bf16 may send a token to another expert."""


@functools.cache
def model_of(family: str, dtype: torch.dtype) -> Any:
    return tiny_model(family).to(dtype)


def check_model(number: int) -> str:
    """A padded row equals its single run, and goes on as that; so do packed ones. `dense` equals
    eager, in one piece and in chunks; windows and chunks are of any width (from 2 on: Transformers'
    own cache keeps too much of 1)."""
    draw = Draw(number)
    family = draw.one_of(*FAMILIES)
    dense = draw.chance(0.4) or family in ROUTED
    name = "dense" if dense else draw.one_of(*sparse_patch.list_methods())
    # A choice between nearly equal scores may go either way in float32, where a batch rounds
    # otherwise than a single row; in float64 that does not happen.
    dtype = torch.float32 if dense else torch.float64
    if dense and family not in ROUTED:
        dtype = draw.one_of(torch.float32, torch.bfloat16)
    sides = ["left", "right"] if family in SLIDING else ["left", "right", "inner"]
    rows = [
        torch.randint(
            6,
            128,
            (draw.one_of(draw.integer(1, 40), draw.integer(1, 220)),),
            generator=draw.tensors,
        )
        for _ in range(draw.one_of(1, 2, 3))
    ]
    side = draw.one_of(*sides)
    ids, mask = padded(draw, rows, side)
    more = draw_more(draw, len(rows)) if side == "left" or family not in SLIDING else []
    model, local = model_of(family, dtype), draw.one_of(8, draw.integer(2, 300))
    if family in SLIDING:
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.sliding_window = module.config.attention_chunk_size = local
    options = {"min_length": draw.one_of(0, 0, 60), "min_queries": draw.one_of(0, 16)}
    params = {} if dense and draw.chance(0.5) else dict(SPARSE[name])
    says = (
        f"model: {family}, {name}, {dtype}, {side}, rows {[len(row) for row in rows]}, then "
        f"{[part.shape[1] for part in more]}, windows of {local}, {options}"
    )
    # Two experts may be equally good for a token.
    share = 0.5 if family in ROUTED else 1.0
    near = functools.partial(assert_near, tolerance=TOLERANCE[dtype], share=share)
    try:
        with sparse_patch.patch(model, name, dense_layers=0, **options, **params):
            batch, packed = turns(model, ids, mask, more), in_one_row(model, rows)
            for row, tokens in enumerate(rows):
                alone = turns(
                    model, tokens[None], torch.ones_like(tokens)[None], [x[row, None] for x in more]
                )
                real = torch.cat([mask[row], torch.ones_like(batch[row, mask.shape[1] :, 0])])
                near(batch[row, real.bool()], alone[0], what="a padded row and its single run")
                near(packed[row], alone[0, : len(tokens)], what="a packed row and its single run")
            chunked = in_chunks(draw, model, rows[0][None]) if dense else None
        if dense:
            real = torch.cat([mask, torch.ones_like(batch[:, mask.shape[1] :, 0])], 1).bool()
            near(batch[real], turns(model, ids, mask, more)[real], what="eager")
            tokens = rows[0][None]
            whole = turns(model, tokens, torch.ones_like(tokens), [])[0]
            near(chunked, whole, what="chunks")
        assert model.config._attn_implementation == "eager"
    except AssertionError as error:
        raise AssertionError(f"{says}: {error}") from error
    return says


TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 0.25}
"""Logits are of magnitude 1, weights large enough that a wrong mask moves them by tenths."""


def assert_near(got: Tensor, want: Tensor, what: str, tolerance: float, share: float) -> None:
    """A `share` of the rows `[rows, vocabulary]` differs by no more than the tolerance."""
    difference = (got - want).abs().amax(-1).double().flatten().quantile(share)
    assert bool(difference <= tolerance), f"{what} differ by {float(difference):.3g}"


def draw_more(draw: Draw, rows: int) -> list[Tensor]:
    """What follows on the first forward: single tokens, and further turns."""
    lengths = [draw.one_of(1, 1, draw.integer(1, 40)) for _ in range(draw.one_of(0, 2, 5))]
    return [torch.randint(6, 128, (rows, n), generator=draw.tensors) for n in lengths]


@torch.no_grad()
def turns(model: Any, ids: Tensor, mask: Tensor, more: list[Tensor]) -> Tensor:
    """`[batch, seq, vocabulary]`: logits of a forward and of those that go on from its cache."""
    cache, parts = DynamicCache(config=model.config), []
    for part in (ids, *more):
        if part is not ids:
            mask = torch.cat([mask, torch.ones_like(part)], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -part.shape[1] :]
        inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        parts.append(model(part, **inputs).logits)
    return torch.cat(parts, 1)


@torch.no_grad()
def in_one_row(model: Any, rows: list[Tensor]) -> tuple[Tensor, ...]:
    """`[seq, vocabulary]` of each of several sequences that are packed into a row."""
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    logits = model(torch.cat(rows)[None], position_ids=positions).logits[0]
    parts: tuple[Tensor, ...] = logits.split([len(row) for row in rows])
    return parts


@torch.no_grad()
def in_chunks(draw: Draw, model: Any, ids: Tensor) -> Tensor:
    """`[seq, vocabulary]`: logits of one row, prefilled in pieces of any length."""
    cache = DynamicCache(config=model.config)
    parts, done = [], 0
    while done < ids.shape[1]:
        end = done + draw.one_of(1, 16, 50, ids.shape[1])
        parts.append(model(ids[:, done:end], past_key_values=cache).logits[0])
        done = end
    return torch.cat(parts)


def padded(draw: Draw, rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Token rows as one batch, ids and mask `[rows, longest + some]`."""
    length = max(len(row) for row in rows) + draw.one_of(0, 0, draw.integer(0, 30))
    ids, mask = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(2))
    for row, tokens in enumerate(rows):
        n = len(tokens)
        places = {
            "left": torch.arange(length - n, length),
            "right": torch.arange(n),
            "inner": draw.permutation(length)[:n].sort().values,
        }[side]
        ids[row, places], mask[row, places] = tokens, 1
    return ids, mask


CHECKS: tuple[Callable[[int], str], ...] = (
    check_op,
    check_method,
    check_op,
    check_method,
    check_model,
)
"""Case n is of kind n modulo their number. A model takes longest."""
