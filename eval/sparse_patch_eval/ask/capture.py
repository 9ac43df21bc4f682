"""q, k and v of a model's attention layers, from one dense prefill.

q and k come from a method that makes no plan, so that exact attention runs; v comes from the KV
cache. Both are public interfaces; the model's code is not touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

import sparse_patch
from sparse_patch import Method

__all__ = ["Attention", "capture"]


@dataclass(frozen=True, eq=False)
class Attention:
    """Inputs of one attention layer: one sequence, after RoPE.

    Attributes:
        q: `[heads, length, dim]`.
        k: `[kv_heads, length, dim]`.
        v: `[kv_heads, length, v_dim]`.
        scale: factor on the logits.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Capture:
    """A dense prefill with the inputs of some layers.

    Attributes:
        layers: by index.
        logits: float32 `[kept, vocab]`.
        cache: ready to continue from.
    """

    layers: dict[int, Attention]
    logits: Tensor
    cache: Cache


@dataclass(frozen=True)
class _Recorder(Method):
    """Records q, k and scale of every layer, and leaves attention exact."""

    layer: int = -1
    seen: dict[int, tuple[Tensor, Tensor, float]] = field(default_factory=dict, repr=False)

    def for_layer(self, layer: int) -> _Recorder:
        return dataclasses.replace(self, layer=layer)

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> None:
        self.seen[self.layer] = (q, k, scale)


@torch.inference_mode()
def capture(
    model: PreTrainedModel,
    input_ids: Tensor,
    layers: Iterable[int] | None = None,
    *,
    logits_to_keep: int | Tensor = 1,
) -> Capture:
    """Prefill `input_ids [1, length]` densely and keep the inputs of the layers.

    Args:
        layers: indices, negative from the end; default: all attention layers.
        logits_to_keep: number of last positions whose logits to keep, or their indices.

    Raises:
        ValueError: a layer does not exist, or does not run plain causal attention (the message says
            why).
    """
    recorder = _Recorder()
    with sparse_patch.patch(model, recorder, layers=layers, min_length=0, min_queries=0) as handle:
        out = model(input_ids, use_cache=True, logits_to_keep=logits_to_keep)
    for layer in handle.report().layers:
        if layer.layer not in recorder.seen:
            raise ValueError(f"layer {layer.layer} cannot be captured, it ran exact: {layer.exact}")
    cache = out.past_key_values
    layer_inputs = {}
    for index, (q, k, scale) in sorted(recorder.seen.items()):
        v = cache.layers[index].values[0]
        if v.shape[:2] != k.shape[:2]:
            raise ValueError(
                f"layer {index} cannot be captured: its cache holds values {tuple(v.shape)} for "
                f"keys {tuple(k.shape)}"
            )
        layer_inputs[index] = Attention(q, k, v, scale)
    return Capture(layer_inputs, out.logits[0].float(), cache)
