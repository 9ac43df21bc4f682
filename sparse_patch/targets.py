"""What a patch changes: attention modules of the text decoder, their configs and devices."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Hashable, Iterable
from types import CodeType
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

# These select keys themselves. Most pass the choice as an argument that only "eager" and "sdpa"
# turn into a mask: under any other name the model silently loses its own sparsity. Later families
# are recognised by a module that is called an indexer or a compressor.
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


class Pipeline(Protocol):
    """What holds a model under this name, as Transformers' pipelines do."""

    model: nn.Module


def module_of(model: nn.Module | Pipeline) -> nn.Module:
    """The model of a pipeline; a module itself.

    Raises:
        TypeError: neither.
    """
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if isinstance(module, nn.Module):
        return module
    raise TypeError(f"{type(model).__name__} is not, and does not hold, a Transformers model")


def transformers_model(model: nn.Module | Pipeline) -> PreTrainedModel:
    """The outermost Transformers model in `model` (itself, or inside PEFT, DDP, torch.compile, a
    pipeline)."""
    for module in module_of(model).modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"{type(model).__name__} is not, and does not hold, a Transformers model")


def attention_modules(root: PreTrainedModel) -> list[tuple[int, nn.Module]]:
    """(layer index, module) of the text decoder's self-attention.

    Raises:
        ValueError: this kind of model cannot be patched.
    """
    name = type(root).__name__
    if getattr(root.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; only decoder models can be patched")
    owner = decoder_of(root)
    if why := _selects_keys_itself(root, owner):
        raise ValueError(
            f"{name} selects keys itself ({why}); patching would undo that, so it is refused"
        )
    if not owner._can_set_attn_implementation():
        raise ValueError(
            f"{name} does not look its attention up through Transformers' AttentionInterface, so "
            "it cannot be patched; see https://huggingface.co/docs/transformers/attention_interface"
        )
    kind = type(text_config(root))
    candidates = [
        module
        for module in owner.modules()
        if isinstance(getattr(module, "config", None), kind)
        and not isinstance(module, PreTrainedModel)
        and getattr(module, "is_causal", True)
        and not (getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__)
    ]
    patchable = [module for module in candidates if looks_attention_up(module)]
    for module in candidates:
        cls: Any = type(module)
        if module not in patchable and _asked_when_written(cls):
            raise ValueError(
                f"{name}: the forward of {cls.__name__} was replaced (by one of "
                f"{getattr(_forward_of(module), '__module__', 'another library')}), and what runs "
                "now does not look attention up through Transformers' AttentionInterface: a patch "
                "would never be called. Load the model without the library that replaced it."
            )
    if not patchable:
        raise ValueError(
            f"{name}: found no causal self-attention module in its text decoder to patch (a "
            "recurrent model has none); if the decoder is part of another model, patch that one"
        )
    return list(zip(_indices(patchable), patchable, strict=True))


def _indices(modules: list[nn.Module]) -> list[int]:
    """The layer indices of attention modules; their order where indices are missing or repeated."""
    indices = [getattr(module, "layer_idx", None) for module in modules]
    known = [index for index in indices if type(index) is int and index >= 0]
    return known if len(set(known)) == len(modules) else list(range(len(modules)))


def _selects_keys_itself(root: PreTrainedModel, decoder: PreTrainedModel) -> str | None:
    """The model type or module name that shows native sparsity, or None."""
    for kind in (root.config.model_type, text_config(root).model_type):
        if kind in NATIVE_SPARSE:
            return str(kind)
    for module in decoder.modules():
        if re.search("(Indexer|Compressor)$", type(module).__name__):
            return type(module).__name__
    return None


def looks_attention_up(module: nn.Module) -> bool:
    """Does the forward that this module runs ask AttentionInterface for its function?"""
    cls: Any = type(module)
    return _asks(_forward_of(module), cls)


def _forward_of(module: nn.Module) -> Any:
    """The function behind a module's forward, without wrappers."""
    forward: Any = module.forward
    while isinstance(forward, functools.partial):  # accelerate's hooks set one on the module
        forward = getattr(forward, "__wrapped__", forward.func)
    forward = inspect.unwrap(forward)
    return getattr(forward, "__func__", forward)


@functools.cache
def _asks(function: Any, kind: Hashable, depth: int = 2) -> bool:
    """Does a function, or one that it calls, look a function up through `get_interface`?

    Judged by the names in its code, so it holds for the code that runs, wherever it was written.
    """
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    names = _names(code)
    if names >= {"get_interface", "_attn_implementation"}:
        return True
    called = (getattr(kind, name, None) or function.__globals__.get(name) for name in names)
    return depth > 0 and any(
        _asks(inspect.unwrap(callee), kind, depth - 1)
        for callee in called
        if inspect.isfunction(callee)
    )


def _names(code: CodeType) -> set[str]:
    """The names that code, and the functions within it, use."""
    inner = (_names(part) for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*inner)


@functools.cache  # reading a source takes milliseconds
def _asked_when_written(kind: Any) -> bool:
    """Does the source of this class ask AttentionInterface for its function?"""
    for base in kind.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):  # no source: a frozen app, a notebook
            continue
        if ".get_interface(" in source and "_attn_implementation" in source:
            return True
    return False


def computing_devices(modules: Iterable[nn.Module]) -> set[torch.device]:
    """Devices on which modules compute; offloaded weights are elsewhere until they are needed."""
    devices = set()
    for module in modules:
        hook = getattr(module, "_hf_hook", None)  # accelerate's, on the module or its children
        hooks = [hook, *(getattr(child, "_hf_hook", None) for child in module.modules())]
        named = [getattr(hook, "execution_device", None) for hook in hooks]
        where = next((device for device in named if device is not None), None)
        if where is None:
            devices |= {parameter.device for parameter in module.parameters()}
        else:
            devices.add(torch.device("cuda" if type(where) is int else where))
    return devices - {torch.device("meta")}


def text_config(root: PreTrainedModel) -> PreTrainedConfig:
    try:
        return root.config.get_text_config(decoder=True)
    except ValueError as error:
        raise ValueError(
            f"{type(root).__name__} holds several text models; patch the one you mean"
        ) from error


def text_configs(
    root: PreTrainedModel, modules: list[tuple[int, nn.Module]]
) -> list[PreTrainedConfig]:
    """Every config whose `_attn_implementation` the decoder or its mask code reads.

    The top-level config is one of them: some vision-language models build the decoder's mask from
    it. Their towers read sub-configs of their own, which stay untouched.
    """
    configs = [root.config, text_config(root), decoder_of(root).config]
    configs += [module.config for _, module in modules]
    return list({id(config): config for config in configs}.values())


def decoder_of(root: PreTrainedModel) -> PreTrainedModel:
    """The text decoder of a model; of a decoder, itself."""
    decoder = root.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else root
