"""Transformers' continuous batching on a patched model: `generate_batch`, `transformers serve`.

Its manager takes a model whose config names one of a few attentions, and looks no further, except
when it lays out a batch: with masks of tokens x cache where they are needed. So the config names
one of them while a manager is made, and ours when its requests run, which then come without masks
and go to `paged`.

Until it is stopped, a manager holds our name as a patch does (see `book`): if the model is
unpatched meanwhile, the requests that run go on, exact.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .book import Book, hold_names, is_ours, release_names
from .layer import LayerState

# Taken in all versions as it stands, without a switch to FlashAttention.
_TAKEN = "paged|eager"
_RELEASE = "_sparse_patch_release"
_KEPT = "_cached_continuous_batching_manager"


@dataclass(eq=False)
class Batching:
    """What a manager is to a book: it holds names."""

    _states: list[tuple[nn.Module, LayerState]] = field(default_factory=list)
    _names: list[tuple[PreTrainedConfig, str | None]] = field(default_factory=list)


def init_continuous_batching(model: PreTrainedModel, book: Book, *args: Any, **kwargs: Any) -> Any:
    """What a patched model has in place of its own method of this name.

    Args:
        args, kwargs: as that one takes them.

    Raises:
        RuntimeError: the model keeps a manager from before it was patched.
    """
    begin, config = type(model).init_continuous_batching, model.config
    if not is_ours(config):  # another's choice by now
        return begin(model, *args, **kwargs)
    kept = model.__dict__.get(_KEPT)
    if kept is not None and not hasattr(kept, _RELEASE):
        raise RuntimeError(
            "sparse_patch: this model keeps a manager of continuous batching from before it was "
            "patched. Call model.destroy_cached_continuous_batching_manager()."
        )
    before = config._attn_implementation_internal
    config._attn_implementation_internal = _TAKEN
    try:
        manager = begin(model, *args, **kwargs)
    finally:
        config._attn_implementation_internal = before
    if not getattr(manager, _RELEASE, _Nothing).alive:
        configs = [one for patch in book.patches for one, _ in patch._names if is_ours(one)]
        holder = Batching()
        holder._names = hold_names(holder, configs)
        setattr(manager, _RELEASE, weakref.finalize(manager, release_names, holder, configs))
        manager.stop = partial(_stop, manager)
    return manager


class _Nothing:
    """Of a manager that holds no names yet."""

    alive = False


def _stop(manager: Any, *args: Any, **kwargs: Any) -> None:
    """`stop` of a manager; once no request runs any more, it lets go of the names."""
    type(manager).stop(manager, *args, **kwargs)
    if not manager.is_running():
        getattr(manager, _RELEASE)()
        forget_manager(manager.model)


def forget_manager(model: PreTrainedModel) -> None:
    """Let go of a manager that is kept for later, if the model names another attention by now.

    What it has laid out for us comes without the masks that others need.
    """
    kept = model.__dict__.get(_KEPT)
    if kept is not None and hasattr(kept, _RELEASE) and not is_ours(model.config):
        model.destroy_cached_continuous_batching_manager()
