"""A real model prefills a long prompt, dense and with a few methods, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import sparse_patch
from sparse_patch_eval.ask.kl import kl_divergence
from sparse_patch_eval.ask.prefill import Prefill, decode, prefill
from sparse_patch_eval.inputs.text import Prompt

# Enough for a seven-digit number, a full stop and a few leading tokens.
ANSWER_TOKENS = 12
# Query rows per layer on which recall is measured: all of them would cost a dense prefill.
RECALL_ROWS = 512
# Steps per length beside those of each method: the dense prefill.
DENSE_STEPS = 1
STEPS_PER_METHOD = 2


@dataclass(frozen=True)
class DemoRow:
    """One method at one prompt length.

    Attributes:
        tokens: prompt length.
        method: as it was named.
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
        computed: share of the causal attention that was computed, exact calls counted as 1.
    """

    tokens: int
    method: str
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
    computed: float


def run_length(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    patches: Mapping[str, Mapping[str, Any]],
    prompt: Prompt,
    step: Callable[[str], None],
) -> list[DemoRow]:
    """Prefill one prompt dense, then with each method, and once more with its recall measured.

    Args:
        patches: by the name to show, the arguments of `sparse_patch.patch`.
        step: called with a description before each prefill: DENSE_STEPS times, and STEPS_PER_METHOD
            times per method.
    """
    ids = prompt.input_ids.to(model.device)
    length = ids.shape[1]
    step(f"{length:,} tokens, dense")
    dense = prefill(model, ids)
    dense_tokens = decode(model, dense, ANSWER_TOKENS)
    rows = []
    for name, arguments in patches.items():
        step(f"{length:,} tokens, {name}")
        with sparse_patch.patch(model, **arguments) as handle:
            sparse = prefill(model, ids)
            report = handle.report()
            tokens = decode(model, sparse, ANSWER_TOKENS)
        step(f"{length:,} tokens, recall of {name} (untimed)")
        with sparse_patch.patch(model, **arguments, measure_recall=RECALL_ROWS) as measured:
            prefill(model, ids)
        answers = [_first_line(tokenizer.decode(t)) for t in (dense_tokens, tokens)]
        same = tokens == dense_tokens
        rows.append(_row(name, prompt, dense, sparse, answers, same, report, measured.report()))
    return rows


def warm_up(
    model: PreTrainedModel, patches: Mapping[str, Mapping[str, Any]], prompt: Prompt
) -> None:
    """Run everything once that is timed, and throw it away.

    First calls allocate memory, pick kernels, compile and measure costs. The prompt must be one of
    those that are timed: on a much shorter one, methods keep everything and compile nothing.
    """
    ids = prompt.input_ids.to(model.device)
    prefill(model, ids)
    for arguments in patches.values():
        sparse_patch.patch(model, **arguments).remove()  # measures costs, where they decide
        with sparse_patch.patch(model, **{**arguments, "min_length": 0}):
            prefill(model, ids)


def verdict(rows: Sequence[DemoRow]) -> str:
    """One sentence about the longest prompt of the first method that is shown."""
    row = max((row for row in rows if row.method == rows[0].method), key=lambda row: row.tokens)
    gain = row.speed_up
    speed = f"{gain:.1f} times faster" if gain >= 1.05 else f"no faster ({gain:.2f}x)"
    answer = "same answer" if row.same_answer else "another answer"
    return f"{row.tokens:,} tokens: {speed}, {answer}, {row.computed:.0%} of attention computed"


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].strip()


def _row(
    name: str,
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
        method=name,
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
        computed=_computed(report),
    )


def _computed(report: sparse_patch.Report) -> float:
    sparse = report.sparse_calls * (report.density or 0.0)
    return (sparse + report.calls - report.sparse_calls) / report.calls
