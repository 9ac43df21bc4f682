"""One block-sparse attention op with several backends; a `BlockPlan` says which keys to attend.

Besides the names here, what these modules list in `__all__` is public, and no more:

    estimators           how large what they make at a time may be
    estimators.*         estimates of the worth of keys, for methods
    estimators.*.kernel  the same in Triton, for those who check kernels
    dispatch             what runs as a kernel, and where
    reference            the definition of the op
    triton.forward       the op in Triton
    triton.launch        launches every kernel: with what, and with which configuration
    cpu.native           the op in C++
    cpu.building         building a C++ library, and whose files may be loaded
"""

from __future__ import annotations

import math
import os
from typing import Literal, overload

import torch
from torch import Tensor

from .cpu import building
from .dispatch import GPUS, has_kernel, triton_installed
from .ops import attention_op, run
from .plan import BlockPlan
from .runs import RunList

__all__ = [
    "BACKENDS",
    "BackendUnavailable",
    "BlockPlan",
    "RunList",
    "block_sparse_attention",
    "choose_backend",
    "has_kernel",
    "prepare",
]

BACKENDS = ("auto", "triton", "cpu", "reference")


class BackendUnavailable(RuntimeError):
    """A backend cannot run here; the message says what it needs."""


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
        missing = _what_triton_lacks(device)
        if missing:
            raise BackendUnavailable(
                f"backend='triton' needs {' and '.join(missing)}. Use backend='auto', 'cpu' or "
                "'reference'."
            )
    if backend == "auto":
        if device.type == "cpu":
            return "cpu"
        missing = _what_triton_lacks(device)
        if missing:
            raise BackendUnavailable(
                f"backend='auto' found no block-sparse kernel for {device.type!r} tensors: the "
                f"Triton kernels need {' and '.join(missing)}. Or move the model to the CPU, or "
                "name backend='reference' (correct on any device, slow)."
            )
        return "triton"
    if backend == "cpu" and device.type != "cpu":
        raise BackendUnavailable(
            f"backend='cpu' runs on CPU tensors and got {device.type!r}: move them with .cpu(), "
            "or name backend='reference'."
        )
    return backend


def prepare(device: torch.device, backend: str = "auto") -> None:
    """Compile what calls on `device` will need and this machine has not kept: some seconds, once.

    Without it the first call does. Triton kernels depend on what they are called with: none is
    compiled here.
    """
    if device.type == "cpu" and backend in ("auto", "cpu"):
        building.prepare()


def _what_triton_lacks(device: torch.device) -> list[str]:
    missing = []
    if not triton_installed():
        missing.append("the triton package (pip install 'sparse-patch[triton]', Linux)")
    # Triton's interpreter takes tensors on the CPU: slow, for tests.
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type not in GPUS and not interpreted:
        missing.append(f"tensors on a GPU (these are on {device.type!r})")
    return missing


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
    softcap: float | None = None,
    sinks: Tensor | None = None,
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention over the keys that `plan` keeps; other keys have no weight.

    Args:
        q: `[heads, q_len, dim]`, fp32, bf16 or fp16 (fp64 works too). Row r is position
            `kv_len - q_len + r`.
        k: `[kv_heads, kv_len, dim]`; query head h reads KV head `h // (heads // kv_heads)`.
        v: `[kv_heads, kv_len, v_dim]`.
        plan: the keys to keep.
        scale: factor on the logits; default `1 / sqrt(dim)`.
        backend: one of `BACKENDS`; default "auto".
        return_lse: also return the log-sum-exp of the kept logits, sinks included.
        softcap: logits become `softcap * tanh(scale * q . k / softcap)`; above 0.
        sinks: `[heads]`, one extra logit per head that takes part in the softmax and has no value.

    Returns:
        `[heads, q_len, v_dim]` in q's dtype; with `return_lse` also `[heads, q_len]`, float32.
        A row that sees no key gives 0 and -inf.

    Raises:
        ValueError: shapes, dtypes or devices do not match one another or the plan.
        BackendUnavailable: see `choose_backend`.
    """
    _check_inputs(q, k, v, plan, softcap, sinks)
    backend = choose_backend(backend, q.device)
    plan = plan.fit(q.shape[1], k.shape[1])
    scale = 1.0 / math.sqrt(q.shape[2]) if scale is None else scale
    if torch.compiler.is_compiling():
        out, lse = attention_op(q, k, v, plan, scale, backend, softcap, sinks)
    else:
        with torch.no_grad():
            out, lse = run(backend, q, k, v, plan, scale, softcap, sinks)
    return (out, lse) if return_lse else out


def _check_inputs(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softcap: float | None, sinks: Tensor | None
) -> None:
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
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be above 0, or None for no cap")
    if sinks is not None and (sinks.shape != q.shape[:1] or sinks.device != q.device):
        raise ValueError(
            f"sinks must hold one logit per query head, [{q.shape[0]}] on {q.device}; got "
            f"{tuple(sinks.shape)} on {sinks.device}"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(
            "block_sparse_attention has no backward pass: call it under torch.no_grad(), or use "
            "exact attention where gradients are needed"
        )
