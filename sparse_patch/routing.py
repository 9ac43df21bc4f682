"""Decides: does a call run sparse, or exact and why? Nothing is run here, and nothing recorded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .budget import Bill, Budget
from .call import Call
from .registry import Method

# Reasons for an exact call -> what a user should know, where it is not simply as it should be.
# The texts are shown once per patch; a reason without one is routine and only counted.
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
    "position bias": "this model adds a bias to its logits, which the sparse op does not do",
    "sinks by query": "this model has attention sinks that depend on the query",
    "not causal": "this layer attends to the future",
    "dropout": "attention dropout is on",
    "cache": (
        "an engine's cache holds keys in a form that is not read back (quantized, or an unknown "
        "packing), which a later chunk, or a prompt whose beginning is cached, would need"
    ),
    "non-finite": "q or k holds NaN or infinity; the model or its input is broken",
    "no backend": (
        "no sparse backend runs on this device; on a GPU, Linux, pip install 'sparse-patch[triton]'"
    ),
}


class SparsePatchWarning(UserWarning):
    """A patched model ran exact attention where one may have expected sparse."""


@dataclass
class Options:
    """What the layers of one patch share.

    Attributes:
        budget: of `min_length="auto"`, which then decides on CPU tensors; `min_length` on others.
        asked_by: what counts calls, for warnings.
        without_backend: devices on which no sparse backend was found.
    """

    min_length: int
    min_queries: int
    backend: str
    measure_recall: bool | int
    budget: Budget | None = None
    asked_by: str = "sparse_patch.report(model)"
    warned: set[str] = field(default_factory=set)
    without_backend: set[torch.device] = field(default_factory=set)

    def bill(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Bill | None:
        """What a sequence costs, where that decides (`min_length="auto"`)."""
        budget = self.budget_on(q.device)
        plain = call.softcap is None and call.sinks is None
        return None if budget is None else budget.bill(layer, q, k, v, plain=plain)

    def budget_on(self, device: torch.device) -> Budget | None:
        """The budget, where it decides: costs are those of the CPU backend."""
        on_cpu = device.type == "cpu" and self.backend in ("auto", "cpu")
        return self.budget if on_cpu else None

    def warn_once(self, reason: str) -> None:
        text = REASONS[reason]
        if text is not None:
            self.say_once(
                reason,
                f"running exact attention ({reason}): {text}. {self.asked_by} counts such calls.",
            )

    def say_once(self, about: str, text: str) -> None:
        """Warn, the first time that it is about this."""
        if about not in self.warned:
            self.warned.add(about)
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
    """The reason why no sequence of a call can be sparse, judged without looking at values.

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
        "short": budget is None and k.shape[2] < options.min_length,
        "few queries": 1 < q.shape[2] < min(options.min_queries, k.shape[2]),
    }
    return next((reason for reason, holds in checks.items() if holds), None)


def why_sequence_exact(
    options: Options, q: Tensor, k: Tensor, new: Tensor, bill: Bill | None
) -> str | None:
    """The reason why one sequence cannot be sparse, or should not.

    Where q or k holds NaN or infinity, a choice by logits means nothing. On the CPU such a call is
    exact. Elsewhere to look would stop the device in every layer (see `layer.run_sparse`).

    Args:
        q: `[heads, q_len, dim]`; k: `[kv_heads, kv_len, dim]`.
        new: those of k that no earlier step has looked at.
        bill: decides in place of the patch's `min_length`.
    """
    if bill is not None:
        if reason := bill.why_exact():
            return reason
    elif k.shape[1] < options.min_length:  # without its padding, that is
        return "short"
    if q.device in options.without_backend:
        return "no backend"
    if not waits(q) and not bool(torch.isfinite(checksum(q, new))):
        return "non-finite"
    return None


def decodes_sparsely(method: Method | None) -> bool:
    """Does it choose keys for single new rows?"""
    return getattr(method, "sparse_decode", False)


def waits(x: Tensor) -> bool:
    """Would reading a value of this tensor wait for a device that is behind?"""
    return x.device.type != "cpu"


def checksum(q: Tensor, k: Tensor) -> Tensor:
    """A scalar that is finite if all of q and k is."""
    return q.sum(dtype=torch.float32) + k.sum(dtype=torch.float32)
