"""Hooks around a patched decoder's forward and its attention modules.

Before a forward, unsupported requests are refused, and packed sequences are found for the mask.
After it, a warning tells which patched layers were not called. Around an attention module, the
cache of a decode step is noted.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import PreTrainedModel

from .attention import STATE, refuse_tracing
from .book import Book, book_of, is_ours
from .layer import LayerState
from .masks import PACKING, starts_of
from .paged import is_paged
from .sequences import CausalMask


@dataclass
class _Forward:
    """A running forward of `decoder`.

    Attributes:
        asked: its layers, and how often each had been called before.
        outer: the earlier state of `PACKING`.
    """

    decoder: PreTrainedModel
    asked: list[tuple[LayerState, int]]
    outer: tuple[Tensor | None, bool, bool]


class _Running(threading.local):
    """The forwards of this thread, innermost last."""

    def __init__(self) -> None:
        self.forwards: list[_Forward] = []


_running = _Running()


def hook_decoder(decoder: PreTrainedModel) -> list[Any]:
    """Hooks of a decoder that has a book."""
    return [
        decoder.register_forward_pre_hook(_before, with_kwargs=True),
        decoder.register_forward_hook(_after, always_call=True),
    ]


def hook_steps(module: nn.Module) -> list[Any]:
    """Hooks of an attention module whose method keeps memories between decode steps."""
    return [
        module.register_forward_pre_hook(_step_begins, with_kwargs=True),
        module.register_forward_hook(_step_ends, with_kwargs=True, always_call=True),
    ]


def _before(decoder: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
    refuse_tracing()
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: a patched model has no attention weights to return (sparse "
            "attention never computes them all). Call sparse_patch.unpatch(model) and use "
            'attn_implementation="eager".'
        )
    book = book_of(decoder)
    if torch.compiler.is_compiling() or book is None:
        return
    asked = [(state, state.asked) for state in book.states()]
    outer = PACKING.starts, PACKING.heard, PACKING.paged
    _running.forwards.append(_Forward(decoder, asked, outer))
    PACKING.starts, PACKING.heard, PACKING.paged = None, False, is_paged(kwargs)
    if not PACKING.paged:
        cls: Any = type(decoder)
        by_name = dict(zip(_parameters(cls), args, strict=False))
        PACKING.starts = _packed_starts(by_name | kwargs)


def _after(decoder: PreTrainedModel, args: Any, output: Any) -> None:
    forwards = _running.forwards
    if torch.compiler.is_compiling() or not forwards or forwards[-1].decoder is not decoder:
        return
    forward, unheard = forwards.pop(), PACKING.starts is not None and not PACKING.heard
    PACKING.starts, PACKING.heard, PACKING.paged = forward.outer
    if output is None:  # an error is on its way
        return
    if unheard:
        raise RuntimeError(
            "sparse_patch: packed sequences were given (cu_seq_lens_q, seq_idx, or position_ids "
            "that start anew), but this model makes its masks without our mask function, so the "
            "sequences have seen one another. Give it one sequence at a time."
        )
    book = book_of(decoder)
    silent = [state for state, asked in forward.asked if state.asked == asked]
    if book is not None and silent:
        _warn_not_asked(book, silent)


@functools.cache
def _parameters(cls: Any) -> tuple[str, ...]:
    """Names of the positional arguments of a decoder's forward."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def _warn_not_asked(book: Book, silent: list[LayerState]) -> None:
    names = {
        config._attn_implementation
        for patch in book.patches
        for config, _ in patch._names
        if not is_ours(config)
    }
    why = (
        f"the model's config was changed to attn_implementation={min(map(str, names))!r}. Patch "
        "the model again to run it sparse."
        if names
        else "unless they were skipped on purpose, another library replaced their forward, and "
        "answers to padded prompts or with a cache may be wrong. Unpatch the model."
    )
    layers = sorted({state.layer for state in silent})
    silent[0].options.say_once(
        "not asked", f"layers {layers} did not call our attention in this forward: {why}"
    )


def _packed_starts(arguments: dict[str, Any]) -> Tensor | None:
    """int64 `[batch, q_len]`, on the CPU: where the sequence of each token begins; None: one
    sequence per row.

    Raises:
        ValueError: packed sequences continue a cache, or their arguments contradict one another.
    """
    begins = _begins(arguments)
    if begins is None:
        return None
    cache = _cache_in(arguments.values())
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            "sparse_patch: packed sequences (cu_seq_lens_q, seq_idx, or position_ids that start "
            f"anew) cannot continue a cache, which holds {cache.get_seq_length()} tokens of other "
            "sequences; give them without past_key_values, or one sequence at a time"
        )
    return starts_of(begins)


def _begins(arguments: dict[str, Any]) -> Tensor | None:
    """bool `[batch, q_len]`, on the CPU: where packed sequences after the first begin."""
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    mask, ends = arguments.get("attention_mask"), arguments.get("cu_seq_lens_q")
    if not isinstance(tokens, Tensor) or not (mask is None or _is_padding(mask)):
        return None  # a finished mask already says it
    batch, length = tokens.shape[:2]
    if ends is not None and len(ends) > 2:
        keys = arguments.get("cu_seq_lens_k")
        if batch != 1 or not (keys is None or torch.equal(keys, ends)) or int(ends[-1]) > length:
            raise ValueError(
                f"sparse_patch: cu_seq_lens_q={ends.tolist()} must be of one row of {length} "
                f"tokens and the same as cu_seq_lens_k; the batch has {batch} rows"
            )
        begins = torch.zeros(1, length + 1, dtype=torch.bool)
        begins[0, ends.long().cpu()] = True
        return begins[:, :length]
    index, positions = arguments.get("seq_idx"), arguments.get("position_ids")
    if isinstance(index, Tensor) and index.shape[1:] == (length,):
        begins = index.diff(prepend=index[:, :1]) != 0
    elif isinstance(positions, Tensor) and positions.shape[1:] == (length,):
        begins = positions.eq(0)
        begins[:, 0] = False
        if mask is not None and bool(begins.any()):
            # Padding has any position, and the first token of a padded row is at 0.
            real = mask.ne(0).to(begins.device)
            later = real & (real.cumsum(1) > 1)
            begins = begins & later[:, -length:] if later.shape[1] >= length else begins
    else:
        return None
    return begins.cpu() if bool(begins.any()) else None


def _is_padding(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2 and not isinstance(mask, CausalMask)


def _step_begins(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    state: LayerState | None = getattr(module, STATE, None)
    if not torch.compiler.is_compiling() and state is not None:
        state.memories.begin(_cached_keys(module, args, kwargs))


def _step_ends(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    state: LayerState | None = getattr(module, STATE, None)
    if not torch.compiler.is_compiling() and state is not None:
        state.memories.end(_cached_keys(module, args, kwargs))


def _cached_keys(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The keys that this call's cache holds for this layer, if it is a cache that only appends."""
    cache = _cache_in((*args, *kwargs.values()))
    layer = getattr(module, "layer_idx", None)
    if cache is None or type(layer) is not int or not 0 <= layer < len(cache.layers):
        return None
    cached = cache.layers[layer]
    keys = cached.keys if type(cached) is DynamicLayer else None
    return keys if isinstance(keys, Tensor) else None


def _cache_in(arguments: Iterable[Any]) -> Cache | None:
    """The cache, found by type: the argument is `past_key_values`, from Transformers 5.24 on
    `cache`."""
    return next((value for value in arguments if isinstance(value, Cache)), None)
