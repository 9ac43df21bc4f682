"""What patches write on a live model, so that all of it can be restored.

A decoder has one book of its patches, oldest first, whichever of the models that hold it was
patched. A config may be shared by several models; its attention name is restored when the last
patch that needs it is removed, unless someone else has changed it since.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .attention import STATE
from .layer import LayerState
from .routing import SparsePatchWarning

NAME = "sparse_patch"
_BOOK = "_sparse_patch_book"


class Held(Protocol):
    """What a book needs of a `patching.Patch`: layer states, and the earlier names in configs."""

    _states: list[tuple[nn.Module, LayerState]]
    _names: list[tuple[PreTrainedConfig, str | None]]


@dataclass(eq=False)
class Book:
    """The patches of one decoder.

    Attributes:
        modules: its attention modules; each carries the state of the latest patch that holds it, or
            None.
        patches: oldest first.
        hooks: on the decoder.
    """

    modules: list[nn.Module]
    patches: list[Any] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)

    def states(self) -> list[LayerState]:
        """The states that the modules carry."""
        carried = (getattr(module, STATE, None) for module in self.modules)
        return [state for state in carried if state is not None]

    def hang_latest(self) -> None:
        """Give each module the state of the latest patch that holds it, or None."""
        latest = {id(module): state for patch in self.patches for module, state in patch._states}
        for module in self.modules:
            setattr(module, STATE, latest.get(id(module)))


def book_of(decoder: PreTrainedModel) -> Book | None:
    """The book of a decoder; None if it is not patched."""
    return getattr(decoder, _BOOK, None)


def open_book(decoder: PreTrainedModel, modules: list[nn.Module]) -> Book:
    """The book of a decoder, a new one if it has none."""
    book = book_of(decoder) or Book(modules)
    setattr(decoder, _BOOK, book)
    return book


def close_book(decoder: PreTrainedModel, book: Book) -> None:
    """Remove all traces of a book without patches."""
    for hook in book.hooks:
        hook.remove()
    for module in book.modules:
        delattr(module, STATE)
    delattr(decoder, _BOOK)


@dataclass
class _Name:
    """`before`: a config's name before the first of the patches that hold it."""

    before: str | None
    holders: WeakSet[Held] = field(default_factory=WeakSet)


_names: MutableMapping[PreTrainedConfig, _Name] = WeakIdKeyDictionary()
_warned: MutableMapping[PreTrainedConfig, bool] = WeakIdKeyDictionary()


def hold_names(patch: Held, configs: Iterable[PreTrainedConfig]) -> list[tuple[Any, str | None]]:
    """Let configs name our attention; returns them with their earlier names."""
    previous = []
    for config in configs:
        name = _names.get(config)
        if name is None or not is_ours(config):  # or someone else has changed it since
            holders = WeakSet() if name is None else name.holders
            name = _names[config] = _Name(config._attn_implementation_internal, holders)
        name.holders.add(patch)
        # The public setter would also rename the vision tower's sub-config.
        config._attn_implementation_internal = NAME
        previous.append((config, name.before))
    return previous


def hold_copied_names(patch: Held, names: Iterable[tuple[Any, str | None]]) -> None:
    """The same for a copy of a patch, whose copied configs name us already."""
    for config, before in names:
        _names.setdefault(config, _Name(before)).holders.add(patch)


def release_names(patch: Held, configs: Iterable[PreTrainedConfig]) -> None:
    """Restore names that no other patch needs and that are still ours."""
    for config in configs:
        name = _names[config]
        name.holders.discard(patch)
        if not name.holders:
            del _names[config]
            if is_ours(config):
                config._attn_implementation_internal = name.before


def warn_unless_held(config: PreTrainedConfig) -> None:
    """Warn, once per config, that it names us although nothing is patched."""
    if config in _names or config in _warned:
        return
    _warned[config] = True
    warnings.warn(
        "sparse_patch: running exact attention: this model's attn_implementation is "
        f"{NAME!r}, but the model is not patched, and the name alone chooses no method. Call "
        "sparse_patch.patch(model, method); it works on a model loaded in the usual way.",
        SparsePatchWarning,
        stacklevel=2,
    )


def is_ours(config: PreTrainedConfig) -> bool:
    """Does this config name our attention?"""
    return bool(config._attn_implementation_internal == NAME)
