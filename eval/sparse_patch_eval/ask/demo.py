"""`sparse-patch demo`: a real model prefills a long prompt, dense and sparse, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import sparse_patch
from sparse_patch import Method
from sparse_patch_eval.ask.kl import kl_divergence
from sparse_patch_eval.ask.prefill import Prefill, decode, prefill
from sparse_patch_eval.inputs.text import Prompt

# Enough for a seven-digit number, a full stop and a few leading tokens.
ANSWER_TOKENS = 12
# Query rows per layer on which recall is measured: all of them would cost a dense prefill.
RECALL_ROWS = 512
STEPS_PER_LENGTH = 3


@dataclass(frozen=True)
class DemoRow:
    """One prompt length.

    Attributes:
        tokens: prompt length.
        dense_seconds, sparse_seconds: time-to-first-token.
        speed_up: dense / sparse.
        density: kept / causal over sparse calls; None if all calls were exact.
        recall: attention mass kept, on a sample of query rows; None if all calls were exact.
        kl: KL(dense || sparse) of the next-token distributions, nats.
        answer, dense_answer: text of the model, sparse and dense.
        same_answer: are both the same tokens?
        expected: the number hidden in the prompt.
        dense_right, right: does the answer start with the number?
        exact_calls: exact calls by reason, in the timed sparse prefill.
    """

    tokens: int
    dense_seconds: float
    sparse_seconds: float
    speed_up: float
    density: float | None
    recall: float | None
    kl: float
    answer: str
    dense_answer: str
    same_answer: bool
    expected: str
    dense_right: bool
    right: bool
    exact_calls: dict[str, int]


def run_length(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    prompt: Prompt,
    step: Callable[[str], None],
) -> DemoRow:
    """Prefill one prompt dense, sparse, and sparse once more with recall measured (untimed).

    Args:
        step: called with a description before each of the STEPS_PER_LENGTH prefills.
    """
    ids = prompt.input_ids.to(model.device)
    length = ids.shape[1]
    step(f"{length} tokens, dense")
    dense = prefill(model, ids)
    dense_tokens = decode(model, dense, ANSWER_TOKENS)
    step(f"{length} tokens, sparse")
    with sparse_patch.patch(model, method) as handle:
        sparse = prefill(model, ids)
        report = handle.report()
        tokens = decode(model, sparse, ANSWER_TOKENS)
    step(f"{length} tokens, recall (untimed)")
    with sparse_patch.patch(model, method, measure_recall=RECALL_ROWS) as measured:
        prefill(model, ids)
    answers = [_first_line(tokenizer.decode(t)) for t in (dense_tokens, tokens)]
    return _row(prompt, dense, sparse, answers, tokens == dense_tokens, report, measured.report())


def warm_up(model: PreTrainedModel, method: Method, tokenizer: PreTrainedTokenizerBase) -> None:
    """A short prefill each way: first calls allocate memory and pick kernels."""
    ids = tokenizer("word " * 600, return_tensors="pt")["input_ids"].to(model.device)
    prefill(model, ids)
    with sparse_patch.patch(model, method, min_length=0):
        prefill(model, ids)


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].strip()


def _row(
    prompt: Prompt,
    dense: Prefill,
    sparse: Prefill,
    answers: list[str],
    same: bool,
    report: sparse_patch.Report,
    measured: sparse_patch.Report,
) -> DemoRow:
    return DemoRow(
        tokens=prompt.input_ids.shape[1],
        dense_seconds=dense.seconds,
        sparse_seconds=sparse.seconds,
        speed_up=dense.seconds / sparse.seconds,
        density=report.density,
        recall=measured.recall,
        kl=kl_divergence(dense.logits, sparse.logits),
        answer=answers[1],
        dense_answer=answers[0],
        same_answer=same,
        expected=prompt.answer,
        dense_right=answers[0].startswith(prompt.answer),
        right=answers[1].startswith(prompt.answer),
        exact_calls=report.exact,
    )
