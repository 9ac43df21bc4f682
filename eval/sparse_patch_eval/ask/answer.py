"""One prefill of a prompt, and all answers after it.

A benchmark asks what the model writes after a prompt, and how likely some answers are. Both come
from one prefill here, patched or not, and continue from its KV cache, as a user's decoding does. So
the question, and the words that lead to the answer, are inside the sparse prefill, where a method
can lose them; the tokens of the answer are not prefill. They attend exactly, except that generated
tokens use a method's sparse decode if it has one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import sparse_patch
from sparse_patch import Method
from sparse_patch_eval.ask.prefill import Prefill, prefill

__all__ = ["Answer", "Generation", "answer", "likelihood"]

# Tokens of an answer scored in one forward: below a patch's `min_queries`, so they attend exactly.
_SCORED_TOGETHER = 32


@dataclass(frozen=True)
class Generation:
    """A request for greedy decoding.

    Attributes:
        max_tokens: maximum number of tokens.
        until: stop before the first of these texts.
    """

    max_tokens: int
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """Results of one prefill.

    Attributes:
        tokens: length of the prompt.
        texts: one per requested generation.
        scores: for each requested continuation, its log-probability, nats, and whether greedy
            decoding would have written it.
        tail: float32 `[tail, vocab]`, logits of the prompt's last tokens.
        prefill_seconds: time-to-first-token.
        density: kept / causal, mean over the sparse calls; None if no call ran sparse.
        sparse_calls: calls of the prefill that ran sparse, at most one per layer.
        recall: attention mass kept; None if it was not requested, or nothing ran sparse.
        exact: exact calls of the prefill by reason; empty without a method.
    """

    tokens: int
    texts: tuple[str, ...]
    scores: tuple[tuple[float, bool], ...]
    tail: Tensor = field(repr=False, compare=False)
    prefill_seconds: float
    density: float | None
    sparse_calls: int
    recall: float | None
    exact: dict[str, int]


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Sequence[int],
    *,
    method: Method | None = None,
    patch_options: dict[str, Any] | None = None,
    generations: Sequence[Generation] = (),
    continuations: Sequence[Sequence[int]] = (),
    tail: int = 1,
    recall_rows: int = 0,
) -> Answer:
    """Prefill a prompt, with `method` or with the model as it is, and continue from it.

    Args:
        input_ids: the prompt's tokens.
        patch_options: for `sparse_patch.patch`, besides the method.
        continuations: tokens whose likelihood after the prompt to compute.
        tail: number of last prompt tokens whose logits to return.
        recall_rows: about this many query rows per layer on which to measure recall, in a second
            prefill, which is not timed.

    Raises:
        ValueError: the prompt or a continuation is empty, or `sparse_patch.patch` raises it.
    """
    if not len(input_ids) or not all(map(len, continuations)):
        raise ValueError("a prompt and a continuation need at least one token")
    ids = torch.tensor([list(input_ids)], device=model.device)
    with patched(model, method, patch_options) as handle:
        start = prefill(model, ids, kept=tail)
        report = None if handle is None else handle.report()
        scores = tuple(likelihood(model, start, tokens) for tokens in continuations)
        texts = tuple(generate(model, tokenizer, start, request) for request in generations)
    recall = None
    if recall_rows and method is not None:
        options = {**(patch_options or {}), "measure_recall": recall_rows}
        with sparse_patch.patch(model, method, **options) as measuring:
            prefill(model, ids)
            recall = measuring.report().recall
    return Answer(
        tokens=ids.shape[1],
        texts=texts,
        scores=scores,
        tail=start.tail,
        prefill_seconds=start.seconds,
        density=None if report is None else report.density,
        sparse_calls=0 if report is None else report.sparse_calls,
        recall=recall,
        exact={} if report is None else report.exact,
    )


def patched(
    model: PreTrainedModel, method: Method | None, options: dict[str, Any] | None
) -> contextlib.AbstractContextManager[sparse_patch.Patch | None]:
    """The model with `method` on, or as it is."""
    if method is None:
        return contextlib.nullcontext()
    return sparse_patch.patch(model, method, **(options or {}))


@torch.inference_mode()
def likelihood(
    model: PreTrainedModel, start: Prefill, continuation: Sequence[int]
) -> tuple[float, bool]:
    """Log-probability, nats, of some tokens after a prefill, and whether they are the greedy ones.

    The prefill can be continued again afterwards.
    """
    target = torch.tensor(list(continuation), device=start.logits.device)
    parts = [start.logits[None]]
    with borrowed(start.cache) as cache:
        for n in range(0, len(target) - 1, _SCORED_TOGETHER):
            tokens = target[n : min(n + _SCORED_TOGETHER, len(target) - 1)]
            out = model(tokens[None], past_key_values=cache, use_cache=True)
            parts.append(out.logits[0].float())
    logits = torch.cat(parts)
    log_probs = logits.log_softmax(-1).gather(1, target[:, None])
    return float(log_probs.sum()), bool((logits.argmax(-1) == target).all())


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: Prefill, request: Generation
) -> str:
    """Decode greedily after a prefill, up to a stop text or the end of the answer.

    The prefill can be continued again afterwards.
    """
    stops = end_tokens(model, tokenizer)
    tokens: list[int] = []
    text = ""
    logits = start.logits
    with borrowed(start.cache) as cache:
        while len(tokens) < request.max_tokens:
            token = int(logits.argmax())
            if token in stops:
                break
            tokens.append(token)
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if any(stop in text for stop in request.until):
                break
            if len(tokens) < request.max_tokens:
                step = torch.tensor([[token]], device=logits.device)
                out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                logits = out.logits[0, -1].float()
    return cut(text, request.until)


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    for stop in until:
        text = text.split(stop, 1)[0]
    return text


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer, by the model's generation settings and the tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}


@contextlib.contextmanager
def borrowed(cache: Cache) -> Iterator[Cache]:
    """A cache to continue from; `cache` itself is unchanged afterwards."""
    if not _can_crop(cache):
        yield copy.deepcopy(cache)
        return
    before = cache.get_seq_length()
    try:
        yield cache
    finally:
        if added := cache.get_seq_length() - before:
            cache.crop(-added)


def _can_crop(cache: Cache) -> bool:
    """Can the cache be cut back? Sliding windows and recurrent states cannot."""
    if not isinstance(cache, DynamicCache):
        return False
    kinds = {type(layer).__name__ for layer in cache.layers}
    return kinds <= {"DynamicLayer"}
