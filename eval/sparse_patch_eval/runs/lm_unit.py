"""A task of lm-eval as a unit: lm-eval builds the prompts and does the scoring, we ask.

Everything that is asked about one context comes from one prefill of it. Scoring replays what was
logged through lm-eval's own evaluator, so that metrics, filters and aggregation are the official
ones, and a run that was killed is scored as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs

from sparse_patch_eval.ask.answer import Generation, answer
from sparse_patch_eval.base.rows import Row
from sparse_patch_eval.runs.unit import RECALL_ROWS, How, Question, Scored, hash_of, measured

Truncate = Callable[[list[int], int], list[int]]


def keep_end(tokens: list[int], room: int) -> list[int]:
    """lm-eval's way to shorten a prompt that does not fit: drop its beginning."""
    return tokens[-room:]


class LmUnit:
    """One task of lm-eval, at one length where it has lengths.

    Args:
        benchmark: what it belongs to.
        task: as lm-eval's TaskManager loads it.
        length: prompt length it was built for, tokens.
        lm: the model, a `SparsePatchLM`.
        chat_template: whether prompts go through the tokenizer's chat template.
        limit: only the first so many documents; None for all.
        truncate: shortens a prompt to `room` tokens if it does not fit the model.
    """

    def __init__(
        self,
        benchmark: str,
        task: Task,
        length: int | None,
        *,
        lm: Any,
        chat_template: bool = False,
        limit: int | None = None,
        truncate: Truncate = keep_end,
    ) -> None:
        self.benchmark, self.length = benchmark, length
        self.task: str = task.config.task
        self._task, self._lm = task, lm
        self._limit, self._truncate = limit, truncate
        self._chat_template = chat_template
        self._questions: list[Question] = []

    def questions(self) -> Sequence[Question]:
        """One a document.

        Raises:
            ValueError: the task asks for something that one prefill cannot answer.
        """
        if not self._questions:
            with _without_bars():
                self._task.build_all_requests(
                    limit=self._limit,
                    apply_chat_template=self._chat_template,
                    chat_template=self._lm.apply_chat_template if self._chat_template else None,
                    tokenizer_name=self._lm.tokenizer_name if self._chat_template else "",
                )
            by_doc: dict[int, list[Instance]] = defaultdict(list)
            for instance in self._task.instances:
                by_doc[instance.doc_id].append(instance)
            self._questions = [self._question(*item) for item in sorted(by_doc.items())]
        return self._questions

    def _question(self, doc_id: int, asked: list[Instance]) -> Question:
        asked = sorted(asked, key=lambda one: one.idx)
        for one in asked:
            self._generation(one)  # what cannot be done is said before anything runs
        depth = asked[0].doc.get("depth") if isinstance(asked[0].doc, Mapping) else None
        return Question(doc_id, hash_of([request_key(one) for one in asked]), asked, depth)

    def ask(self, question: Question, how: How) -> Row:
        """Prefill each context of the question once, and answer all that is asked about it."""
        asked: list[Instance] = question.content
        said: dict[int, Any] = {}
        found = []
        cut = 0
        for context, wanted in self._by_context(asked).items():
            generations = {n: one for n, one in wanted.items() if isinstance(one, Generation)}
            continuations = {n: one for n, one in wanted.items() if isinstance(one, list)}
            longest = [one.max_tokens for one in generations.values()]
            room = self._lm.max_length - max([*longest, *map(len, continuations.values())])
            if room < 1:
                raise ValueError(
                    f"task {self.task!r} wants more tokens than the {self._lm.max_length} that the "
                    "model takes, prompt included"
                )
            ids = list(context)
            if len(ids) > room:
                cut += len(ids) - room
                ids = self._truncate(ids, room)
            one = answer(
                self._lm.model,
                self._lm.tokenizer,
                ids,
                method=how.method,
                patch_options=how.patch_options,
                generations=tuple(generations.values()),
                continuations=tuple(continuations.values()),
                recall_rows=RECALL_ROWS if how.measure_recall else 0,
            )
            said |= zip(generations, one.texts, strict=True)
            said |= zip(continuations, map(list, one.scores), strict=True)
            found.append(one)
        responses = [said[n] for n in range(len(asked))]
        return {"responses": responses, **measured(found, how, cut)}

    def _by_context(
        self, asked: list[Instance]
    ) -> dict[tuple[int, ...], dict[int, Generation | list[int]]]:
        """What is wanted, by the tokens of its context and the number of the request."""
        found: dict[tuple[int, ...], dict[int, Generation | list[int]]] = {}
        for n, one in enumerate(asked):
            wanted: Generation | list[int] | None = self._generation(one)
            if wanted is not None:
                context = self._lm.encode_context(one.args[0])
            else:
                context, wanted = self._lm.encode_pair(*one.args)
            found.setdefault(tuple(context), {})[n] = wanted
        return found

    def _generation(self, one: Instance) -> Generation | None:
        """What a request wants generated; None for a likelihood."""
        if one.request_type == "loglikelihood":
            return None
        if one.request_type != "generate_until":
            raise ValueError(
                f"task {self.task!r} asks for {one.request_type}, which is not measured here: for "
                "perplexity use --tasks perplexity, for other tasks lm-eval's own command line "
                "with --model sparse_patch"
            )
        wanted = normalize_gen_kwargs(one.args[1], self._lm.max_gen_toks)
        if wanted.get("do_sample") or wanted.get("num_beams", 1) != 1:
            raise ValueError(f"task {self.task!r} does not decode greedily: {one.args[1]}")
        return Generation(wanted["max_gen_toks"], tuple(filter(None, wanted["until"])))

    def score(self, answered: Mapping[int, Row]) -> Scored:
        """Let lm-eval judge what was said."""
        asked = {question.doc_id: question.content for question in self.questions()}
        replies = {
            request_key(one): reply
            for doc_id, row in answered.items()
            for one, reply in zip(asked[doc_id], row["responses"], strict=True)
        }
        with _without_bars():
            result = lm_eval.evaluate(
                _Replay(replies, self._lm),
                {"tasks": {self.task: self._task}},
                samples={self.task: sorted(answered)},
                bootstrap_iters=0,
                apply_chat_template=self._chat_template,
            )
        samples = result.pop("samples")[self.task]
        by_doc: dict[int, list[Row]] = defaultdict(list)
        for one in samples:
            by_doc[one["doc_id"]].append(one)
        better = result["higher_is_better"][self.task]
        return Scored(
            rows={doc_id: _scored(found) for doc_id, found in by_doc.items()},
            higher_is_better={name: value is not False for name, value in better.items()},
            official=_plain(result),
        )


