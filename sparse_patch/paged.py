"""Attention in Transformers' continuous batching: many requests in one row, keys in a paged cache.

What is new of each request lies side by side in the row; the cache adds the keys before. Every
request is a sequence of its own: it is decided on, run and counted as it would be alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .call import Call, as_sdpa_gets_them
from .layer import LayerState, Run, attend_batch
from .sequences import requests_of, window_of

# How a batch of requests is laid out; all else that a model says goes to `Call`. It is causal, by
# this layout: `is_causal` says whether a mask does it.
_LAYOUT = {
    "cache", "read_index", "write_index", "block_table", "cu_seq_lens_q", "cu_seq_lens_k",
    "max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k", "logits_indices",
    "logits_processor_args", "is_causal",
}  # fmt: skip
_READ = "_sparse_patch_read"


def is_paged(given: Mapping[str, Any]) -> bool:
    """Do the keywords of a forward, or of an attention call, say that it is a batch of requests?"""
    return given.get("read_index") is not None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # sizes differ from step to step
def attend_requests(
    state: LayerState | None,
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    dropout: float,
    given: Mapping[str, Any],
) -> Tensor:
    """A batch of requests; see `attention.attention_function`.

    Args:
        q: `[1, heads, tokens, dim]`, of all requests.
        k, v: `[1, kv_heads, tokens, ...]`; from Transformers 5.24 on, `[1, kv_heads, keys, ...]`.
        given: keywords of the call.

    Returns:
        `[1, tokens, heads, v_dim]`; tokens of no request, which pad a batch, get 0.

    Raises:
        RuntimeError: the batch is laid out for another attention, or a CUDA graph is recorded.
    """
    _refuse_layout(q, given)
    layout = {name: value for name, value in given.items() if name in _LAYOUT}
    sliding = _slides(module)
    k, v = _with_cached(module, k, v, layout)
    key_ends = layout["cu_seq_lens_k"]
    if isinstance(key_ends, Mapping):
        key_ends = key_ends["sliding_attention" if sliding else "full_attention"]
    q, k, v = as_sdpa_gets_them(q, k, v)
    said = {name: value for name, value in given.items() if name not in _LAYOUT}
    call = Call.read(module, q, k, None, scaling, dropout, said | {"is_causal": True})
    window = said.get("sliding_window") or (module.config.sliding_window if sliding else None)
    out = q.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])
    for request in requests_of(_read(layout["cu_seq_lens_q"]), _read(key_ends)):
        rows, keys, values = q[:, :, request.queries], k[:, :, request.keys], v[:, :, request.keys]
        mask = window_of(keys.shape[2], window)
        own = call.of(0, request, q.shape[2])
        asked = _unless_it_remembers(state, rows)
        out[:, request.queries] = attend_batch(asked, rows, keys, values, mask, own)
    return out


def _unless_it_remembers(state: LayerState | None, q: Tensor) -> LayerState | None:
    """Nobody, if this is a decode step of a method that remembers the one before: memories belong
    to the cache of one sequence (see `decoding`), and here requests come and go. It runs exact."""
    if state is None or q.shape[2] > 1 or not state.sparse_decode:
        return state
    state.asked += 1
    state.record(Run("decode"))
    return None


def _refuse_layout(q: Tensor, given: Mapping[str, Any]) -> None:
    if given.get("block_table") is not None:
        raise RuntimeError(
            "sparse_patch: this continuous batching was begun for FlashAttention, before the model "
            "was patched. Stop it, and begin anew on the patched model."
        )
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "sparse_patch: a CUDA graph cannot hold which keys are chosen. Leave use_cuda_graph "
            "and the padding intervals of ContinuousBatchingConfig at their defaults."
        )


def _with_cached(
    module: Any, k: Tensor, v: Tensor, layout: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Store the new keys and values; those of all requests, `[1, kv_heads, keys, ...]`.

    `layout["cu_seq_lens_k"]` may become that of this layer.
    """
    cache = layout.pop("cache", None)
    if cache is None:  # from Transformers 5.24 on, the model has done it
        return k, v
    if "kwargs" in inspect.signature(cache.update).parameters:
        k, v = cache.update(k, v, module.layer_idx, kwargs=layout)
        return k, v
    index = {name: layout[name] for name in ("read_index", "write_index")}
    k, v = cache.update(k, v, module.layer_idx, **index)  # [keys, kv_heads, ...]
    return k.transpose(0, 1)[None], v.transpose(0, 1)[None]


def _slides(module: Any) -> bool:
    """Is this a layer of which the cache keeps a window only? By the rule of the cache."""
    kinds = getattr(module.config, "layer_types", None)
    if kinds is None:
        return getattr(module.config, "sliding_window", None) is not None
    return bool(kinds[module.layer_idx] == "sliding_attention")


def _read(ends: Tensor) -> list[int]:
    """The values of a tensor that all layers of a forward share, read once: reading waits."""
    if ends.is_inference():  # has no version
        return [int(end) for end in ends]
    known: tuple[int, list[int]] | None = getattr(ends, _READ, None)
    if known is None or known[0] != ends._version:
        known = ends._version, ends.tolist()
        setattr(ends, _READ, known)
    return known[1]
