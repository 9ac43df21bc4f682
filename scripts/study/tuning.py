"""The prompts that knobs are tuned on: q and k of all layers, captured once, planned on often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from sparse_patch_eval.ask import density
from sparse_patch_eval.ask.capture import Attention, capture
from sparse_patch_eval.ask.judge import plan_of
from sparse_patch_eval.base.options import choose_layers
from transformers import PreTrainedModel

from sparse_patch.specs import parse_method
from study.needles import NeedlePrompt


def tuning_layers(n_layers: int, prompts: Sequence[NeedlePrompt]) -> list[list[int]]:
    """Which layers each prompt is for: with more prompts a text, each takes a share of them.

    Every layer is measured on one prompt of every text, so more prompts even out what one happens
    to hold and cost no more plans.

    Raises:
        ValueError: the prompts are not the same number for every text.
    """
    texts = len({prompt.text for prompt in prompts})
    if len(prompts) % texts:
        raise ValueError(f"{len(prompts)} tuning prompts cannot take {texts} texts by turns")
    turns = min(len(prompts) // texts, n_layers)
    return [
        [n for n in range(n_layers) if n % turns == index // texts] for index in range(len(prompts))
    ]


def capture_layers(
    model: PreTrainedModel, prompts: Sequence[NeedlePrompt]
) -> Iterator[dict[int, Attention]]:
    """Prefill each prompt densely and give the layers it is for. Errors: see `tuning_layers`."""
    n_layers = len(choose_layers(model, slice(None)))
    for layers, prompt in zip(tuning_layers(n_layers, prompts), prompts, strict=True):
        yield capture(model, prompt.input_ids.to(model.device), layers).layers


@torch.inference_mode()
def mean_density(spec: str, captured: Sequence[dict[int, Attention]]) -> float:
    """Kept / causal of a method's plans, mean over what was captured; exact counts as 1."""
    method = parse_method(spec)
    plans = [plan_of(method, layer, one) for inside in captured for layer, one in inside.items()]
    return density.mean_density(None if plan is None else plan.density for plan in plans)
