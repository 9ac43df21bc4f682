"""What an evaluation is cut into: a unit is one task at one length, a question one prompt of it.

A unit knows its questions, asks a model one of them (once a method) and scores what was said.
`lm_unit.LmUnit` is a task of lm-eval, ours or another's; `text_unit.TextUnit` measures perplexity.
Answers are plain JSON, so that they can be logged at once and scored later.
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

# Query rows a layer on which the recall of a sampled prompt is measured.
RECALL_ROWS = 256


@dataclass(frozen=True)
class Question:
    """One prompt, and what is asked about it.

    Attributes:
        doc_id: its number in the task.
        prompt_hash: of everything that is asked: what was said to another prompt never counts.
        content: what the unit needs to ask.
        depth: where the needle lies, 0 to 1, in tasks that have one.
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
        measure_recall: whether recall is measured too, by a second prefill.
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
        official: lm-eval's own result for the whole; None where lm-eval has no part.
    """

    rows: dict[int, Row]
    higher_is_better: dict[str, bool]
    official: dict[str, Any] | None = None


class Unit(Protocol):
    """One task at one length."""

    @property
    def benchmark(self) -> str:
        """What it belongs to."""

    @property
    def task(self) -> str:
        """Its name."""

    @property
    def length(self) -> int | None:
        """Prompt length, tokens; None for a task without lengths."""

    def questions(self) -> Sequence[Question]:
        """All of them; the first ones stay the same when more are asked for."""

    def ask(self, question: Question, how: How) -> Row:
        """What the model says, and what `measured` tells of the prefill: JSON-ready."""

    def score(self, answered: Mapping[int, Row]) -> Scored:
        """Judge what was said, by doc_id."""


def measured(found: Sequence[Answer], how: How, truncated: int = 0) -> Row:
    """What a row says of the prefill, or prefills, behind an answer.

    Args:
        truncated: tokens of the prompt that were left out because they did not fit.
    """
    exact: Counter[str] = Counter()
    for one in found:
        exact.update(one.exact)
    sparse_calls = sum(one.sparse_calls for one in found)
    kept = sum(one.sparse_calls * (one.density or 0.0) for one in found)
    recalls = [one.recall for one in found if one.recall is not None]
    row: Row = {
        "tokens": sum(one.tokens for one in found),
        "truncated": truncated,
        "density": kept / sparse_calls if sparse_calls else None,
        "sparse_calls": sparse_calls,
        "recall": sum(recalls) / len(recalls) if recalls else None,
        "exact": dict(exact),
        "prefill_seconds": sum(one.prefill_seconds for one in found),
    }
    if how.method is None:
        row |= {"density": 1.0, "sparse_calls": None}
    return row


def hash_of(content: Any) -> str:
    """A short name for something JSON-like."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
