"""Are the estimators right? Every kernel against its plain function, and the plans they lead to."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sparse_patch_eval.base.rows import Row
from sparse_patch_kernels import BlockPlan, block_sparse_attention, dispatch
from torch import Tensor

import sparse_patch
from gpu_checks import inputs
from gpu_checks.device import Device
from gpu_checks.parity import name_of
from gpu_checks.scale import Scale
from gpu_checks.stage import Stage, Work
from sparse_patch.methods.hip import Hip

# Kernel and plain function multiply the same numbers and add in float32, in another order; so
# logits of up to 64 differ by a few 2^-18, and probabilities by as much of themselves. Mass below
# e^-60 is nothing, and float32 does not hold what is below e^-87.
_LOGS, _LEAST_LOG = 5e-4, -60.0
_PROBABILITIES, _LEAST_PROBABILITY = 5e-4, 1e-7
_MEANS = 1e-5
# Scores that differ by rounding may rank otherwise, and then what is searched below them differs.
_LISTS = 0.02

Call = tuple[tuple[Any, ...], dict[str, Any]]
# How far two results are apart, as a share of what is allowed.
Distance = Callable[[Any, Any], float]


def items(stage: Stage) -> list[tuple[str, Work]]:
    """Every estimator in every dtype, then every method's plan."""
    names = sorted(dispatch.KERNELS)
    return [
        *(
            (f"{name}, {name_of(dtype)}", partial(_compare, stage, name, dtype))
            for dtype in stage.scale.dtypes
            for name in names
        ),
        *(
            (f"plan of {method}", partial(_compare_plans, stage, method))
            for method in stage.scale.methods
        ),
    ]


def _compare(stage: Stage, name: str, dtype: torch.dtype) -> Iterable[Row]:
    """A row per call of `calls`, over all configurations of the kernel."""
    launch = importlib.import_module("sparse_patch_kernels.triton.launch")
    module, function = dispatch.KERNELS[name]
    kernel = getattr(importlib.import_module(module), name)
    spec = SPECS[name]
    make = Maker(stage.device, stage.scale, dtype)
    first = ("as methods call it", as_methods_call(stage, *make.whole())[name])
    step = 1 if dtype == stage.scale.dtypes[0] else stage.scale.thinned
    for what, (arguments, options) in [first, *spec.calls(make)][::step]:
        with without_kernels():  # some plain functions call others
            want = function.plain(*arguments, **options)  # type: ignore[attr-defined]
        with launch.recording(launch.chip_of(arguments[0])) as launches:
            kernel(*arguments, **options)
        apart = []
        configs = max((len(one.configs) for one in launches), default=0)
        for index in range(configs if stage.scale.on_gpu else min(1, configs)):
            with launch.forcing(index):
                apart.append(spec.distance(kernel(*arguments, **options), want))
        yield {
            "kind": "estimator",
            "what": name,
            "call": what,
            "dtype": name_of(dtype),
            "configs": len(apart),
            "of_allowed": max(apart, default=math.nan),
            "ok": bool(apart) and all(x <= 1 for x in apart),
        }


