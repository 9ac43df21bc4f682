"""Perplexity and KL to dense on long text, as a unit.

The whole text is prefilled, and scored on its last tokens, which have the most context: mean
negative log-likelihood of the next token (perplexity is exp of its mean over samples), and KL(dense
|| method) of the next-token distributions, which shows changes that perplexity averages out.
Samples are disjoint windows of real text, never repeated.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from sparse_patch_eval.ask.answer import Answer, answer
from sparse_patch_eval.ask.kl import kl_rows
from sparse_patch_eval.base.rows import Row
from sparse_patch_eval.inputs.parts import no_room, parts
from sparse_patch_eval.inputs.text import bos, long_text, window
from sparse_patch_eval.runs.unit import RECALL_ROWS, How, Question, Scored, hash_of, measured

# Number of last tokens that are scored.
SCORED = 512


# A path in `--tasks` with an unescaped comma is cut there and cannot be read.
_OPTION = "--tasks (a comma in a path is written `\\,`)"


def text_parts(text: str, length: int, limit: int | None, seed: int) -> list[str]:
    """The parts of a text, one per question of a `TextUnit`; needs no model.

    Raises:
        ValueError: see `TextUnit`, and `text.long_text`.
    """
    if length < 2 * SCORED:
        raise ValueError(f"--lengths {length}: perplexity needs at least {2 * SCORED} tokens")
    whole = long_text(text, option=_OPTION)
    pieces = parts(whole, length, seed)
    if not pieces or len(pieces) < (limit or 0):
        fewer = f"--limit {len(pieces)} or less"
        raise no_room(f"--tasks: the text {text!r}", whole, length, len(pieces), fewer)
    return pieces


class TextUnit:
    """Perplexity of one text at one length.

    Args:
        text: what `text.long_text` takes.
        length: tokens per window.
        lm: the model, a `SparsePatchLM`.
        limit: number of windows; None: as many as the text has room for.
        seed: chooses the windows.

    Raises:
        ValueError: the text has no room for that many disjoint windows, or `length` leaves no
            context before the scored tokens.
    """

    benchmark = "perplexity"

    def __init__(self, text: str, length: int, *, lm: Any, limit: int | None, seed: int) -> None:
        self.task, self.length = f"perplexity_{text}", length
        self._lm, self._seed, self._limit = lm, seed, limit
        self._parts = text_parts(text, length, limit, seed)
        self._dense: tuple[str, Answer] | None = None

    def questions(self) -> Sequence[Question]:
        """One per window."""
        questions = []
        for number, text in enumerate(self._parts[: self._limit]):
            rng = random.Random(f"perplexity-{self._seed}-{number}")
            start = bos(self._lm.tokenizer)
            room = self.length - len(start)
            tokens = start + window(self._lm.tokenizer, text, room, rng)
            questions.append(Question(number, hash_of(tokens), tokens))
        return questions

    def ask(self, question: Question, how: How) -> Row:
        """Prefill the window and compare its last distributions with the text, and with dense."""
        if self._dense is None or self._dense[0] != question.prompt_hash:
            self._dense = (question.prompt_hash, self._prefill(question, How(None, {})))
        dense = self._dense[1]
        result = dense if how.method is None else self._prefill(question, how)
        predicted = result.tail[:-1]
        target = torch.tensor(question.content[-SCORED:], device=predicted.device)
        return {
            "scores": {
                "nll": float(F.cross_entropy(predicted, target)),
                "kl": float(kl_rows(dense.tail[:-1], predicted).mean()),
            },
            **measured([result], how),
        }

    def _prefill(self, question: Question, how: How) -> Answer:
        return answer(
            self._lm.model,
            self._lm.tokenizer,
            question.content,
            method=how.method,
            patch_options=how.patch_options,
            tail=SCORED + 1,
            recall_rows=RECALL_ROWS if how.measure_recall else 0,
        )

    def score(self, answered: Mapping[int, Row]) -> Scored:
        """The measured values are the scores."""
        rows = {
            doc_id: {"scores": row["scores"], "answer": None, "target": None}
            for doc_id, row in answered.items()
        }
        return Scored(rows, {"nll": False, "kl": False})
