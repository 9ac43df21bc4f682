"""The mask function that Transformers calls, once per forward and kind of layer.

It returns the smallest form of the mask (see `sequences`); only what does not fit there becomes a
mask of length x length.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .attention import is_recorded, refuse_tracing
from .book import warn_unless_held
from .sequences import CausalMask, padding_of


class Packing(threading.local):
    """Packed sequences of the forward that runs in this thread.

    Attributes:
        starts: int64 `[batch, q_len]`, on the CPU: where the sequence of each query begins; None:
            no packed sequences are known.
        heard: has a mask been made from `starts`?
        paged: are its sequences requests of continuous batching? Those need no mask (see `paged`).
    """

    starts: Tensor | None = None
    heard: bool = False
    paged: bool = False


PACKING = Packing()


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one forward, in its smallest form.

    Returns:
        None: causal, the queries being the last rows.
        `[batch, kv_len]`: a CausalMask (in a recorded graph, a plain tensor of bool): the same plus
            padding, windows, chunks and packed sequences.
        bool `[batch, 1, q_len, kv_len]`: anything else.

    Raises:
        ValueError: packed sequences in a mask that is anything else.
        RuntimeError: see `attention.refuse_tracing`.
    """
    refuse_tracing()
    config = kwargs.get("config")
    if config is not None and not torch.compiler.is_compiling():
        warn_unless_held(config)
    if PACKING.paged:
        return None
    ends_with_the_queries = (
        not isinstance(q_offset, Tensor) and kv_offset + kv_length == q_offset + q_length
    )
    padding, known = None, ends_with_the_queries and not use_vmap
    if attention_mask is not None:
        attention_mask = padding_of(attention_mask)
        padding = attention_mask[:, kv_offset : kv_offset + kv_length]
        known = known and padding.shape == (batch_size, kv_length)
    if is_recorded(padding):
        # Where the mask may be skipped, `mask_function` hides keys only by a local size.
        wide = local_size is not None and kv_offset + kv_length <= local_size
        if known and allow_is_causal_skip and (wide or mask_function is causal_mask_function):
            return padding  # attention reads it, outside of the graph
    elif known:
        first = _first_visible(mask_function, torch.arange(kv_offset + kv_length))
        # Transformers forbids skipping overlays that it added itself, known here or not.
        short = allow_is_causal_skip or PACKING.starts is not None or _is_overlaid(mask_function)
        if first is not None and short:
            if attention_mask is not None and bool(first.any()):
                begins = attention_mask.int().argmax(1, keepdim=True).cpu()
                first = first.where(first > begins, 0)  # hiding only padding is hiding nothing
            first = first[..., kv_offset:]
            hides = PACKING.starts is not None or bool((first[..., -q_length:] > 0).any())
            first = (first - kv_offset).clamp(min=0) if hides else None
            return _shortest(first, padding, batch_size, kwargs.get("device"))
    if PACKING.starts is not None:
        raise ValueError(
            "sparse_patch: this model's attention mask cannot be combined with packed sequences; "
            "give it one sequence at a time, or call sparse_patch.unpatch(model)"
        )
    kwargs.pop("allow_is_bidirectional_skip", None)
    # Never None from here: None means something else to SDPA than to us.
    mask: Tensor = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        **kwargs,
    )
    return mask


def _shortest(
    first: Tensor | None, padding: Tensor | None, batch: int, device: Any
) -> Tensor | None:
    """The mask of keys that are hidden by `first [1 or batch, kv_len]` and by padding."""
    if first is None:
        if padding is None or bool(padding.all()):
            return None
        return padding.as_subclass(CausalMask)
    first = first.expand(batch, -1).to(device)
    if padding is not None:
        first = first.where(padding, first.shape[1])
    return first.as_subclass(CausalMask)


def _first_visible(function: Callable[..., Any], places: Tensor) -> Tensor | None:
    """The first key that a query at each of `places` sees: int64 `[kv_len]` or `[batch, kv_len]`.

    None where the function is not causal, or may hide keys between that key and the query.
    """
    starts = PACKING.starts
    if starts is None:
        lower = _lower_bound(function, places)
        return lower.first if lower is not None and lower.causal else None
    PACKING.heard = True
    if starts.shape[1] != len(places):
        return None
    # As if each sequence came alone, unless Transformers has found the sequences itself.
    begin = torch.zeros_like(starts) if _is_overlaid(function, by=_packed) else starts
    lower = _lower_bound(function, places - begin)
    if lower is None or not lower.causal:
        return None
    return torch.maximum(lower.first + begin, starts)