@dataclass(frozen=True)
class Maker:
    """Tensors for calls, of the lengths that are compared."""

    device: Device
    scale: Scale
    dtype: torch.dtype

    def whole(self, blocks: int = 16) -> tuple[Tensor, Tensor]:
        """q and k of the timed shape, so many blocks of them."""
        scale = self.scale
        n = scale.block * (blocks if scale.on_gpu else 3)
        q = inputs.queries(self.device, scale.heads, n, scale.dim, end=n, seed=n)
        k = inputs.keys(self.device, scale.kv_heads, n, scale.dim, seed=n + 1)
        return q.to(self.dtype), k.to(self.dtype)

    def pair(self, q_len: int, kv_len: int, dim: int, heads: int = 4) -> tuple[Tensor, Tensor]:
        """q `[heads, q_len, dim]` and k `[heads // 2, kv_len, dim]`."""
        q = inputs.queries(self.device, heads, q_len, dim, end=kv_len, seed=q_len)
        k = inputs.keys(self.device, heads // 2, kv_len, dim, seed=kv_len)
        return q.to(self.dtype), k.to(self.dtype)


def as_methods_call(stage: Stage, q: Tensor, k: Tensor) -> dict[str, Call]:
    """Arguments and options of each estimator, as methods call it at the stage's parameters."""
    scale, block, methods = q.shape[2] ** -0.5, stage.scale.block, stage.scale.methods
    # `proxyattn` scores the mean head of each KV group.
    probe, proxies = q[:, -block:], (q.reshape(len(k), -1, *q.shape[1:]).mean(1), k)
    runs = inputs.plan_of_density(stage.device, len(q), q.shape[1], block, 0.25).runs[0]
    tree = Hip(**methods["hip"]).tree
    return {
        "pool_mean": ((k, block), {}),
        "probe_lines": ((probe, k, scale), {}),
        "key_scores": ((probe, k, scale), {}),
        "token_scores": (
            (*proxies, scale),
            {"block": block, "stride_q": methods["proxyattn"].get("stride_q", 16), "reduce": "max"},
        ),
        "antidiagonal_scores": (
            (q, k, scale),
            {"block": block, "stride": methods["xattention"].get("stride", 8)},
        ),
        "pooled_rows": ((q, k, scale, *_listed(q, k, 16)), {"width": block}),
        "largest_within": ((_masses(stage.device, len(q), q.shape[1]), 0.9), {}),
        "compact": ((runs.valid(len(q)),), {}),
        "search_leaves": ((q, k, scale, tree), {}),
    }


def _pool_mean(make: Maker) -> Iterator[tuple[str, Call]]:
    n, block = make.scale.tokens, make.scale.block
    q, k = make.pair(n - n // 8 - 3, n - 5, make.scale.dim)
    yield "keys", ((k, block), {})
    yield "queries after an offset", ((q, block, 22), {})
    yield "short blocks, another dim", ((make.pair(n, n, 80)[0], 8), {})


def _probes(make: Maker) -> Iterator[tuple[str, Call]]:
    n, block = make.scale.tokens, make.scale.block
    for what, rows, kv_len, dim in (
        ("a block", block, n, make.scale.dim),
        ("a few rows, ragged", 5, n - n // 8 - 3, make.scale.dim),
        ("another dim", block, n - n // 8 - 3, 80),
    ):
        yield what, ((*make.pair(rows, kv_len, dim), dim**-0.5), {})


def _token_scores(make: Maker) -> Iterator[tuple[str, Call]]:
    n, block, dim = make.scale.tokens, make.scale.block, make.scale.dim
    common: dict[str, Any] = {"block": block, "stride_q": 4}
    half = {"block": block, "block_k": block // 2, "stride_q": 8, "stride_k": 2}
    whole, ragged = make.pair(n, n, dim), make.pair(n // 2 + 5, n - n // 8 - 3, dim)
    yield "sum", ((*whole, dim**-0.5), {**common, "stride_k": 4})
    yield "max, ragged", ((*ragged, dim**-0.5), {**common, "reduce": "max"})
    yield "rms, other key blocks", ((*ragged, dim**-0.5), {**half, "reduce": "rms"})


def _antidiagonals(make: Maker) -> Iterator[tuple[str, Call]]:
    n, block, dim = make.scale.tokens, make.scale.block, make.scale.dim
    for stride in (4, 8):
        options = {"block": block, "stride": stride}
        yield f"stride {stride}", ((*make.pair(n, n, dim), dim**-0.5), options)
        ragged = make.pair(n // 2 + 5, n - n // 8 - 3, dim)
        yield f"stride {stride}, ragged", ((*ragged, dim**-0.5), options)


def _listed(q: Tensor, k: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Every so many rows of q, and the keys that each sees."""
    rows = torch.arange(stride // 2, q.shape[1], stride, device=q.device)
    return rows, rows + k.shape[1] - q.shape[1] + 1


def _listed_rows(make: Maker) -> Iterator[tuple[str, Call]]:
    n, block, dim = make.scale.tokens, make.scale.block, make.scale.dim
    ragged = make.pair(n // 2 + 5, n - n // 8 - 3, dim)
    yield "ragged", ((*ragged, dim**-0.5, *_listed(*ragged, 4)), {"width": block})
    other = make.pair(n, n, 80)
    yield "another dim", ((*other, 80**-0.5, *_listed(*other, 16)), {"width": block // 2})


def _masses(device: Device, rows: int, n: int) -> Tensor:
    return device.randn(rows, n, seed=n).float().mul(3).softmax(-1)


def _shares(make: Maker) -> Iterator[tuple[str, Call]]:
    n = make.scale.tokens
    for limit in (0.0, 0.5, 2.0):
        yield f"up to {limit}", ((_masses(make.device, 3, n + 3), limit), {})


def _masks(make: Maker) -> Iterator[tuple[str, Call]]:
    for share in (0.0, 0.3, 1.0):
        mask = make.device.randn(3, 7, make.scale.tokens + 3, seed=1) < 5 * (2 * share - 1)
        yield f"{share:.0%} marked", ((mask,), {})


def _searches(make: Maker) -> Iterator[tuple[str, Call]]:
    n, dim = make.scale.tokens, make.scale.dim
    own = make.scale.methods["hip"]
    if make.scale.on_gpu:
        own = {**own, "mask_k": 128, "window": 64}  # a search of several rounds at this length
    for what, more in (
        ("centre", {}),
        ("first leaf", {"rep": "first"}),
        ("aligned", {"init": "aligned"}),
    ):
        tree = Hip(**{**own, **more}).tree
        yield what, ((*make.pair(n - 5, n, dim, 2), dim**-0.5, tree), {})


def _logs(got: Tensor, want: Tensor) -> float:
    return _share((got.clamp(min=_LEAST_LOG) - want.clamp(min=_LEAST_LOG)).abs(), _LOGS)


def _probabilities(got: Any, want: Any) -> float:
    if isinstance(want, Tensor):
        got, want = (got,), (want,)
    return max(
        _share((a - b).abs(), _LEAST_PROBABILITY + _PROBABILITIES * b.abs())
        for a, b in zip(got, want, strict=True)
    )


def _padded_probabilities(got: Tensor, want: Tensor) -> float:
    """As `_probabilities`; blocks past the last that some row sees may be left out."""
    return _probabilities(torch.nn.functional.pad(got, (0, want.shape[2] - got.shape[2])), want)


def _nearly_same_marks(got: Tensor, want: Tensor) -> float:
    """Sums are rounded in another order: an entry or two about the limit may differ."""
    return float((got != want).sum(-1).max()) / 2


def _means(got: Tensor, want: Tensor) -> float:
    return _share((got - want).abs(), _MEANS * want.abs().max())


def _share(error: Tensor, limit: Tensor | float) -> float:
    share = error / limit
    return float(share.max()) if bool(torch.isfinite(share).all()) else math.inf


def _same_entries(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> float:
    return 0.0 if _lists_that_differ(got, want) == 0 else math.inf


def _nearly_same_lists(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> float:
    return _lists_that_differ(got, want) / _LISTS


def _lists_that_differ(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> float:
    """Share of lists, `[lists, rows, n]` with counts `[lists, rows]`, that are not the same."""
    same = got[1] == want[1]
    width = min(got[0].shape[2], want[0].shape[2])
    valid = torch.arange(width, device=same.device) < want[1][..., None]
    same &= ((got[0][..., :width] == want[0][..., :width]) | ~valid).all(-1)
    return 1 - float(same.double().mean())


@dataclass(frozen=True)
class Spec:
    """How to call an estimator, and how to compare what it gives."""

    calls: Callable[[Maker], Iterator[tuple[str, Call]]]
    distance: Distance


# Each of `dispatch.KERNELS` must be here: one that is not fails.
SPECS = {
    "pool_mean": Spec(_pool_mean, _means),
    "probe_lines": Spec(_probes, _probabilities),
    "key_scores": Spec(_probes, _probabilities),
    "token_scores": Spec(_token_scores, _logs),
    "antidiagonal_scores": Spec(_antidiagonals, _logs),
    "pooled_rows": Spec(_listed_rows, _padded_probabilities),
    "largest_within": Spec(_shares, _nearly_same_marks),
    "compact": Spec(_masks, _same_entries),
    "search_leaves": Spec(_searches, _nearly_same_lists),
}


def _compare_plans(stage: Stage, name: str) -> Iterable[Row]:
    """Does the method choose the same with kernels as without, and is the op right on its plan?"""
    launch = importlib.import_module("sparse_patch_kernels.triton.launch")
    scale, device = stage.scale, stage.device
    q, k = Maker(device, scale, scale.dtype).whole(32)  # longer than any method's budget
    v = device.randn(*k.shape, seed=3).to(scale.dtype)
    method = sparse_patch.get_method(name, **scale.methods[name])
    with launch.forcing(0):
        plan = method.plan(q, k, scale=scale.dim**-0.5, q_offset=0)
    with without_kernels():
        plain = method.plan(q, k, scale=scale.dim**-0.5, q_offset=0)
    if plan is None or plain is None:
        raise ValueError(f"{name} wants exact attention at {q.shape[1]} tokens")
    agree, density, plain_density = _agreement(plan, plain), plan.density, plain.density
    for index in range(5 if scale.on_gpu else 1):
        with launch.forcing(index):
            out = block_sparse_attention(q, k, v, plan, backend="triton")
        error, of_allowed = inputs.sampled_error(q, k, v, plan, out)
        yield {
            "kind": "plan",
            "what": name,
            "config": index,
            "density": density,
            "plain_density": plain_density,
            "agreement": agree,
            "max_error": error,
            "of_allowed": of_allowed,
            "ok": agree >= 1 - _LISTS and of_allowed <= 1,
        }


def _agreement(one: BlockPlan, other: BlockPlan) -> float:
    """Share of (row, key) pairs that both keep or both drop, in a few query blocks and heads."""
    same = []
    for head in sorted({0, one.heads // 2, one.heads - 1}):
        for block in sorted({0, one.n_q_blocks // 2, one.n_q_blocks - 1}):
            _, end = one.row_range(block)
            masks = [
                plan.block_mask(head * plan.heads // one.heads, block)[:, :end]
                for plan in (one, other)
            ]
            same.append(float((masks[0] == masks[1]).double().mean()))
    return min(same)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Plain functions only, meanwhile."""
    uses = dispatch.uses_triton
    dispatch.uses_triton = lambda x: False
    try:
        yield
    finally:
        dispatch.uses_triton = uses
