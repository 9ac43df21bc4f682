"""Two real models, cut to their first layers: SmolLM2 (all layers full) and Gemma 3 (sliding, too).

They come from PyPI, once per machine, into the cache folder. Every test of this folder that takes
`real` gives the model back as it was, bit for bit: `given_back` looks.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from filelock import FileLock
from sparse_patch_eval.base.fetch import cache_folder
from sparse_patch_eval.inputs import models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import sparse_patch
from tests.test_matrix import snapshot

LAYERS = 6  # of Gemma's, the last is the first full one
FULL = {"smollm2": LAYERS, "gemma3-270m": 1}
"""Layers that can run sparse on a prompt longer than Gemma's window of 512."""
PROBE = 200  # tokens on which a model is compared with what it was

SPARSE = {
    "flexprefill": {"block_size": 32, "min_budget": 32, "gamma": 0.8},
    "strided": {"block_size": 32, "gamma": 0.8, "stride": 4},
    "hip": {"mask_k": 128, "block_q": 32, "block_k": 8, "sink": 16, "window": 64},
}
"""A method per way to choose, sparse on a few hundred tokens; `hip` decodes sparsely, too."""
DENSE = {"dense": {"block_size": 32}}


@dataclass
class Real:
    """A model and what a test needs of it."""

    name: str
    model: Any
    text: torch.Tensor
    reference: torch.Tensor
    before: Any

    def ids(self, length: int, start: int = 0) -> torch.Tensor:
        """int64 `[1, length]`: tokens of real text."""
        return self.text[None, start : start + length]

    def patch(self, method: str, **options: Any) -> sparse_patch.Patch:
        options = {"min_length": 0, "min_queries": 32, "dense_layers": 0, **options}
        return sparse_patch.patch(self.model, method, **(SPARSE | DENSE)[method], **options)

    def is_as_loaded(self, model: Any) -> bool:
        """Does `model`, which may be a copy, compute what this one did at first, bit for bit?"""
        return torch.equal(states(model, self.ids(PROBE)), self.reference)

    @property
    def full_layers(self) -> int:
        return FULL[self.name]


@torch.no_grad()
def states(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """`[batch, seq, hidden]`: what the output layer gets; its vocabulary takes most of the time."""
    found: torch.Tensor = model.get_decoder()(input_ids=ids, **inputs).last_hidden_state
    return found


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Equal up to `tolerance` of the largest value."""
    difference = float((got - want).abs().max())
    assert difference <= tolerance * float(want.abs().max()), difference


@functools.cache
def folder_of(name: str) -> str:
    with FileLock(cache_folder() / f".{name}.lock"):  # one worker converts, the others wait
        with warnings.catch_warnings():  # what others' converters warn of is not tested here
            warnings.simplefilter("ignore")
            return str(models.packaged(name))


@functools.cache
def load(name: str, layers: int | None = LAYERS) -> Any:
    """The model, its first `layers` only; None: all."""
    config = AutoConfig.from_pretrained(folder_of(name))
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    model = AutoModelForCausalLM.from_pretrained(folder_of(name), config=config).eval()
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def text_of(name: str) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder_of(name))
    return tokenizer(inspect.getsource(argparse)[:12_000], return_tensors="pt").input_ids[0]


@functools.cache
def as_loaded(name: str, layers: int | None = LAYERS) -> Real:
    model, text = load(name, layers), text_of(name)
    return Real(name, model, text, states(model, text[None, :PROBE]), snapshot(model))


@contextlib.contextmanager
def given_back(real: Real):
    """The model of a test; afterwards it is usable, and `unpatch` makes it what it was."""
    yield real
    sparse_patch.unpatch(real.model)
    for name in ("_cache", "_previous_max_cache_length"):  # Transformers keeps a static cache there
        real.model.__dict__.pop(name, None)
    assert snapshot(real.model) == real.before
    assert real.is_as_loaded(real.model)


def part_of(real: Real, layers: int) -> Any:
    """A copy of a model's first layers, the embedding shared with it."""
    model = real.model
    shared = {
        id(p): p for p in (*model.get_decoder().embed_tokens.parameters(), model.lm_head.weight)
    }
    kept = model.get_decoder().layers
    model.get_decoder().layers = kept[:layers]
    try:
        found = copy.deepcopy(model, shared)
    finally:
        model.get_decoder().layers = kept
    found.config.num_hidden_layers = layers
    if getattr(found.config, "layer_types", None):
        found.config.layer_types = found.config.layer_types[:layers]
    return found
