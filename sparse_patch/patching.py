"""Patch a live Transformers model, and undo it exactly. The only file that talks to Transformers.

Attention modules look their function up by a name in their config, on every call. So importing this
registers one name, `sparse_patch`, with an attention function and a mask function of its own; a
patch writes that name into the text decoder's config and hangs the method on each attention module.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from sparse_patch_kernels import choose_backend
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_utils import PreTrainedModel

from . import methods as _methods  # noqa: F401 - registers the built-in methods
from .attention import STATE, attention_function
from .budget import ELSEWHERE_MIN_LENGTH, Budget
from .costs import CostModel, of_this_machine
from .profiles import Auto, Profile, shape_of
from .registry import Method, get_method
from .reporting import Report, make_report
from .routing import LayerState, Options, Watch

NAME = "sparse_patch"
_STACK = "_sparse_patch_stack"

# These select keys themselves. Most hand the choice over as an argument that only "eager" and
# "sdpa" turn into a mask: under any other name the model silently loses its own sparsity. Families
# that come later show by a module that is called an indexer or a compressor.
NATIVE_SPARSE = {
    "axk2",
    "deepseek_v32",
    "deepseek_v4",
    "doge",
    "dots3_note",
    "glm5_next",
    "glm_moe_dsa",
    "hy_v4",
    "minimax_m3_vl",
    "mistral_large4",
    "qwen4_exp",
}


def patch(
    model: nn.Module,
    method: str | Method | None = None,
    *,
    profile: Profile | str | Path | None = None,
    layers: Iterable[int] | None = None,
    dense_layers: int | Iterable[int] | None = None,
    min_length: int | Literal["auto"] = 1024,
    min_queries: int = 64,
    backend: str = "auto",
    measure_recall: bool | int = False,
    costs: CostModel | None = None,
    **params: Any,
) -> Patch:
    """Run the prefill of `model` through a sparse method, from now on.

    A call runs sparse when it is a causal prefill without gradients that the method can handle, row
    by row without its padding; decode steps do with the methods that choose keys for them, too
    (`hip`, `infinite_hip`). Every other call runs exact attention and is counted by reason.

    On a tensor-parallel model a process sees its share of the heads: what a method shares among all
    heads (the one list of `dhsa` and `infinite_hip`) is then shared among those.

    Args:
        model: a Transformers decoder model, or a wrapper that holds one. Of a vision-language model
            only the text decoder is patched.
        method: a name from `list_methods()`, or a method object. With a profile: "auto", or none.
        profile: which method each head runs: a file that `sparse-patch tune` wrote for a model of
            this type and shape, or what `Profile.load` reads from it.
        layers: indices of the layers to patch, negative from the end; default: all.
        dense_layers: layers kept exact: indices, or a number n for the first n; default: the
            method's own (0 for most).
        min_length: sequences with fewer keys run exact, tokens. "auto", on a CPU: a call is planned
            and runs sparse where that is expected to be faster than exact attention, by what both
            cost on this machine (`sparse_patch.costs`, measured once, in a few seconds) and by what
            plans took and saved so far (`sparse_patch.budget`). Which calls run sparse then depends
            on timing; exact ones may run through the op, which rounds otherwise than SDPA; and
            decode steps run exact. On a GPU "auto" means 16,384.
        min_queries: calls with fewer queries against longer keys run exact (speculative decoding).
        backend: one of `sparse_patch_kernels.BACKENDS`. A named one runs or raises; "auto" chooses.
        measure_recall: also measure the attention mass kept, which costs about a dense prefill; a
            number measures about so many query rows per call instead of all.
        costs: for `min_length="auto"`, what attention costs here; default: as measured.
        params: the method's parameters, and `preset=` for one of its presets.

    Returns:
        The patch, already active: a handle (`remove()`, `report()`) and a context manager that
        removes it on exit. Patches nest; the latest one that holds a layer counts.

    Raises:
        TypeError: `model` is not and does not hold a Transformers model.
        ValueError: the method, a parameter, a layer or the backend does not exist, or the model
            cannot be patched; the message says why and what to do. A parameter that is about all
            heads together (values per head, say) is refused on a tensor-parallel model, which has
            a share of its heads in each process.
        sparse_patch_kernels.BackendUnavailable: the backend named cannot run on the model's device.
    """
    root = _transformers_model(model)
    modules = _attention_modules(root)
    if profile is None:
        chosen = _as_method(method, params)
    else:
        chosen = _of_profile(profile, method, params, _text_config(root))
    _refuse_split_heads(root, chosen)
    if dense_layers is None:
        dense_layers = getattr(chosen, "dense_layers", 0)
    wanted, dense = _select_layers([layer for layer, _ in modules], layers, dense_layers)
    _check_lengths(min_length, min_queries, costs)
    if measure_recall < 0:
        raise ValueError(f"measure_recall={measure_recall} must be true, false or a number of rows")
    if backend != "auto":
        choose_backend(backend, root.device)
    budget = None
    if isinstance(min_length, str):
        budget = Budget(layers=len(wanted - dense), given=costs)
        min_length = ELSEWHERE_MIN_LENGTH
    options = Options(min_length, min_queries, backend, measure_recall, budget)
    if costs is None and options.budget_on(root.device) is not None:
        of_this_machine(root.dtype)  # now rather than in the first prefill
    states = [
        (module, LayerState(layer, None if layer in dense else _of_layer(chosen, layer), options))
        for layer, module in modules
        if layer in wanted
    ]
    handle = Patch(root, chosen, states, _text_configs(root, modules))
    handle._apply()
    return handle


def unpatch(model: nn.Module) -> None:
    """Remove every patch of `model` and restore it exactly; an unpatched model is left alone."""
    root = _transformers_model(model)
    for handle in reversed(list(_stack(root))):
        handle.remove()


def report(model: nn.Module) -> Report:
    """What the latest patch of `model` did so far, per layer.

    Raises:
        ValueError: the model is not patched.
    """
    stack = _stack(_transformers_model(model))
    if not stack:
        raise ValueError("report: this model is not patched; call sparse_patch.patch(model, ...)")
    return stack[-1].report()


def latest_method(model: nn.Module) -> Method:
    """The method of the latest patch of `model`.

    Raises:
        ValueError: the model is not patched.
    """
    stack = _stack(_transformers_model(model))
    if not stack:
        raise ValueError(
            "this model is not patched: name a method, or call sparse_patch.patch first"
        )
    return stack[-1].method


@dataclass(eq=False)
class Patch:
    """An active patch: a handle, and a context manager that removes it on exit."""

    model: PreTrainedModel
    method: Method
    _states: list[tuple[nn.Module, LayerState]]
    _configs: list[tuple[PreTrainedConfig, str | None]]
    _hook: Any = field(default=None, repr=False)

    def report(self) -> Report:
        """What this patch did so far, per layer. Still there after `remove()`."""
        return make_report(repr(self.method), (state for _, state in self._states))

    def watch(self, watch: Watch) -> None:
        """From now on let `watch` attend in place of the layers of this patch."""
        for _, state in self._states:
            state.watch = watch

    def remove(self) -> None:
        """Take this patch out, and restore what was before it. A second call does nothing."""
        stack = _stack(self.model)
        if self not in stack:
            return
        place = stack.index(self)
        if place + 1 < len(stack):
            # A later patch stays on: it now has to restore what was before this one.
            stack[place + 1]._configs = self._configs
        else:
            _write_names(self._configs)
        stack.remove(self)
        self._hook.remove()
        for module, _ in self._states:
            _hang_latest(module, stack)
        if not stack:
            delattr(self.model, _STACK)
            del self.model.__dict__["init_continuous_batching"]

    def _apply(self) -> None:
        stack = _stack(self.model)
        if not stack:
            setattr(self.model, _STACK, stack)
            self.model.__dict__["init_continuous_batching"] = _refuse_continuous_batching
        stack.append(self)
        self._hook = self.model.register_forward_pre_hook(_refuse_weights, with_kwargs=True)
        for module, _ in self._states:
            _hang_latest(module, stack)
        _write_names([(config, NAME) for config, _ in self._configs])

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def _stack(root: PreTrainedModel) -> list[Patch]:
    stack: list[Patch] = getattr(root, _STACK, [])
    return stack


def _write_names(configs: Iterable[tuple[PreTrainedConfig, str | None]]) -> None:
    for config, name in configs:
        # The public setter would also rename the vision tower's sub-config.
        config._attn_implementation_internal = name


def _hang_latest(module: nn.Module, stack: list[Patch]) -> None:
    """Give a module the state of the latest patch that holds it, or none."""
    for handle in reversed(stack):
        for candidate, state in handle._states:
            if candidate is module:
                setattr(module, STATE, state)
                return
    delattr(module, STATE)


def _refuse_continuous_batching(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "sparse_patch: continuous batching (generate_batch, paged caches) is not supported; it "
        "would swap the patched attention out. Call sparse_patch.unpatch(model), or use generate."
    )


def _refuse_weights(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: a patched model has no attention weights to return (sparse "
            "attention never computes them all). Call sparse_patch.unpatch(model) and use "
            'attn_implementation="eager".'
        )


def _of_profile(
    profile: Profile | str | Path,
    method: str | Method | None,
    params: dict[str, Any],
    config: PreTrainedConfig,
) -> Method:
    if method not in (None, "auto") or params:
        raise ValueError(
            f"profile= says which methods run: leave method={method!r} and parameters "
            f"{sorted(params)} out"
        )
    loaded = profile if isinstance(profile, Profile) else Profile.load(profile)
    loaded.check_model(shape_of(config))
    return Auto(profile=loaded)


def _as_method(method: str | Method | None, params: dict[str, Any]) -> Method:
    if method is None or method == "auto":
        raise ValueError(
            f"method={method!r}: name one (sparse_patch.list_methods()), or give a profile= that "
            "`sparse-patch tune` wrote for this model"
        )
    if isinstance(method, str):
        return get_method(method, **params)
    if params:
        raise ValueError(
            f"parameters {sorted(params)} go with a method's name; a method object has its own"
        )
    if not callable(getattr(method, "plan", None)):
        raise ValueError(f"method={method!r} must be a name or an object with plan(q, k, ...)")
    return method


def _refuse_split_heads(root: PreTrainedModel, method: Method) -> None:
    """Head 0 of a process is head 0 of the model in the first process only."""
    names = method.needs_all_heads() if isinstance(method, Method) else []
    processes = getattr(root, "tp_size", None) or 1
    if names and processes > 1:
        raise ValueError(
            f"{type(method).__name__}: {', '.join(names)} is about all heads of the model, but "
            f"this model is split over {processes} processes by its heads (tensor parallel), where "
            "it would mean others. Give one value for all heads, leave it at its default, or load "
            "the model without tp_plan."
        )


def _check_lengths(min_length: Any, min_queries: int, costs: Any) -> None:
    auto = min_length == "auto"
    if not auto and (isinstance(min_length, str) or min_length < 0):
        raise ValueError(f"min_length={min_length!r} must be a number of tokens from 0, or 'auto'")
    if min_queries < 0:
        raise ValueError(f"min_queries={min_queries} must be at least 0 tokens")
    if costs is not None and not (auto and isinstance(costs, CostModel)):
        raise ValueError(
            f"costs={costs!r} must be a sparse_patch.costs.CostModel, and with min_length='auto'"
        )


def _of_layer(method: Method, layer: int) -> Method:
    """A method of another package need not be a `Method`; then it is the same on every layer."""
    return method.for_layer(layer) if isinstance(method, Method) else method


def _select_layers(
    known: list[int], layers: Iterable[int] | None, dense_layers: int | Iterable[int]
) -> tuple[set[int], set[int]]:
    """Layers to patch and, among them, layers kept dense."""
    total = max(known) + 1
    if isinstance(dense_layers, int):
        dense_layers = [layer for layer in known if layer < dense_layers]

    def resolve(name: str, given: Iterable[int]) -> set[int]:
        found = {layer + total if layer < 0 else layer for layer in given}
        if not found <= set(known):
            raise ValueError(
                f"{name}: no attention layer {sorted(found - set(known))}; this model has {known}"
            )
        return found

    wanted = set(known) if layers is None else resolve("layers", layers)
    return wanted, resolve("dense_layers", dense_layers)


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    """The outermost Transformers model in `model` (itself, or inside PEFT, DDP, torch.compile)."""
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                return module
    raise TypeError(f"{type(model).__name__} is not, and does not hold, a Transformers model")


def _attention_modules(root: PreTrainedModel) -> list[tuple[int, nn.Module]]:
    """(layer index, module) of the text decoder's self-attention.

    Raises:
        ValueError: this kind of model cannot be patched.
    """
    name = type(root).__name__
    if getattr(root.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; only decoder models can be patched")
    decoder = root.get_decoder()
    owner = decoder if isinstance(decoder, PreTrainedModel) else root
    if why := _selects_keys_itself(root, owner):
        raise ValueError(
            f"{name} selects keys itself ({why}); patching would undo that, so it is refused"
        )
    if not owner._can_set_attn_implementation():
        raise ValueError(
            f"{name} does not look its attention up through Transformers' AttentionInterface, so "
            "it cannot be patched; see https://huggingface.co/docs/transformers/attention_interface"
        )
    kind = type(_text_config(root))
    classes: set[Any] = {type(module) for module in owner.modules()}
    lookers = {cls for cls in classes if _looks_attention_up(cls)}
    found = [
        module
        for module in owner.modules()
        if type(module) in lookers
        and isinstance(getattr(module, "config", None), kind)
        and getattr(module, "is_causal", True)
        and not getattr(module, "is_cross_attention", False)
    ]
    if not found:
        raise ValueError(
            f"{name}: found no causal self-attention module in its text decoder to patch; if the "
            "decoder is nested, patch that sub-model"
        )
    return [
        (index if getattr(module, "layer_idx", None) is None else module.layer_idx, module)
        for index, module in enumerate(found)
    ]


def _selects_keys_itself(root: PreTrainedModel, decoder: PreTrainedModel) -> str | None:
    """What gives a natively sparse model away, or None."""
    for kind in (root.config.model_type, _text_config(root).model_type):
        if kind in NATIVE_SPARSE:
            return str(kind)
    for module in decoder.modules():
        if re.search("Indexer|Compressor", type(module).__name__):
            return type(module).__name__
    return None


@functools.cache  # reading a source takes milliseconds
def _looks_attention_up(kind: type) -> bool:
    """Does the source of this class ask AttentionInterface for its function?"""
    if issubclass(kind, PreTrainedModel):
        return False
    for base in kind.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):  # no source (frozen app, notebook): not one we can vouch for
            continue
        if ".get_interface(" in source and "_attn_implementation" in source:
            return "Cross" not in kind.__name__
    return False


def _text_config(root: PreTrainedModel) -> PreTrainedConfig:
    try:
        return root.config.get_text_config(decoder=True)
    except ValueError as error:
        raise ValueError(
            f"{type(root).__name__} holds several text models; patch the one you mean"
        ) from error


def _text_configs(
    root: PreTrainedModel, modules: list[tuple[int, nn.Module]]
) -> list[tuple[PreTrainedConfig, str | None]]:
    """Every config whose name the decoder or its mask code reads, with its present name.

    The top-level config belongs to them: some vision-language models build the decoder's mask from
    it. Their towers read sub-configs of their own, which stay untouched.
    """
    configs = [root.config, _text_config(root), *(module.config for _, module in modules)]
    decoder = root.get_decoder()
    if isinstance(decoder, PreTrainedModel):
        configs.append(decoder.config)
    unique = {id(config): config for config in configs}
    return [(config, config._attn_implementation_internal) for config in unique.values()]


class PaddingMask(Tensor):
    """bool `[batch, kv_len]`: causal plus padding, without the square that would take to write out.

    Some models cut the mask down to a few query rows (Gemma 4's layers that share keys), with the
    four indices of a 4-D mask. Padding does not depend on the query, so that is a cut of its own
    two axes.
    """

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, tuple) and len(index) == 4:
            index = (index[0], index[3])
        return super().__getitem__(index)


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
    """The mask of one forward, as small as it can be said.

    Returns:
        None: causal, the queries being the last rows; nothing else.
        bool `[batch, kv_len]`: the same plus padding (True: a real token).
        bool `[batch, 1, q_len, kv_len]`: anything else.
    """
    plain = (
        mask_function is causal_mask_function
        and allow_is_causal_skip
        and local_size is None
        and not use_vmap
        and not isinstance(q_offset, Tensor)
        and kv_offset == 0
        and kv_length == q_offset + q_length
        and (attention_mask is None or attention_mask.shape == (batch_size, kv_length))
    )
    if plain:
        # A compiled graph cannot look at the values; attention, outside of it, will.
        compiling = torch.compiler.is_compiling()
        if attention_mask is None or (not compiling and bool(attention_mask.all())):
            return None
        padding = attention_mask.bool()
        return padding if compiling else padding.as_subclass(PaddingMask)
    kwargs.pop("allow_is_bidirectional_skip", None)
    # Never None from here: SDPA's None means other things than ours.
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


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function)
