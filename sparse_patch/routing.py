"""When a call runs sparse, when exact, and why: decided per call, counted by reason."""

from __future__ import annotations

import dataclasses
import secrets
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from sparse_patch_kernels import (
    BackendUnavailable,
    BlockPlan,
    block_sparse_attention,
    choose_backend,
)
from torch import Tensor, nn

from .budget import Bill, Budget
from .decoding import Memories
from .diagnostics import recall
from .registry import Method
from .sequences import CausalMask, Span

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
    """

    min_length: int
    min_queries: int
    backend: str
    measure_recall: bool | int
    budget: Budget | None = None
    warned: set[str] = field(default_factory=set)

    def budget_on(self, device: torch.device) -> Budget | None:
        """The budget, where it decides: costs are those of the CPU backend."""
        on_cpu = device.type == "cpu" and self.backend in ("auto", "cpu")
        return self.budget if on_cpu else None

    def warn_once(self, reason: str) -> None:
        text = REASONS[reason]
        if text is not None:
            self.say_once(
                reason,
                f"running exact attention ({reason}): {text}. "
                "sparse_patch.report(model) counts such calls.",
            )

    def say_once(self, about: str, text: str) -> None:
        """Warn, the first time that it is about this."""
        if about not in self.warned:
            self.warned.add(about)
            warnings.warn(f"sparse_patch: {text}", SparsePatchWarning, stacklevel=2)


@dataclass
class LayerStats:
    """Counts of one layer; a call is one sequence in one forward. `sparse` is prefill only.

    Sums of densities stay on the device that they are counted on: to read them would wait for it.
    """

    sparse: int = 0
    density: float | Tensor = 0.0
    decode: int = 0
    decode_density: float | Tensor = 0.0
    recall: float = 0.0
    measured: int = 0
    exact: Counter[str] = field(default_factory=Counter)


# Names this process's layers in graphs, so that one that was saved elsewhere is told from ours.
_HANDLE_BITS = 62

# Gets the layer and the arguments of `LayerState.attend`, and returns what that does.
Watch = Callable[["LayerState", Tensor, Tensor, Tensor, "Call"], Tensor | str]

_by_handle: weakref.WeakValueDictionary[int, LayerState] = weakref.WeakValueDictionary()


@dataclass
class LayerState:
    """What a patched attention module carries; method None keeps the layer dense.

    `asked` counts the calls that reached this layer's attention. `number` names this object in
    recorded graphs, which hold tensors and numbers only; in compiled ones as the tensor `handle`,
    since a number would be a constant, and every layer a graph of its own. A copy gets another.
    `watch` takes the place of `attend`.
    """

    layer: int
    method: Method | None
    options: Options
    stats: LayerStats = field(default_factory=LayerStats)
    memories: Memories = field(default_factory=Memories, repr=False, compare=False)
    asked: int = field(default=0, compare=False)
    watch: Watch | None = field(default=None, repr=False, compare=False)
    number: int = field(init=False, repr=False, compare=False)
    handle: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.number = secrets.randbits(_HANDLE_BITS)
        self.handle = torch.tensor(self.number, device="cpu")
        _by_handle[self.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @staticmethod
    def of_handle(handle: int) -> LayerState:
        """The object of that handle.

        Raises:
            RuntimeError: it is gone: a graph outlived the patch it was compiled with.
        """
        state = _by_handle.get(handle)
        if state is None:
            raise RuntimeError(
                "sparse_patch: this compiled graph belongs to a patch that is no more; compile the "
                "model again, after patching"
            )
        return state

    @property
    def sparse_decode(self) -> bool:
        return getattr(self.method, "sparse_decode", False)

    def count_exact(self, reason: str, calls: int = 1) -> None:
        self.stats.exact[reason] += calls
        self.options.warn_once(reason)

    def why_exact(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call
    ) -> str | None:
        """The reason why this call cannot be sparse, judged without looking at values.

        "few queries" catches speculative decoding: a handful of queries against a long cache.
        """
        needs_grad = any(x.requires_grad for x in (q, k, v)) and torch.is_grad_enabled()
        budget = self.options.budget_on(q.device)
        checks = {
            "empty batch": q.shape[0] == 0,
            "decode": q.shape[2] == 1 and not (self.sparse_decode and budget is None),
            "layer kept dense": self.method is None,
            "training": call.training,
            "gradients": needs_grad,
            "not causal": not call.causal,
            "mask": mask is not None and mask.ndim != 2,
            "position bias": call.bias is not None,
            "sinks by query": call.sinks is not None and call.sinks.ndim > 1,
            "dropout": call.dropout > 0,
            "short": budget is None and k.shape[2] < self.options.min_length,
            "few queries": 1 < q.shape[2] < min(self.options.min_queries, k.shape[2]),
        }
        return next((reason for reason, holds in checks.items() if holds), None)

    def bill(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Bill | None:
        """What one unpadded sequence costs, where that decides (`min_length="auto"`)."""
        budget = self.options.budget_on(q.device)
        plain = call.softcap is None and call.sinks is None
        return None if budget is None else budget.bill(self.layer, q, k, v, plain=plain)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, row: int = 0, bill: Bill | None = None
    ) -> Tensor | str:
        """One unpadded causal sequence: the sparse output, or the reason to run exact.

        Methods choose by the plain logits: a soft cap keeps their order, and sinks take the same
        from every key of a row.

        Where q or k holds NaN or infinity, a choice by logits means nothing. On the CPU such a call
        is exact. Elsewhere to look would stop the device in every layer: there all of the output
        becomes NaN, so that nothing hides what is broken.

        Args:
            q: `[heads, q_len, dim]`; k, v: `[kv_heads, kv_len, dim]`.
            row: the sequence's place in the batch.
            bill: decides in place of the patch's `min_length`.

        Returns:
            `[heads, q_len, v_dim]`, or a key of REASONS.
        """
        if self.watch is not None:
            return self.watch(self, q, k, v, call)
        options = self.options
        if bill is not None:
            if reason := bill.why_exact():
                return reason
        elif k.shape[1] < options.min_length:  # without its padding, that is
            return "short"
        decodes = q.shape[1] == 1 and self.sparse_decode
        step = self.memories.step
        memory = step.memory(row, k.shape[1]) if decodes else None
        new = k if memory is None else k[:, -1:]  # earlier steps have looked at the earlier keys
        total = q.sum(dtype=torch.float32) + new.sum(dtype=torch.float32)
        if not _waits(q) and not bool(torch.isfinite(total)):
            return "non-finite"
        try:
            backend = choose_backend(options.backend, q.device)
        except BackendUnavailable:
            if options.backend != "auto":
                raise
            return "no backend"
        assert self.method is not None
        if bill is not None:
            bill.start()
        if decodes:
            plan, memory = self.method.decode(q, k, scale=call.scale, memory=memory)
            step.after[row] = k.shape[1], memory
        else:
            plan = self.method.plan(q, k, scale=call.scale, q_offset=k.shape[1] - q.shape[1])
        if bill is not None and (reason := bill.judge(plan)):
            return reason
        if plan is None:
            return "method"
        out = block_sparse_attention(
            q,
            k,
            v,
            plan,
            scale=call.scale,
            backend=backend,
            softcap=call.softcap,
            sinks=call.sinks,
        )
        if _waits(q):
            out += (total - total).to(out.dtype)  # 0, or NaN if anything was not finite
        if bill is not None:
            bill.finish(plan)
        density = plan.head_density().mean() if bill is None else bill.density
        if decodes:
            self.stats.decode += 1
            self.stats.decode_density = self.stats.decode_density + density
        else:
            self.stats.sparse += 1
            self.stats.density = self.stats.density + density
            self._measure_recall(q, k, plan, call)
        return out

    def _measure_recall(self, q: Tensor, k: Tensor, plan: BlockPlan, call: Call) -> None:
        measure = self.options.measure_recall
        if measure:
            rows = None if measure is True else int(measure)
            kept = recall(q, k, plan, scale=call.scale, rows=rows, softcap=call.softcap)
            self.stats.recall += float(kept.mean())
            self.stats.measured += 1


def _waits(x: Tensor) -> bool:
    """Would reading a value of this tensor wait for a device that is behind?"""
    return x.device.type != "cpu"


# What a model may pass to attention beside the tensors. Handled by `Call`:
_HANDLED = {"is_causal", "softcap", "s_aux", "sinks", "position_bias"}
# Handled before attention: the mask says what these hide (see `masks`).
_IN_THE_MASK = {"sliding_window", "max_length_q", "max_length_k", "cu_seq_lens_q", "cu_seq_lens_k"}
_IN_THE_MASK |= {"seq_idx"}
# Not about which keys are seen or what they weigh: how a kernel works, positions that rotary
# embeddings have used, what else the model is to return, what its other parts take.
_ELSEWHERE = {
    "cache_position", "deterministic", "labels", "logits_to_keep", "mm_token_type_ids",
    "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits",
    "past_key_values", "position_embeddings", "position_ids", "return_dict", "token_type_ids",
    "use_cache",
}  # fmt: skip
_SELECTS_KEYS = {"indices", "block_indices"}


@dataclass(frozen=True)
class Call:
    """What a model says about one attention call, beside its tensors.

    Attributes:
        sinks: `[heads]`, or `[batch, heads, q_len]` where they depend on the query.
        bias: `[batch or 1, heads or 1, q_len or 1, kv_len or more]`.
    """

    scale: float
    causal: bool
    training: bool
    softcap: float | None
    sinks: Tensor | None
    bias: Tensor | None
    dropout: float

    @classmethod
    def read(
        cls,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        dropout: float,
        kw: Mapping[str, Any],
    ) -> Call:
        """Understand every keyword that a model passes.

        Raises:
            RuntimeError: one that is not known, or that says something we cannot do.
        """
        _refuse_keywords(kw, mask)
        causal = True if isinstance(mask, CausalMask) else kw.get("is_causal")  # a mask has it
        sinks = kw.get("s_aux")
        sinks = kw.get("sinks") if sinks is None else sinks
        return cls(
            scale=q.shape[3] ** -0.5 if scaling is None else float(scaling),
            causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
            training=module.training,
            softcap=kw.get("softcap"),
            sinks=None if sinks is None else _sinks(sinks, q),
            bias=_bias(kw.get("position_bias"), q, k),
            dropout=float(dropout),
        )

    def of(self, row: int, span: Span, q_len: int) -> Call:
        """The call of some queries of a row with some of its keys: what is by row, query and key
        is cut as they are."""
        bias, sinks = self.bias, self.sinks
        if bias is not None:
            row_bias = bias[row if bias.shape[0] > 1 else 0][None].expand(-1, -1, q_len, -1)
            bias = row_bias[:, :, span.queries][..., span.keys]
        if sinks is not None and sinks.ndim > 1:
            sinks = sinks[row][None][..., span.queries]
        return dataclasses.replace(self, bias=bias, sinks=sinks)

    def as_arguments(self) -> dict[str, Any]:
        """The fields by name, as they are: `dataclasses.asdict` would copy the tensors."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _refuse_keywords(kw: Mapping[str, Any], mask: Tensor | None) -> None:
    """Raise a RuntimeError for what would change the answer if it were left out."""
    for name, value in kw.items():
        if value is None or name in _HANDLED or name in _ELSEWHERE:
            continue
        if name in _SELECTS_KEYS:
            raise RuntimeError(
                f"sparse_patch: this model selects keys itself ({name} was passed to "
                "attention); patching would undo that. Call sparse_patch.unpatch(model)."
            )
        if name == "cache":
            raise RuntimeError(
                "sparse_patch: continuous batching (paged caches) is not supported. Call "
                "sparse_patch.unpatch(model), or use model.generate."
            )
        if name not in _IN_THE_MASK and value is not False:
            raise RuntimeError(
                f"sparse_patch: {name}= reached attention, and what it asks for is not known here: "
                "left out, it could change the answer. If it is yours, leave it out of the call; "
                "if it is the model's, call sparse_patch.unpatch(model)."
            )
        packed = name == "cu_seq_lens_q" and len(value) > 2
        if packed and (mask is None or (mask.ndim == 2 and mask.dtype == torch.bool)):
            raise RuntimeError(
                "sparse_patch: cu_seq_lens_q= reached attention without the model's mask having "
                "heard of it (a compiled graph, or a decoder that was not called as a module), so "
                "packed sequences would see one another. Call the model uncompiled, or one "
                "sequence at a time."
            )


def _sinks(sinks: Tensor, q: Tensor) -> Tensor:
    """`[heads]`, or `[batch, heads, q_len]`, from any shape that broadcasts to q's first axes."""
    batch, heads, q_len, _ = q.shape
    if sinks.numel() == heads:
        return sinks.reshape(heads)
    if sinks.ndim == 4 and sinks.shape[3] == 1:
        return sinks[..., 0].expand(batch, heads, q_len)
    raise RuntimeError(
        f"sparse_patch: attention sinks of shape {tuple(sinks.shape)} for {heads} heads and "
        f"{q_len} queries are not known here. Call sparse_patch.unpatch(model)."
    )


def _bias(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A position bias that broadcasts to the logits.

    Raises:
        RuntimeError: it does not.
    """
    if bias is None:
        return None
    fits = bias.ndim == 4 and all(bias.shape[i] in (1, q.shape[i]) for i in range(3))
    if not fits or bias.shape[3] < k.shape[2]:
        raise RuntimeError(
            f"sparse_patch: a position bias of shape {tuple(bias.shape)} does not fit queries "
            f"{tuple(q.shape)} and keys {tuple(k.shape)}. Call sparse_patch.unpatch(model)."
        )
    return bias[..., : k.shape[2]]
