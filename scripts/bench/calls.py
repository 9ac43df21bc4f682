"""Calls on one layer's q, k and v, made up or a model's, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from gpu_checks.device import Device
from gpu_checks.inputs import keys, queries
from sparse_patch_eval.ask.capture import Attention, capture
from sparse_patch_eval.base.options import choose_layers, parse_layers
from sparse_patch_eval.inputs.models import load
from sparse_patch_eval.inputs.text import long_text, passkey_prompt
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.grid import turns

CPU = Device(on_gpu=False)
SDPA = "SDPA"
# A timing is the mean of so many calls that it takes this long.
LEAST_SECONDS = 0.2

Call = Callable[[], Any]


def split(text: str, known: Iterable[str] | None = None) -> list[str]:
    """The parts of a list with commas.

    Raises:
        ValueError: a part is none of `known`.
    """
    parts = [part.strip() for part in text.split(",")]
    if known is not None and (unknown := sorted(set(parts) - set(known))):
        raise ValueError(f"{', '.join(unknown)}: choose of {', '.join(known)}")
    return parts


def made(heads: int, kv_heads: int, tokens: int, dim: int) -> Attention:
    """Queries and keys like a model's, and random values: float32."""
    return Attention(
        queries(CPU, heads, tokens, dim, end=tokens, seed=0),
        keys(CPU, kv_heads, tokens, dim, seed=1),
        CPU.randn(kv_heads, tokens, dim, seed=2),
        dim**-0.5,
    )


def of_model(model: str, tokens: int, layers: str) -> dict[int, Attention]:
    """Layers of a model in float32, by index, from one dense prefill of a prompt."""
    chosen = parse_layers(layers)
    lm, tokenizer = load(model, dtype="float32", device="cpu", max_length=tokens)
    prompt = passkey_prompt(tokenizer, tokens, text=long_text("kjv"), seed=0).input_ids
    return capture(lm, prompt, choose_layers(lm, chosen)).layers


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
    """A call of causal SDPA."""
    inputs = (q[None], k[None], v[None])
    return partial(
        scaled_dot_product_attention, *inputs, is_causal=True, scale=scale, enable_gqa=True
    )


def in_turns(calls: Mapping[str, Call], number: int) -> dict[str, float]:
    """Seconds of each call, in the order of round `number`."""
    return {name: seconds_of(calls[name]) for name in turns(list(calls), number)}


def seconds_of(call: Call) -> float:
    """Of one call, the mean over as many as take LEAST_SECONDS."""
    start, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - start < LEAST_SECONDS:
        call()
        done += 1
    return (time.perf_counter() - start) / done
