"""Time-to-first-token of a model shaped like Llama 3.1 8B, with random weights: dense and sparse.

Random weights alone would spread attention evenly, where nothing can be left out. So queries and
keys get biases that RoPE turns into logits which fall with the distance, by head more or less (see
`inputs.STRENGTHS`). What the methods keep of that is arbitrary still: densities stand beside times.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from sparse_patch_eval.ask.prefill import prefill
from sparse_patch_eval.base.rows import Row
from transformers import AutoModelForCausalLM, LlamaConfig

import sparse_patch
from gpu_checks import inputs
from gpu_checks.scale import Scale
from gpu_checks.stage import LONGEST, Stage, Work

# Dense as the model does it, with the implementation that SDPA chooses; and with FlashAttention,
# which the papers compare with.
DENSE, FLASH = "dense", "dense, FlashAttention"
METHODS = ("strided", "flexprefill", "proxyattn", "pbs")
_MOST_ROUNDS = 3


def items(stage: Stage) -> list[tuple[str, Work]]:
    """Every length, on one model."""
    runs = _Runs(stage)
    listed = [(f"{n:,} tokens", partial(runs.measure, n)) for n in stage.scale.prefills]
    return [("build and warm up", runs.warm_up), *listed]


def build(scale: Scale, device: torch.device) -> Any:
    """The model, made where it runs: no weight ever lies in the host's memory."""
    config = LlamaConfig(
        vocab_size=scale.vocabulary,
        hidden_size=scale.hidden,
        intermediate_size=scale.intermediate,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.kv_heads,
        head_dim=scale.dim,
        max_position_embeddings=max(scale.prefills),
        rope_parameters={"rope_type": "default", "rope_theta": inputs.ROPE_BASE},
        attention_bias=True,
        initializer_range=scale.hidden**-0.5,  # noise of standard deviation 1 in q and k
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=scale.dtype, attn_implementation="sdpa"
        )
    # Position 0 of the line in `inputs`; RoPE turns it to where it belongs.
    line = torch.zeros(scale.dim, device=device)
    line[: scale.dim // 2] = 1
    strength = torch.linspace(*inputs.STRENGTHS, scale.heads, device=device)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.copy_((strength[:, None] * line).flatten())
            layer.self_attn.k_proj.bias.copy_(line.repeat(scale.kv_heads))
    return model.eval()


class _Runs:
    """Prefills of one model."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.methods = {
            name: sparse_patch.get_method(name, **stage.scale.methods[name]) for name in METHODS
        }
        # The longest prompt so far, and the seconds that a round of it took.
        self.known = (1, 0.0)

    @cached_property
    def model(self) -> Any:
        return build(self.stage.scale, self.stage.device.torch)

    def warm_up(self) -> Iterable[Row]:
        """Build, and run everything once: kernels are compiled and tuned here."""
        scale = self.stage.scale
        parameters = sum(p.numel() for p in self.model.parameters())
        yield {"kind": "model", "layers": scale.layers, "parameters": parameters}
        for name in (DENSE, FLASH, *METHODS):
            self.run(name, scale.prefills[0], seed=0)

    def measure(self, n: int) -> Iterable[Row]:
        """A row per method, over rounds in which they take turns."""
        variants = [DENSE, FLASH, *METHODS]
        known, seconds = self.known
        self.stage.need(seconds * (n / known) ** 2)
        taken: dict[str, list[Row]] = {name: [] for name in variants}
        for turn in range(min(_MOST_ROUNDS, self.stage.scale.rounds)):
            shift = turn % len(variants)
            for name in variants[shift:] + variants[:shift]:
                taken[name].append(self.run(name, n, seed=turn))
            spent = sum(runs[-1]["seconds"] for runs in taken.values())
            # Half of the time left is for what comes after; and one item must not seem to hang.
            if 2 * spent > self.stage.seconds_left or (turn + 2) * spent > LONGEST / 2:
                break
        self.known = max(self.known, (n, spent))
        medians = {
            name: statistics.median(run["seconds"] for run in runs) for name, runs in taken.items()
        }
        for name, runs in taken.items():
            seconds = medians[name]
            yield {
                "kind": "prefill",
                "tokens": n,
                "method": name,
                "rounds": len(runs),
                "seconds": seconds,
                "all_seconds": [run["seconds"] for run in runs],
                "seconds_per_layer": seconds / self.stage.scale.layers,
                "seconds_32_layers_estimated": seconds / self.stage.scale.layers * 32,
                "speed_up": medians[DENSE] / seconds,
                "speed_up_over_flash": medians[FLASH] / seconds,
                "density": runs[-1]["density"],
                "exact_calls": runs[-1]["exact"],
                "peak_gib": max(run["peak"] for run in runs) / 2**30,
            }

    def run(self, name: str, n: int, seed: int) -> Row:
        """One prefill."""
        device = self.stage.device
        ids = torch.randint(
            self.stage.scale.vocabulary,
            (1, n),
            generator=device.generator(seed),
            device=device.torch,
        )
        device.forget_peak()
        if name in (DENSE, FLASH):
            with device.sdpa("flash") if name == FLASH else nullcontext():
                seconds = prefill(self.model, ids).seconds
            return {"seconds": seconds, "density": None, "exact": {}, "peak": device.peak_bytes()}
        with sparse_patch.patch(
            self.model, self.methods[name], min_length=0, backend="triton"
        ) as handle:
            seconds = prefill(self.model, ids).seconds
            report = handle.report()
        return {
            "seconds": seconds,
            "density": report.density,
            "exact": report.exact,
            "peak": device.peak_bytes(),
        }
