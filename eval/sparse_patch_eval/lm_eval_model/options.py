"""Arguments of the lm-eval model that come as text, numbers or Python values, in one form."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_patch import Method, get_method
from sparse_patch.specs import split_method
from sparse_patch_eval.base.options import choose_layers, parse_layers
from sparse_patch_eval.inputs import models

_SEMICOLON = re.compile(r"(?<!\\);")
CONTINUATIONS = ("decode", "prefill")
# What only HFLM's own loading understands, which does not read a .gguf file as we do.
_LOADING = (
    "parallelize",
    "tp_plan",
    "device_map",
    "peft",
    "delta",
    "autogptq",
    "gptqmodel",
    "gguf_file",
    "quantization_config",
    "subfolder",
    "load_in_8bit",
    "load_in_4bit",
)


def read_method(
    method: str | Mapping[str, Any] | Method, method_args: Mapping[str, Any] | None = None
) -> tuple[str, Method | None]:
    """The method's name with its parameters, as text, and the method; None for "dense".

    Args:
        method: see `SparsePatchLM`.
        method_args: further parameters.

    Raises:
        ValueError: the form is wrong, or the method or a parameter does not exist.
    """
    if method_args is not None and not isinstance(method_args, Mapping):
        raise ValueError(f"method_args={method_args!r} must map parameters to values")
    more = dict(method_args or {})
    if isinstance(method, str):
        name, params = split_method(_SEMICOLON.sub(",", method).replace("\\;", ";"))
    elif isinstance(method, Mapping):
        params = dict(method)
        name = params.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(f"method={method!r} lacks the method's name, under 'name'")
    elif callable(getattr(method, "plan", None)):
        if more:
            raise ValueError("method_args goes with a method's name; an object has its parameters")
        return repr(method), method
    else:
        raise ValueError(f"method={method!r} must be NAME:key=value, a mapping or a method object")
    if twice := sorted(params.keys() & more.keys()):
        raise ValueError(f"method_args: {', '.join(twice)} is given in method already")
    params |= more
    if name == "dense" and not params:
        return "dense", None
    spec = ",".join(f"{key}={value}" for key, value in params.items())
    return f"{name}:{spec}" if spec else name, get_method(name, **params)


def parameters(method: Any) -> dict[str, Any]:
    """All parameters of a method, JSON-ready; of one that is no dataclass, its text."""
    if not dataclasses.is_dataclass(method) or isinstance(method, type):
        return {"repr": repr(method)}
    return dataclasses.asdict(method)


@dataclass(frozen=True)
class PatchOptions:
    """What `sparse_patch.patch` takes beside the method; None is its own default."""

    layers: Any = None
    dense_layers: Any = None
    min_length: int | None = None
    min_queries: int | None = None
    backend: str | None = None
    measure_recall: bool | int | None = None

    @classmethod
    def read(
        cls,
        layers: Any,
        dense_layers: Any,
        min_length: Any,
        min_queries: Any,
        backend: Any,
        measure_recall: Any,
    ) -> PatchOptions:
        """Check what needs no model.

        Raises:
            ValueError: a value that no model would make right.
        """
        if isinstance(dense_layers, str):  # a number of layers comes as a number
            dense_layers = _layers("dense_layers", dense_layers)
        numbers = {
            "min_length": min_length,
            "min_queries": min_queries,
            "measure_recall": measure_recall,
        }
        for name, value in numbers.items():
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{name}={value!r} must be a whole number from 0")
        return cls(
            _layers("patch_layers", layers),
            dense_layers,
            min_length,
            min_queries,
            backend,
            measure_recall,
        )

    def of(self, model: nn.Module) -> dict[str, Any]:
        """The keyword arguments of `sparse_patch.patch` for a model."""
        options = {key: value for key, value in vars(self).items() if value is not None}
        for name in ("layers", "dense_layers"):
            if isinstance(options.get(name), slice):
                options[name] = choose_layers(model, options[name])
        return options

    def given(self) -> dict[str, Any]:
        """What was given, JSON-ready."""
        return {
            key: str(value) if isinstance(value, slice) else value
            for key, value in vars(self).items()
            if value is not None
        }


def _layers(name: str, given: Any) -> slice | tuple[int, ...] | None:
    """Layers as indices or a slice.

    Raises:
        ValueError: neither.
    """
    if given is None or isinstance(given, slice):
        return given
    if isinstance(given, int):
        return (given,)
    try:
        if isinstance(given, str):
            return parse_layers(given.replace(";", ","))
        if isinstance(given, Iterable):
            return tuple(int(layer) for layer in given)
    except (TypeError, ValueError):
        pass  # the one message below serves all forms
    raise ValueError(f"{name}={given!r} must be layers, as in 0;5;-1, or a slice, as in ::3")


def choose_device(device: str | None) -> str:
    """Where to, if not said; lm-eval says "cuda:0" when its user says nothing."""
    if torch.cuda.is_available() or (device is not None and not device.startswith("cuda")):
        return device or "cuda"
    return "cpu"


def source_of(
    pretrained: str | PreTrainedModel, device: str, options: dict[str, Any]
) -> tuple[str | PreTrainedModel, dict[str, Any]]:
    """What HFLM can load, for what our command line takes as a model.

    Raises:
        ValueError: an option that a .gguf file does not go with, or a folder whose index names
            weights elsewhere.
    """
    alias = models.packaged(pretrained) if isinstance(pretrained, str) else None
    if alias is not None:
        return str(alias), options
    if not isinstance(pretrained, str) or not pretrained.lower().endswith(".gguf"):
        if isinstance(pretrained, str):
            models.check_shards(Path(pretrained))
        return pretrained, options
    if refused := [name for name in _LOADING if options.get(name)]:
        raise ValueError(
            f"{', '.join(refused)}: not with pretrained={pretrained!r}; save the model that "
            "sparse_patch_eval.inputs.models.load reads from it, and give that folder"
        )
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    dtype = options.pop("dtype", "auto")
    model, tokenizer = models.load(
        pretrained, dtype="float32" if dtype == "auto" else dtype, device=device
    )
    return model, {"tokenizer": tokenizer, **options}
