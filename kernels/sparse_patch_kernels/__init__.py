"""One block-sparse attention op, several backends: what to attend comes in as a `BlockPlan`."""

from __future__ import annotations

import importlib.util
import math
from typing import Literal, overload

import torch
from torch import Tensor

from . import cpu, reference
from .plan import BlockPlan
from .runs import RunList

__all__ = [
    "BACKENDS",
    "BackendUnavailable",
    "BlockPlan",
    "RunList",
    "block_sparse_attention",
    "choose_backend",
]

BACKENDS = ("auto", "triton", "cpu", "reference")


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says what it needs."""


def choose_backend(backend: str | None, device: torch.device) -> str:
    """The backend that will run on `device`.

    A named backend is never replaced by another: it works or it raises.

    Raises:
        ValueError: no backend has that name.
        BackendUnavailable: the named backend cannot run on this device, or "auto" found none.
    """
    backend = backend or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "triton":
        raise BackendUnavailable(_what_triton_needs(device))
    if backend == "auto":
        if device.type != "cpu":
            raise BackendUnavailable(
                f"backend='auto' has no fast block-sparse kernel for {device.type!r} tensors yet: "
                "the Triton kernels are not part of this release. Move the model to the CPU, or "
                "name backend='reference' (correct on any device, slow)."
            )
        return "cpu"
    if backend == "cpu" and device.type != "cpu":
        raise BackendUnavailable(
            f"backend='cpu' runs on CPU tensors and got {device.type!r}: move them with .cpu(), "
            "or name backend='reference'."
        )
    return backend


def _what_triton_needs(device: torch.device) -> str:
    missing = ["the Triton kernels, which this release of sparse-patch does not ship yet"]
    if importlib.util.find_spec("triton") is None:
        missing.append("the triton package (pip install 'sparse-patch[triton]', Linux)")
    if device.type not in ("cuda", "xpu"):
        missing.append(f"tensors on a GPU (these are on {device.type!r})")
    return f"backend='triton' needs {'; '.join(missing)}. Use backend='auto', 'cpu' or 'reference'."


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention over the keys that `plan` keeps; the others weigh nothing.

    Args:
        q: `[heads, q_len, dim]`, fp32, bf16 or fp16 (fp64 works too). Row r is position
            `kv_len - q_len + r`.
        k: `[kv_heads, kv_len, dim]`; query head h reads KV head `h // (heads // kv_heads)`.
        v: `[kv_heads, kv_len, v_dim]`.
        plan: what to keep.
        scale: factor on the logits; default `1 / sqrt(dim)`.
        backend: one of `BACKENDS`; default "auto".
        return_lse: also return the log-sum-exp of the scaled logits.

    Returns:
        `[heads, q_len, v_dim]` in q's dtype; with `return_lse` also `[heads, q_len]`, float32.
        A row that sees no key gives 0 and -inf.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or do not fit the plan.
        BackendUnavailable: see `choose_backend`.
    """
    _check_inputs(q, k, v, plan)
    plan = plan.fit(q.shape[1], k.shape[1])
    scale = 1.0 / math.sqrt(q.shape[2]) if scale is None else scale
    name = choose_backend(backend, q.device)
    run = {"cpu": cpu, "reference": reference}[name].block_sparse_attention
    with torch.no_grad():
        out, lse = run(q, k, v, plan, scale)
    return (out, lse) if return_lse else out


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 3:
        raise ValueError(
            f"q, k, v must be [heads, seq, head_dim], one sequence without batch axis; got {shapes}"
        )
    if min(*q.shape, *k.shape, *v.shape) == 0:
        raise ValueError(f"q, k and v must not be empty; got {shapes}")
    if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"k and v must agree in heads and length, q and k in head_dim; got {shapes}"
        )
    if q.shape[0] % k.shape[0]:
        raise ValueError(f"query heads must be a multiple of KV heads; got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(
            f"q, k and v must share one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}"
        )
    if q.shape[0] % plan.heads:
        raise ValueError(
            f"the plan lists {plan.heads} heads, which do not divide the {q.shape[0]} heads of q"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(
            "block_sparse_attention has no backward pass: call it under torch.no_grad(), or use "
            "exact attention where gradients are needed"
        )
