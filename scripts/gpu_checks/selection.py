"""What does choosing cost? Every estimator and every method's plan, beside dense attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

from sparse_patch_eval.base.rows import Row
from sparse_patch_kernels import dispatch

import sparse_patch
from gpu_checks.estimators import as_methods_call, without_kernels
from gpu_checks.op_speed import dense, tensors
from gpu_checks.stage import Stage, Work
from gpu_checks.timing import interleaved

# Seconds that the rounds of all estimators, and those of each method, may take.
_SECONDS = 1.5


def items(stage: Stage) -> list[tuple[str, Work]]:
    """Every length; plain functions at the target length come last."""
    listed = [(f"{n:,} tokens", partial(_measure, stage, n)) for n in stage.scale.lengths]
    return [*listed, ("plain functions", partial(_plain, stage))]


def _measure(stage: Stage, n: int) -> Iterable[Row]:
    """A row per estimator and per method."""
    scale, device = stage.scale, stage.device
    q, k, v = tensors(stage, n)
    flash = dense(device, "flash", q, k, v)
    known = as_methods_call(stage, q, k)
    estimators = {
        name: partial(function, *known[name][0], **known[name][1])
        for name, (_, function) in dispatch.KERNELS.items()
    }
    times = interleaved(device, {"flash": flash, **estimators}, most=scale.rounds, seconds=_SECONDS)
    dense_ms = times.pop("flash").ms
    for name, timing in times.items():
        yield _row("estimator_time", n, name, asdict(timing), dense_ms)
    for name, options in scale.methods.items():
        stage.need(2 * _SECONDS)
        method = sparse_patch.get_method(name, **options)

        plans: list[Any] = []

        def plan(method: Any = method, plans: list[Any] = plans) -> None:
            plans[:] = [method.plan(q, k, scale=scale.dim**-0.5, q_offset=0)]

        timing = interleaved(device, {name: plan}, most=scale.rounds, seconds=_SECONDS)[name]
        row = _row("plan_time", n, name, asdict(timing), dense_ms)
        yield {**row, "density": None if plans[0] is None else plans[0].density}


def _row(kind: str, n: int, what: str, times: dict[str, Any], dense_ms: float) -> Row:
    share = times["ms"] / dense_ms
    return {"kind": kind, "tokens": n, "what": what, **times, "of_dense": share}


def _plain(stage: Stage) -> Iterable[Row]:
    """The estimators' plain functions at the target length, once each, the longest last."""
    n = stage.scale.target
    q, k, v = tensors(stage, n)
    dense_ms = interleaved(
        stage.device, {"flash": dense(stage.device, "flash", q, k, v)}, most=3, seconds=1
    )["flash"].ms
    known = as_methods_call(stage, q, k)
    for name in sorted(dispatch.KERNELS, key=lambda name: (name == "search_leaves", name)):
        stage.need(10)
        function = dispatch.KERNELS[name][1].plain  # type: ignore[attr-defined]
        call = partial(function, *known[name][0], **known[name][1])
        with without_kernels():
            timing = interleaved(stage.device, {name: call}, most=1, seconds=1)[name]
        yield _row("plain_time", n, name, asdict(timing), dense_ms)
