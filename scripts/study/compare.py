"""One sparse prefill against the dense one of the same prompt: text, needles, attention.

A prompt (see `needles`) is prefilled once a method, question and answer prefix included. From that
one forward come

    text     KL(dense || sparse) and next-token NLL over the last positions of ordinary prose
    needle   eight numbers are continued teacher-forced from the KV cache, with exact attention, as
             decoding does: NLL of the right one, its margin over the best of the others (mean
             log-prob per token), and whether greedy decoding would write it
    density  what was kept, mean over all layers; a layer that ran exact counts as 1

and, from the q, k and v that dense layers were given, recall and relative output error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sparse_patch_eval.ask.answer import likelihood
from sparse_patch_eval.ask.capture import Attention, capture
from sparse_patch_eval.ask.density import exact_share, whole_density
from sparse_patch_eval.ask.judge import dense_output, judge, output_error, plan_of
from sparse_patch_eval.ask.kl import kl_rows
from sparse_patch_eval.ask.prefill import Prefill
from sparse_patch_eval.base.rows import Row
from sparse_patch_eval.inputs.text import encode
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

import sparse_patch
from sparse_patch import Method
from study.needles import NeedlePrompt


@dataclass(frozen=True, eq=False)
class Baseline:
    """The dense prefill of a prompt, which all methods are compared with.

    Attributes:
        logits: float32 `[scored, vocab]`, of the scored positions.
        layers: what a sample of layers was given, and
        outputs: what exact attention makes of it, `[heads, length, v_dim]`.
        row: the measurements.
    """

    logits: Tensor
    layers: Mapping[int, Attention]
    outputs: Mapping[int, Tensor]
    row: Row


def dense_baseline(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: NeedlePrompt,
    layers: list[int],
) -> Baseline:
    """Prefill a prompt densely, and capture `layers`."""
    ids = prompt.input_ids.to(model.device)
    start = time.perf_counter()
    seen = capture(model, ids, layers, logits_to_keep=ids.shape[1] - prompt.scored.start)
    seconds = time.perf_counter() - start
    logits = _scored(seen.logits, prompt)
    row = {
        "seconds": seconds,
        "density": 1.0,
        "exact": 1.0,
        "kl": 0.0,
        "nll": next_token_nll(logits, prompt),
        **score_needle(model, tokenizer, prompt, seen.logits[-1], seen.cache),
        "recall": 1.0,
        "error": 0.0,
    }
    outputs = {layer: dense_output(one) for layer, one in seen.layers.items()}
    return Baseline(logits, seen.layers, outputs, row)


@torch.inference_mode()
def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: NeedlePrompt,
    method: Method,
    dense: Baseline,
    *,
    rows: int,
) -> Row:
    """Prefill a prompt sparsely and measure what that changed.

    Args:
        rows: query rows per head and captured layer on which recall is measured, about.
    """
    ids = prompt.input_ids.to(model.device)
    with sparse_patch.patch(model, method, min_length=0) as handle:
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=ids.shape[1] - prompt.scored.start)
        seconds = time.perf_counter() - start
        report = handle.report()
    logits = _scored(out.logits[0].float(), prompt)
    needle = score_needle(model, tokenizer, prompt, out.logits[0, -1].float(), out.past_key_values)
    plans = {layer: plan_of(method, layer, one) for layer, one in dense.layers.items()}
    recalls = [judge(dense.layers[n], plan, rows=rows).recall for n, plan in plans.items()]
    errors = [output_error(dense.layers[n], plan, dense.outputs[n]) for n, plan in plans.items()]
    return {
        "seconds": seconds,
        "density": whole_density(report),
        "exact": exact_share(report),
        "kl": float(kl_rows(dense.logits, logits).mean()),
        "nll": next_token_nll(logits, prompt),
        **needle,
        "recall": float(torch.tensor(recalls).mean()),
        "error": sum(errors) / len(errors),
    }


def next_token_nll(logits: Tensor, prompt: NeedlePrompt) -> float:
    """Mean negative log-likelihood of the text, nats per token, given `[scored, vocab]` logits."""
    at = prompt.scored
    target = prompt.input_ids[0, at.start + 1 : at.stop + 1].to(logits.device)
    return float(torch.nn.functional.cross_entropy(logits, target))


def _scored(logits: Tensor, prompt: NeedlePrompt) -> Tensor:
    """Of the logits from the first scored position on, those of the scored ones."""
    return logits[: prompt.scored.stop - prompt.scored.start]


@torch.inference_mode()
def score_needle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: NeedlePrompt,
    first: Tensor,
    cache: Cache,
) -> Row:
    """Teacher-force the answer and the other numbers after a prefill.

    Args:
        first: logits `[vocab]` of the prompt's last position.
        cache: of the prompt; the same afterwards.
    """
    start = Prefill(math.nan, first[None], cache)
    scores = []
    for number in (prompt.answer, *prompt.others):
        ids = encode(tokenizer, f" {number}")
        log_prob, greedy = likelihood(model, start, ids)
        scores.append((log_prob / len(ids), greedy))
    (right, greedy), *others = scores
    margin = right - max(log_prob for log_prob, _ in others)
    return {"needle_nll": -right, "margin": margin, "right": greedy}
