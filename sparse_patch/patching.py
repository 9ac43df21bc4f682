"""Patch a live Transformers model, and undo it exactly.

On every call, attention modules look up their function by a name in their config. Importing this
module registers one name, `sparse_patch`, with an attention function and a mask function of its
own; a patch writes that name into the text decoder's configs and attaches the method to each
attention module. All patches of a decoder are listed in one book, whichever model that holds it was
patched.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from sparse_patch_kernels import choose_backend, prepare
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from . import methods as _methods  # noqa: F401 - registers the built-in methods
from .attention import attention_function
from .batching import forget_manager, init_continuous_batching
from .book import (
    NAME,
    Book,
    book_of,
    close_book,
    hold_copied_names,
    hold_names,
    open_book,
    release_names,
)
from .budget import ELSEWHERE_MIN_LENGTH, Budget
from .costs import CostModel, of_this_machine
from .forwards import hook_decoder, hook_steps
from .layer import LayerState, Observer
from .masks import mask_function
from .profiles import Auto, Profile, shape_of
from .registry import RECOMMENDED, Method, brief, get_method
from .reporting import Report, make_report
from .routing import Options
from .targets import (
    Pipeline,
    attention_modules,
    computing_devices,
    decoder_of,
    text_config,
    text_configs,
    transformers_model,
)

DEFAULT_MIN_LENGTH = 1024
"""Fewest keys of a sparse call where a method or a profile is named, and no length."""


def patch(
    model: nn.Module | Pipeline,
    method: str | Method | None = None,
    *,
    profile: Profile | str | Path | None = None,
    layers: Iterable[int] | None = None,
    dense_layers: int | Iterable[int] | None = None,
    min_length: int | Literal["auto"] | None = None,
    min_queries: int = 64,
    backend: str = "auto",
    measure_recall: bool | int = False,
    costs: CostModel | None = None,
    **params: Any,
) -> Patch:
    """Run the prefill of `model` through a sparse method, from now on.

    A call runs sparse when it is a causal prefill without gradients that the method can handle, row
    by row without its padding. Decode steps run sparse with methods that choose keys for them
    (`hip`, `infinite_hip`). Every other call runs exact attention and is counted by reason.

    In a tensor-parallel model a process has only a share of the heads: what a method shares among
    all heads (the one list of `dhsa` and `infinite_hip`) is then shared among those.

    Args:
        model: a Transformers decoder model, or what holds one: a wrapper, or a pipeline. Of a
            vision-language model only the text decoder is patched.
        method: a name from `list_methods()`, also with parameters as on the command line
            (`"strided:preset=fine"`), or a method object. Default: the one we recommend,
            `sparse_patch.RECOMMENDED`. With a profile: "auto" or None.
        profile: which method each head runs: a file that `sparse-patch tune` wrote for a model of
            this type and shape, or the `Profile` loaded from it.
        layers: indices of the layers to patch, negative from the end; default: all.
        dense_layers: layers kept exact: indices, or a number n for the first n; default: the
            method's own (0 for most).
        min_length: sequences with fewer keys than this run exact; default: 1024, or "auto" where
            neither a method nor a profile is named. "auto", on a CPU: a call is
            planned and runs sparse where that is expected to be faster than exact attention, from
            the costs of both on this machine (`sparse_patch.costs`, measured once, in a few
            seconds) and from the times of earlier plans (`sparse_patch.budget`). Which calls run
            sparse then depends on timing; exact calls may run through the op, which rounds
            differently from SDPA; and decode steps run exact. "auto", on a GPU: the length from
            which the method is faster than SDPA there, timed at the first call of 4,096 keys or
            more, in about a second.
        min_queries: calls with fewer queries against longer keys run exact (speculative decoding).
        backend: one of `sparse_patch_kernels.BACKENDS`. A named backend runs or raises; "auto"
            chooses one.
        measure_recall: also measure the attention mass kept, which costs about a dense prefill; a
            number: only on about that many query rows per call.
        costs: the cost model for `min_length="auto"`; default: measured on this machine.
        params: the method's parameters, and `preset=` for one of its presets; these override what
            the text of `method` says of them.

    Returns:
        The patch, already active: a handle (`remove()`, `report()`) and a context manager that
        removes it on exit. Patches nest; in each layer the latest one counts.

    Raises:
        TypeError: `model` is not and does not hold a Transformers model.
        ValueError: the method, a parameter, a layer or the backend does not exist, or the model
            cannot be patched; the message says why and what to do. A parameter for all heads
            together (values per head, say) is refused on a tensor-parallel model, which has a share
            of its heads in each process.
        sparse_patch_kernels.BackendUnavailable: the backend named cannot run on the model's device.
    """
    root = transformers_model(model)
    modules = attention_modules(root)
    if min_length is None:
        min_length = "auto" if method is None and profile is None else DEFAULT_MIN_LENGTH
    if profile is None:
        chosen = _as_method(RECOMMENDED if method is None else method, params)
    else:
        chosen = _of_profile(profile, method, params, text_config(root))
    refuse_split_heads(chosen, getattr(root, "tp_size", None) or 1)
    if dense_layers is None:
        dense_layers = getattr(chosen, "dense_layers", 0)
    patched, dense = select_layers([layer for layer, _ in modules], layers, dense_layers)
    _check_lengths(min_length, min_queries, costs)
    if measure_recall < 0:
        raise ValueError(f"measure_recall={measure_recall} must be true, false or a number of rows")
    devices = computing_devices(module for _, module in modules)
    if backend != "auto":
        for device in devices:
            choose_backend(backend, device)
    for device in devices:
        prepare(device, backend)
    budget = None
    if isinstance(min_length, str):
        budget = Budget(layers=len(patched - dense), given=costs)
        min_length = ELSEWHERE_MIN_LENGTH
    options = Options(min_length, min_queries, backend, measure_recall, budget)
    if costs is None and any(options.budget_on(device) is not None for device in devices):
        of_this_machine(root.dtype)  # now rather than in the first prefill
    states = [
        (
            module,
            LayerState(layer, None if layer in dense else of_layer(chosen, layer), options),
        )
        for layer, module in modules
        if layer in patched
    ]
    handle = Patch(root, chosen, states)
    handle._apply([module for _, module in modules], text_configs(root, modules))
    return handle


def unpatch(model: nn.Module | Pipeline) -> None:
    """Remove every patch of `model` and restore it exactly; an unpatched model is left alone.

    A model and its decoder (`model.model`) count as one: unpatching either removes all patches.
    """
    for handle in reversed(_patches(model)):
        handle.remove()


def report(model: nn.Module | Pipeline) -> Report:
    """Calls, density and recall of the latest patch of `model` so far, per layer.

    Raises:
        ValueError: the model is not patched.
    """
    patches = _patches(model)
    if not patches:
        raise ValueError("report: this model is not patched; call sparse_patch.patch(model, ...)")
    return patches[-1].report()


def latest_method(model: nn.Module | Pipeline) -> Method:
    """The method of the latest patch of `model`.

    Raises:
        ValueError: the model is not patched.
    """
    patches = _patches(model)
    if not patches:
        raise ValueError(
            "this model is not patched: name a method, or call sparse_patch.patch first"
        )
    return patches[-1].method


@dataclass(eq=False, repr=False)
class Patch:
    """An active patch: a handle, and a context manager that removes it on exit."""

    model: PreTrainedModel
    method: Method
    _states: list[tuple[nn.Module, LayerState]]
    _names: list[tuple[PreTrainedConfig, str | None]] = field(default_factory=list)
    _hooks: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        layers = sum(state.method is not None for _, state in self._states)
        name = type(self.model).__name__
        state = "active" if self._is_active() else "removed"
        return f"<Patch of {name}, {state}: {brief(self.method)} in {layers} layers>"

    def _repr_html_(self) -> str:
        """For notebooks: itself, and the report."""
        return f"<p>{html.escape(repr(self))}</p>{self.report()._repr_html_()}"

    def _is_active(self) -> bool:
        book = book_of(decoder_of(self.model))
        return book is not None and self in book.patches

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        hold_copied_names(self, self._names)

    def report(self) -> Report:
        """Calls, density and recall so far, per layer. Still available after `remove()`."""
        return make_report(self.method, (state for _, state in self._states))

    def observe(self, observer: Observer | None) -> None:
        """Call `observer` with each sparse prefill result; it returns the output to go on with."""
        for _, state in self._states:
            state.observer = observer

    def remove(self) -> None:
        """Remove this patch and restore the state before it. A second call does nothing."""
        decoder = decoder_of(self.model)
        book = book_of(decoder)
        if book is None or self not in book.patches:
            return
        book.patches.remove(self)
        release_names(self, (config for config, _ in self._names))
        for hook in self._hooks:
            hook.remove()
        if all(patch.model is not self.model for patch in book.patches):
            del self.model.__dict__["init_continuous_batching"]
            forget_manager(self.model)
        if book.patches:
            book.hang_latest()
        else:
            close_book(decoder, book)

    def _apply(self, modules: list[nn.Module], configs: list[PreTrainedConfig]) -> None:
        decoder = decoder_of(self.model)
        book: Book = open_book(decoder, modules)
        book.hooks = book.hooks or hook_decoder(decoder)
        book.patches.append(self)
        book.hang_latest()
        self.model.__dict__["init_continuous_batching"] = partial(
            init_continuous_batching, self.model, book
        )
        self._hooks = [
            hook
            for module, state in self._states
            if state.sparse_decode
            for hook in hook_steps(module)
        ]
        self._names = hold_names(self, configs)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def _patches(model: nn.Module | Pipeline) -> list[Patch]:
    """The active patches of a model, oldest first."""
    book = book_of(decoder_of(transformers_model(model)))
    return [] if book is None else list(book.patches)


def _of_profile(
    profile: Profile | str | Path,
    method: str | Method | None,
    params: dict[str, Any],
    config: PreTrainedConfig,
) -> Method:
    if method not in (None, "auto") or params:
        raise ValueError(
            f"profile= already names the methods: leave out method={method!r} and parameters "
            f"{sorted(params)}"
        )
    loaded = profile if isinstance(profile, Profile) else Profile.load(profile)
    loaded.check_model(shape_of(config))
    return Auto(profile=loaded)


def _as_method(method: str | Method, params: dict[str, Any]) -> Method:
    if method == "auto":
        raise ValueError(
            "method='auto' needs a profile= that `sparse-patch tune` wrote for this model; leave "
            "it out for the method we recommend, or name one (sparse_patch.list_methods())"
        )
    if isinstance(method, str):
        return get_method(method, **params)
    if params:
        raise ValueError(
            f"parameters {sorted(params)} need a method's name; a method object has its own"
        )
    if not callable(getattr(method, "plan", None)):
        raise ValueError(f"method={method!r} must be a name or an object with plan(q, k, ...)")
    return method


def refuse_split_heads(method: Method, processes: int) -> None:
    """Raise a ValueError where a method needs all heads, and these processes share them: head 0
    of a process is head 0 of the model in the first process only."""
    names = method.needs_all_heads() if isinstance(method, Method) else []
    if names and processes > 1:
        raise ValueError(
            f"{type(method).__name__}: {', '.join(names)} refers to all heads of the model, but "
            f"this model's heads are split over {processes} processes (tensor parallel), where it "
            "would apply to the wrong heads. Give one value for all heads, leave it at its "
            "default, or load the model without tp_plan (in one process)."
        )


def _check_lengths(min_length: Any, min_queries: int, costs: Any) -> None:
    auto = min_length == "auto"
    if not auto and (isinstance(min_length, str) or min_length < 0):
        raise ValueError(f"min_length={min_length!r} must be a number of tokens from 0, or 'auto'")
    if min_queries < 0:
        raise ValueError(f"min_queries={min_queries} must be at least 0 tokens")
    if costs is not None and not (auto and isinstance(costs, CostModel)):
        raise ValueError(
            f"costs={costs!r} must be a sparse_patch.costs.CostModel, and needs min_length='auto'"
        )


def of_layer(method: Method, layer: int) -> Method:
    """A method of another package need not be a `Method`; then it is the same on every layer."""
    return method.for_layer(layer) if isinstance(method, Method) else method


def select_layers(
    known: list[int], layers: Iterable[int] | None, dense_layers: int | Iterable[int]
) -> tuple[set[int], set[int]]:
    """The layers to patch, and the layers to keep dense."""
    total = max(known) + 1
    if isinstance(dense_layers, int):
        dense_layers = [layer for layer in known if layer < dense_layers]

    def resolve(name: str, indices: Iterable[int]) -> set[int]:
        chosen = {layer + total if layer < 0 else layer for layer in indices}
        if not chosen <= set(known):
            raise ValueError(
                f"{name}: no attention layer {sorted(chosen - set(known))}; this model has {known}"
            )
        return chosen

    patched = set(known) if layers is None else resolve("layers", layers)
    return patched, resolve("dense_layers", dense_layers)


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function)