def _is_overlaid(function: Callable[..., Any], by: Any = None) -> bool:
    """Does this function overlay packed sequences or blocks (with `by`: only what that reads)?"""
    parts = inspect.getclosurevars(function).nonlocals.get("mask_functions", ())
    kinds = {_READERS.get(getattr(part, "__code__", None)) for part in parts}
    return bool(kinds & ({by} if by else {_packed, _blocks}))


class _Bound(NamedTuple):
    """What a mask function shows: keys from `first` on, and if `causal`, up to the query."""

    first: Tensor
    causal: bool


_NOTHING = _Bound(torch.tensor(torch.iinfo(torch.int64).max, device="cpu"), True)


def _lower_bound(function: Callable[..., Any], places: Tensor) -> _Bound | None:
    """What a mask function of Transformers, a closure, shows: read from its code and its variables.
    None if the function is unknown."""
    reader = _READERS.get(getattr(function, "__code__", None))
    if reader is None:
        return None
    return reader(places, **inspect.getclosurevars(function).nonlocals)


def _causal(places: Tensor) -> _Bound:
    return _Bound(torch.zeros_like(places), True)


def _all_of(places: Tensor, mask_functions: Iterable[Callable[..., Any]]) -> _Bound | None:
    bounds = []
    for function in mask_functions:
        bound = _lower_bound(function, places)
        if bound is None:
            return None
        bounds.append(bound)
    first = bounds[0].first
    for bound in bounds[1:]:
        first = torch.maximum(first, bound.first)
    return _Bound(first, any(bound.causal for bound in bounds))


def _any_of(places: Tensor, mask_functions: Iterable[Callable[..., Any]]) -> _Bound | None:
    bounds = [_lower_bound(function, places) for function in mask_functions]
    shown = [bound for bound in bounds if bound is not _NOTHING]
    return shown[0] if len(shown) == 1 else None


def _blocks(places: Tensor, block_sequence_ids: Tensor) -> _Bound | None:
    # Tokens of a block (an image, say) see one another; -1 is in no block.
    return _NOTHING if bool((block_sequence_ids < 0).all()) else None


def _window(places: Tensor, sliding_window: int) -> _Bound:
    return _Bound(places - sliding_window + 1, False)


def _chunk(places: Tensor, chunk_size: int, left_padding: Tensor) -> _Bound | None:
    if int(places.max()) < chunk_size:
        return _Bound(torch.zeros_like(places), False)
    before = left_padding.cpu()[:, None]
    if PACKING.starts is not None and bool(before.any()):
        return None  # only the first of a row's sequences has padding before it
    return _Bound((places - before) // chunk_size * chunk_size + before, False)


def _packed(places: Tensor, packed_sequence_mask: Tensor) -> _Bound | None:
    sequence = packed_sequence_mask.cpu()
    if sequence.shape[1] != places.shape[-1] or bool((sequence.diff() < 0).any()):
        return None
    return _Bound(starts_of(sequence.diff(prepend=sequence[:, :1]) > 0), False)


def _remapped(
    places: Tensor, mask_function: Callable[..., Any], position_ids: Tensor
) -> _Bound | None:
    positions = position_ids.cpu()
    bound = _lower_bound(mask_function, positions)
    return None if bound is None else _Bound(places - positions + bound.first, bound.causal)


def starts_of(begins: Tensor) -> Tensor:
    """int64, of the shape of bool `begins [batch, length]`: the latest place up to each where a
    sequence begins; 0 before the first."""
    return (torch.arange(begins.shape[1]) * begins).cummax(1).values


def _readers() -> dict[Any, Callable[..., _Bound | None]]:
    """Readers by the code of the mask functions that the installed Transformers makes."""
    no_ids = torch.zeros(1, 1, dtype=torch.int64)
    readers: dict[Callable[..., Any], Callable[..., _Bound | None]] = {
        causal_mask_function: _causal,
        masking_utils.and_masks(causal_mask_function): _all_of,
        masking_utils.sliding_window_overlay(1): _window,
        masking_utils.chunked_overlay(1, no_ids): _chunk,
        masking_utils.packed_sequence_mask_function(no_ids): _packed,
        masking_utils.or_masks(causal_mask_function): _any_of,
    }
    if blocks := getattr(masking_utils, "blockwise_overlay", None):  # newer Transformers only
        readers[blocks(no_ids)] = _blocks
    if remap := getattr(masking_utils, "remap_positions_for_packed_sequence", None):
        readers[remap(causal_mask_function, no_ids)] = _remapped
    return {getattr(function, "__code__", None): reader for function, reader in readers.items()}


_READERS = _readers()
