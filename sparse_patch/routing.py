"""Decides whether a call runs sparse, or why it runs exact. Runs and records nothing."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from sparse_patch_kernels import BackendUnavailable
from torch import Tensor

from .break_even import LENGTHS, Kind, keys_to_pay
from .budget import Bill, Budget
from .call import Call
from .registry import Method

REASONS: dict[str, str | None] = {
    "decode": None,
    "layer kept dense": None,
    "short": None,
    "few queries": None,
    "method": None,
    "costs more": None,
    "keeps too much": None,
    "did not pay before": None,
    "sliding window": None,
    "all padding": None,
    "empty batch": None,
    "training": "the model is in training mode; call model.eval() to run sparse",
    "gradients": "gradients are being recorded; use torch.no_grad() or model.generate",
    "mask": (
        "an attention mask other than causal plus padding arrived (image tokens that see one "
        "another, a static cache, a 4-D mask of your own, or torch.compile with use_cache=False)"
    ),
    "position bias": "this model adds a bias to its logits, which the sparse op does not support",
    "sinks by query": "this model has attention sinks that depend on the query",
    "not causal": "this layer attends to the future",
    "dropout": "attention dropout is on",
    "cache": (
        "an engine's cache holds keys in a form that is not read back (quantized, or an unknown "
        "packing), which a later chunk, or a prompt whose beginning is cached, would need"
    ),
    "non-finite": "q or k holds NaN or infinity; the model or its input is broken",
    "no backend": (
        "no sparse backend runs on this device; a GPU on Linux needs sparse-patch[triton] installed"
    ),
}
"""Why a call runs exact, as reports count it, and what a user should know of it.

A text is shown once per patch; a reason with None is routine and only counted.
"""


class SparsePatchWarning(UserWarning):
    """A patched model ran exact attention where a user may expect sparse attention."""


@dataclass
class Options:
    """Settings that the layers of one patch share.

    Attributes:
        budget: with `min_length="auto"`; it decides on CPU tensors, `least_keys` on others.
        asked_by: what counts calls, for warnings.
        measured: for each kind of call, the number of keys from which sparse attention pays.
        without_backend: devices on which no sparse backend was found.
    """

    min_length: int
    min_queries: int
    backend: str
    measure_recall: bool | int
    budget: Budget | None = None
    asked_by: str = "sparse_patch.report(model)"
    measured: dict[Kind, int] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)
    without_backend: set[torch.device] = field(default_factory=set)

    def bill(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Bill | None:
        """The bill of a sequence, where costs decide (`min_length="auto"`)."""
        budget = self.budget_on(q.device)
        plain = call.softcap is None and call.sinks is None
        return None if budget is None else budget.bill(layer, q, k, v, plain=plain)

    def budget_on(self, device: torch.device) -> Budget | None:
        """The budget, if it decides on this device: its costs are those of the CPU backend."""
        on_cpu = device.type == "cpu" and self.backend in ("auto", "cpu")
        return self.budget if on_cpu else None

    def least_keys(self, method: Method | None, q: Tensor, k: Tensor, v: Tensor) -> int:
        """How many keys a sequence must have to run sparse, where no budget decides.

        With `min_length="auto"` on a GPU it is measured at the first long call of its kind; inside
        a graph that is being captured nothing can be timed, and `min_length` holds.
        """
        long = k.shape[-2] >= LENGTHS[0]
        if self.budget is None or method is None or q.device.type != "cuda" or not long:
            return self.min_length
        kind = Kind.of(q, k, v)
        if kind not in self.measured:
            if torch.cuda.is_current_stream_capturing():
                return self.min_length
            self.measured[kind] = self._measure(method, kind)
        return self.measured[kind]

    def _measure(self, method: Method, kind: Kind) -> int:
        try:
            return keys_to_pay(method, kind, self.backend)
        except (BackendUnavailable, torch.OutOfMemoryError):
            return self.min_length  # it cannot run here, or there is no room for a trial

    def warn_once(self, reason: str) -> None:
        text = REASONS[reason]
        if text is not None:
            self.say_once(
                reason,
                f"running exact attention ({reason}): {text}. {self.asked_by} counts such calls.",
            )

    def say_once(self, key: str, text: str) -> None:
        """Warn, unless there was a warning for this key already."""
        if key not in self.warned:
            self.warned.add(key)
            warnings.warn(f"sparse_patch: {text}", SparsePatchWarning, stacklevel=2)


def why_exact(
    options: Options,
    method: Method | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    call: Call,
) -> str | None:
    """The reason why no sequence of a call can be sparse, judged without reading values.

    "few queries" catches speculative decoding: a handful of queries against a long cache.

    Args:
        method: None keeps the layer dense.
        q: `[batch, heads, q_len, dim]`; k, v: `[batch, kv_heads, kv_len, ...]`.

    Returns:
        A key of REASONS, or None.
    """
    needs_grad = any(x.requires_grad for x in (q, k, v)) and torch.is_grad_enabled()
    budget = options.budget_on(q.device)
    checks = {
        "empty batch": q.shape[0] == 0,
        "decode": q.shape[2] == 1 and not (decodes_sparsely(method) and budget is None),
        "layer kept dense": method is None,
        "training": call.training,
        "gradients": needs_grad,
        "not causal": not call.causal,
        "mask": mask is not None and mask.ndim != 2,
        "position bias": call.bias is not None,
        "sinks by query": call.sinks is not None and call.sinks.ndim > 1,
        "dropout": call.dropout > 0,
        "short": budget is None and k.shape[2] < options.least_keys(method, q, k, v),
        "few queries": 1 < q.shape[2] < min(options.min_queries, k.shape[2]),
    }
    return next((reason for reason, holds in checks.items() if holds), None)


def why_sequence_exact(
    options: Options, q: Tensor, k: Tensor, new: Tensor, bill: Bill | None, least: int
) -> str | None:
    """The reason why one sequence cannot be sparse, or should not.

    Where q or k holds NaN or infinity, a choice by logits means nothing. On the CPU such a call
    runs exact. Elsewhere, checking would stop the device in every layer (see `layer.run_sparse`).

    Args:
        q: `[heads, q_len, dim]`; k: `[kv_heads, kv_len, dim]`.
        new: the keys of k that no earlier step has checked.
        bill: decides in place of `least`.
        least: number of keys from which a sequence runs sparse.
    """
    if bill is not None:
        if reason := bill.why_exact():
            return reason
    elif k.shape[1] < least:  # counted without padding
        return "short"
    if q.device in options.without_backend:
        return "no backend"
    if not waits(q) and not bool(torch.isfinite(checksum(q, new))):
        return "non-finite"
    return None


def decodes_sparsely(method: Method | None) -> bool:
    """Does the method choose keys for single new rows?"""
    return getattr(method, "sparse_decode", False)


def waits(x: Tensor) -> bool:
    """Would reading a value of this tensor wait for its device?"""
    return x.device.type != "cpu"


def checksum(q: Tensor, k: Tensor) -> Tensor:
    """A scalar that is finite if q and k are."""
    return q.sum(dtype=torch.float32) + k.sum(dtype=torch.float32)
