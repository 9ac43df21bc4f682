"""How fast is the op? Against FlashAttention times density, and FlexAttention on the same mask."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from sparse_patch_eval.base.rows import Row
from sparse_patch_kernels import BlockPlan, block_sparse_attention
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gpu_checks import inputs
from gpu_checks.device import Device
from gpu_checks.parity import name_of
from gpu_checks.stage import Stage, Work
from gpu_checks.timing import Timing, interleaved

# Seconds that the rounds of one density may take together.
_SECONDS = 1.2


def items(stage: Stage) -> list[tuple[str, Work]]:
    """The op at every length; its configurations at the first length come second."""
    first, *others = ((f"{n:,} tokens", partial(_measure, stage, n)) for n in stage.scale.lengths)
    return [first, ("configurations", partial(_configurations, stage)), *others]


def tensors(stage: Stage, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of the timed shape."""
    scale, device = stage.scale, stage.device
    q = inputs.queries(device, scale.heads, n, scale.dim, end=n, seed=0).to(scale.dtype)
    k = inputs.keys(device, scale.kv_heads, n, scale.dim, seed=1).to(scale.dtype)
    return q, k, device.randn(scale.kv_heads, n, scale.dim, seed=2).to(scale.dtype)


def dense(device: Device, name: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Causal SDPA by one implementation, see `Device.sdpa`."""

    def call() -> Tensor:
        with device.sdpa(name):
            out = F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, enable_gqa=True
            )
        return out[0]

    return call


def _measure(stage: Stage, n: int) -> Iterable[Row]:
    """A row per density."""
    scale, device = stage.scale, stage.device
    q, k, v = tensors(stage, n)
    flash = dense(device, "flash", q, k, v)
    calls: dict[str, Callable[[], Tensor]] = {"flash": flash}
    calls |= optional(stage, "cudnn", dense(device, "cudnn", q, k, v))
    compiled = device.compiled(flex_attention)
    for density in scale.densities:
        stage.need(2 * _SECONDS)
        plan = inputs.plan_of_density(device, scale.heads, n, scale.block, density)
        op = partial(block_sparse_attention, q, k, v, plan, backend="triton")
        flex = optional(stage, "flex", _flex(device, compiled, q, k, v, plan))
        out = op()
        error, of_allowed = inputs.sampled_error(q, k, v, plan, out)
        flex_apart = [float((out - call()).abs().max()) for call in flex.values()]
        times = interleaved(
            device, {"op": op, **calls, **flex}, most=scale.rounds, seconds=_SECONDS
        )
        kept = plan.density
        yield {
            "kind": "op",
            "tokens": n,
            "dtype": name_of(scale.dtype),
            "density": kept,
            "wanted_density": density,
            **{name: asdict(timing) for name, timing in times.items()},
            "of_ideal": times["op"].ms / (kept * times["flash"].ms),
            "of_ideal_fastest_dense": times["op"].ms / (kept * _fastest(times)),
            "speed_up": times["flash"].ms / times["op"].ms,
            "speed_up_over_flex": times["flex"].ms / times["op"].ms if flex else None,
            "max_error": error,
            "of_allowed": of_allowed,
            "apart_from_flex": flex_apart[0] if flex_apart else None,
            "ok": of_allowed <= 1,
        }


def _fastest(times: dict[str, Timing]) -> float:
    return min(timing.ms for name, timing in times.items() if name in ("flash", "cudnn"))


def optional(
    stage: Stage, name: str, call: Callable[[], Tensor]
) -> dict[str, Callable[[], Tensor]]:
    """The call by its name if it runs here; if not, a row says why, and nothing fails for it."""
    try:
        call()
        stage.device.synchronize()
    except Exception as error:
        stage.add("peer_missing", peer=name, reason=f"{type(error).__name__}: {error}"[:500])
        return {}
    return {name: call}


def _causal(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def _flex(
    device: Device, compiled: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan
) -> Callable[[], Tensor]:
    """FlexAttention, with the blocks of `plan_of_density` as its own lists."""
    (run,) = plan.runs
    blocks, row = plan.n_q_blocks, torch.arange(plan.n_q_blocks, device=device.torch)
    index = (run.start // run.width)[None]
    kept = torch.zeros(len(run.count), blocks, blocks, dtype=torch.bool, device=device.torch)
    kept.scatter_(2, index[0].long(), run.valid(run.heads))

    def listed(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & kept[head, i // run.width, j // run.width]

    # The last block of a row is its diagonal, the only one that a mask runs on.
    diagonal = row.int()[None, None, :, None].expand(1, len(run.count), -1, blocks).contiguous()
    mask = BlockMask.from_kv_blocks(
        torch.ones_like(run.count)[None],
        diagonal,
        (run.count - 1)[None],
        index,
        BLOCK_SIZE=run.width,
        # Compiled, it walks the lists. As it is, it asks the function alone.
        mask_mod=_causal if device.on_gpu else listed,
    )

    def call() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not compiled, on the CPU
            out: Tensor = compiled(q[None], k[None], v[None], block_mask=mask, enable_gqa=True)
        return out[0]

    return call


def _configurations(stage: Stage) -> Iterable[Row]:
    """Each configuration by itself, at the length where one is chosen."""
    launch = importlib.import_module("sparse_patch_kernels.triton.launch")
    scale, device = stage.scale, stage.device
    n = scale.lengths[0]
    q, k, v = tensors(stage, n)
    plan = inputs.plan_of_density(device, scale.heads, n, scale.block, scale.densities[-1])
    op = partial(block_sparse_attention, q, k, v, plan, backend="triton")
    with launch.recording(launch.chip_of(q)) as launches:
        op()
    configs = launches[-1].configs if scale.on_gpu else launches[-1].configs[:1]

    def forced(index: int) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with launch.forcing(index):
                return op()

        return call

    calls = {str(config): forced(index) for index, config in enumerate(configs)}
    times = interleaved(device, calls, most=scale.rounds, seconds=_SECONDS)
    for name, timing in times.items():
        yield {
            "kind": "configuration",
            "kernel": launches[-1].kernel.fn.__name__,
            "tokens": n,
            "density": plan.density,
            "config": name,
            **asdict(timing),
        }