def request_key(one: Instance) -> str:
    """Names a request by everything that is asked."""
    return hash_of([one.request_type, *one.args])


def _without_bars() -> contextlib.AbstractContextManager[Any]:
    """lm-eval draws a bar a task; logging keeps its own hold of the terminal."""
    return contextlib.redirect_stderr(io.StringIO())


class _Replay(LM):  # type: ignore[misc]  # lm_eval has no types
    """Says again what was said."""

    def __init__(self, replies: Mapping[str, Any], lm: Any) -> None:
        super().__init__()
        self._replies, self._lm = replies, lm

    def generate_until(self, requests: Iterable[Instance]) -> list[str]:
        return [self._replies[request_key(one)] for one in requests]

    def loglikelihood(self, requests: Iterable[Instance]) -> list[tuple[float, bool]]:
        return [tuple(self._replies[request_key(one)]) for one in requests]

    def loglikelihood_rolling(self, requests: Iterable[Instance]) -> list[float]:
        raise NotImplementedError("refused when the questions were built")

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        return self._lm.apply_chat_template(*args, **options)

    @property
    def tokenizer_name(self) -> str:
        return str(self._lm.tokenizer_name)


def _scored(found: list[Row]) -> Row:
    """A document's scores, from lm-eval's sample: one a filter, the first filter unnamed."""
    scores: dict[str, float] = {}
    for number, sample in enumerate(found):
        for name in sample["metrics"]:
            value = sample[name]
            label = name if not number else f"{name},{sample['filter']}"
            if isinstance(value, bool | int | float):
                scores[label] = float(value)
    written = [reply for reply in found[0]["filtered_resps"] if isinstance(reply, str)]
    target = found[0]["target"]
    return {
        "scores": scores,
        "answer": written[0] if written else None,
        "target": target if isinstance(target, str | None) else str(target),
    }


def _plain(result: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's result as JSON: what is not JSON (functions in a config) by its name."""
    plain: dict[str, Any] = json.loads(json.dumps(result, default=str))
    return plain
