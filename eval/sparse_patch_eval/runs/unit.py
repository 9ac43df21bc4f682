"""The parts of an evaluation: a unit is one task at one length, a question one prompt of it.

A unit lists its questions, asks a model one of them (once per method) and scores the answers.
`lm_unit.LmUnit` is a task of lm-eval, ours or another's; `text_unit.TextUnit` measures perplexity.
Answers are plain JSON, so they can be logged at once and scored later.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sparse_patch import Method
from sparse_patch_eval.ask.answer import Answer
from sparse_patch_eval.base.rows import Row

# Query rows per layer on which recall is measured.
RECALL_ROWS = 256


@dataclass(frozen=True)
class Question:
    """One prompt, and the requests about it.

    Attributes:
        doc_id: its number in the task.
        prompt_hash: of prompt and requests, so that answers to another prompt never count.
        content: the unit's own data for asking.
        depth: position of the needle, 0 to 1, in tasks that have one.
    """

    doc_id: int
    prompt_hash: str
    content: Any = field(repr=False, compare=False)
    depth: float | None = None


@dataclass(frozen=True)
class How:
    """How a question is prefilled.

    Attributes:
        method: None for the model as it is.
        patch_options: for `sparse_patch.patch`.
        measure_recall: also measure recall, by a second prefill?
    """

    method: Method | None
    patch_options: dict[str, Any]
    measure_recall: bool = False


@dataclass(frozen=True)
class Scored:
    """Samples of a unit, scored.

    Attributes:
        rows: by doc_id: `scores` (the primary one first), `answer` and `target`.
        higher_is_better: by score.
        official: lm-eval's own result for the unit; None where lm-eval is not used.
    """

    rows: dict[int, Row]
    higher_is_better: dict[str, bool]
    official: dict[str, Any] | None = None


class Unit(Protocol):
    """One task at one length."""

    @property
    def benchmark(self) -> str:
        """The benchmark that the task belongs to."""

    @property
    def task(self) -> str:
        """The task's name."""

    @property
    def length(self) -> int | None:
        """Prompt length, tokens; None for a task without lengths."""

    def questions(self) -> Sequence[Question]:
        """All questions; the first ones stay the same when there are more."""

    def ask(self, question: Question, how: How) -> Row:
        """The model's answer, and the fields of `measured`: JSON-ready."""

    def score(self, answered: Mapping[int, Row]) -> Scored:
        """Score the answers, given by doc_id."""


def measured(answers: Sequence[Answer], how: How, truncated: int = 0) -> Row:
    """Density, recall and time of the prefills behind a row.

    Args:
        truncated: prompt tokens that were left out because they did not fit.
    """
    exact: Counter[str] = Counter()
    for answer in answers:
        exact.update(answer.exact)
    sparse_calls = sum(answer.sparse_calls for answer in answers)
    kept = sum(answer.sparse_calls * (answer.density or 0.0) for answer in answers)
    recalls = [answer.recall for answer in answers if answer.recall is not None]
    row: Row = {
        "tokens": sum(answer.tokens for answer in answers),
        "truncated": truncated,
        "density": kept / sparse_calls if sparse_calls else None,
        "sparse_calls": sparse_calls,
        "recall": sum(recalls) / len(recalls) if recalls else None,
        "exact": dict(exact),
        "prefill_seconds": sum(answer.prefill_seconds for answer in answers),
    }
    if how.method is None:
        row |= {"density": 1.0, "sparse_calls": None}
    return row


def hash_of(content: Any) -> str:
    """A short hash of JSON-like content."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
