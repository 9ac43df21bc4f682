"""One prefill of a prompt, and everything that is asked of it.

A benchmark wants to know of a prompt what the model writes, and how likely it finds some answers.
Both come from one prefill here, patched or not: generation and answers go on from its KV cache, as
a user's decoding does. So the question, and the words that lead to the answer, are inside the
sparse prefill, which is where a method can lose them; the tokens of the answer are not prefill.
They attend exactly, but for methods with a sparse decode, whose generated tokens use it.
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

# Tokens of an answer that are scored in one forward: less than `min_queries` of a patch, so that
# they attend exactly.
_FEW = 32


@dataclass(frozen=True)
class Generation:
    """Greedy decoding that is asked for.

    Attributes:
        max_tokens: decode at most so many.
        until: stop before the first of these texts.
    """

    max_tokens: int
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What came out of one prefill.

    Attributes:
        tokens: of the prompt.
        texts: one for each generation asked for.
        scores: for each continuation asked for, its log-probability, nats, and whether greedy
            decoding would have written it.
        tail: float32 `[tail, vocab]`, logits of the prompt's last tokens.
        prefill_seconds: time-to-first-token.
        density: kept / causal, mean over the sparse calls; None if no call ran sparse.
        sparse_calls: calls of the prefill that ran sparse, one a layer at most.
        recall: attention mass kept; None if it was not asked for, or nothing ran sparse.
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
    """Prefill a prompt, with `method` or as the model is, and go on from it.

    Args:
        input_ids: the prompt's tokens.
        patch_options: for `sparse_patch.patch`, beside the method.
        continuations: tokens whose likelihood after the prompt is wanted.
        tail: of how many last tokens of the prompt the logits are wanted.
        recall_rows: measure recall on about so many query rows a layer, in a second prefill, so
            that it is not in the time of the first.

    Raises:
        ValueError: an empty prompt or continuation, or what `sparse_patch.patch` raises.
    """
    if not len(input_ids) or not all(map(len, continuations)):
        raise ValueError("a prompt and a continuation need at least one token")
    ids = torch.tensor([list(input_ids)], device=model.device)
    with patched(model, method, patch_options) as handle:
        start = prefill(model, ids, kept=tail)
        report = None if handle is None else handle.report()
        scores = tuple(likelihood(model, start, one) for one in continuations)
        texts = tuple(generate(model, tokenizer, start, one) for one in generations)
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

    The prefill can be gone on from again afterwards.
    """
    wanted = torch.tensor(list(continuation), device=start.logits.device)
    parts = [start.logits[None]]
    with borrowed(start.cache) as cache:
        for n in range(0, len(wanted) - 1, _FEW):
            tokens = wanted[n : min(n + _FEW, len(wanted) - 1)]
            out = model(tokens[None], past_key_values=cache, use_cache=True)
            parts.append(out.logits[0].float())
    logits = torch.cat(parts)
    log_probs = logits.log_softmax(-1).gather(1, wanted[:, None])
    return float(log_probs.sum()), bool((logits.argmax(-1) == wanted).all())


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: Prefill, wanted: Generation
) -> str:
    """Decode greedily after a prefill, up to a stop text or the end of the answer.

    The prefill can be gone on from again afterwards.
    """
    stops = end_tokens(model, tokenizer)
    tokens: list[int] = []
    text = ""
    logits = start.logits
    with borrowed(start.cache) as cache:
        while len(tokens) < wanted.max_tokens:
            token = int(logits.argmax())
            if token in stops:
                break
            tokens.append(token)
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if any(stop in text for stop in wanted.until):
                break
            if len(tokens) < wanted.max_tokens:
                step = torch.tensor([[token]], device=logits.device)
                out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                logits = out.logits[0, -1].float()
    return cut(text, wanted.until)


def cut(text: str, until: Sequence[str]) -> str:
    """What stands before the first of the stop texts."""
    for stop in until:
        text = text.split(stop, 1)[0]
    return text


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer, by the model's generation settings and the tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    found = configured if isinstance(configured, list) else [configured]
    return {int(one) for one in (*found, tokenizer.eos_token_id) if one is not None}


@contextlib.contextmanager
def borrowed(cache: Cache) -> Iterator[Cache]:
    """A cache to go on from; the one given is afterwards what it was."""
    if not _can_crop(cache):
        yield copy.deepcopy(cache)
        return
    before = cache.get_seq_length()
    try:
        yield cache
    finally:
        if more := cache.get_seq_length() - before:
            cache.crop(-more)


def _can_crop(cache: Cache) -> bool:
    """Sliding windows and recurrent states forget what they have seen."""
    if not isinstance(cache, DynamicCache):
        return False
    kinds = {type(layer).__name__ for layer in cache.layers}
    return kinds <= {"DynamicLayer"}
