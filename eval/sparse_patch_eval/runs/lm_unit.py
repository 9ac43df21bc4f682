"""A task of lm-eval as a unit: lm-eval builds the prompts and does the scoring, we ask the model.

All requests about one context are answered from one prefill of it. Scoring replays the logged
answers through lm-eval's own evaluator, so metrics, filters and aggregation are the official ones,
and a killed run is scored as if it had never stopped.
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
        benchmark: that the task belongs to.
        task: as lm-eval's TaskManager loads it.
        length: prompt length that it was built for, tokens.
        lm: the model, a `SparsePatchLM`.
        chat_template: whether prompts go through the tokenizer's chat template.
        limit: number of first documents to ask; None: all.
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
        """One per document.

        Raises:
            ValueError: the task has requests that one prefill cannot answer.
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

    def _question(self, doc_id: int, requests: list[Instance]) -> Question:
        requests = sorted(requests, key=lambda request: request.idx)
        for request in requests:
            self._generation(request)  # refuses unsupported requests before anything runs
        doc = requests[0].doc
        depth = doc.get("depth") if isinstance(doc, Mapping) else None
        return Question(doc_id, hash_of([request_key(r) for r in requests]), requests, depth)

    def ask(self, question: Question, how: How) -> Row:
        """Prefill each context of the question once, and answer all requests about it."""
        requests: list[Instance] = question.content
        replies: dict[int, Any] = {}
        answers = []
        cut = 0
        for context, goals in self._by_context(requests).items():
            generations = {n: goal for n, goal in goals.items() if isinstance(goal, Generation)}
            continuations = {n: goal for n, goal in goals.items() if isinstance(goal, list)}
            longest = [goal.max_tokens for goal in generations.values()]
            room = self._lm.max_length - max([*longest, *map(len, continuations.values())])
            if room < 1:
                raise ValueError(
                    f"task {self.task!r} needs more tokens than the {self._lm.max_length} that the "
                    "model takes, prompt included"
                )
            ids = list(context)
            if len(ids) > room:
                cut += len(ids) - room
                ids = self._truncate(ids, room)
            result = answer(
                self._lm.model,
                self._lm.tokenizer,
                ids,
                method=how.method,
                patch_options=how.patch_options,
                generations=tuple(generations.values()),
                continuations=tuple(continuations.values()),
                recall_rows=RECALL_ROWS if how.measure_recall else 0,
            )
            replies |= zip(generations, result.texts, strict=True)
            replies |= zip(continuations, map(list, result.scores), strict=True)
            answers.append(result)
        responses = [replies[n] for n in range(len(requests))]
        return {"responses": responses, **measured(answers, how, cut)}

    def _by_context(
        self, requests: list[Instance]
    ) -> dict[tuple[int, ...], dict[int, Generation | list[int]]]:
        """What to generate or to score, by the tokens of the context and the request's number."""
        goals: dict[tuple[int, ...], dict[int, Generation | list[int]]] = {}
        for n, request in enumerate(requests):
            goal: Generation | list[int] | None = self._generation(request)
            if goal is not None:
                context = self._lm.encode_context(request.args[0])
            else:
                context, goal = self._lm.encode_pair(*request.args)
            goals.setdefault(tuple(context), {})[n] = goal
        return goals

    def _generation(self, request: Instance) -> Generation | None:
        """The generation that a request asks for; None if it asks for a likelihood."""
        if request.request_type == "loglikelihood":
            return None
        if request.request_type != "generate_until":
            raise ValueError(
                f"task {self.task!r} asks for {request.request_type}, which is not supported here: "
                "for perplexity use --tasks perplexity, for other tasks lm-eval's own command line "
                "with --model sparse_patch"
            )
        settings = normalize_gen_kwargs(request.args[1], self._lm.max_gen_toks)
        if settings.get("do_sample") or settings.get("num_beams", 1) != 1:
            raise ValueError(f"task {self.task!r} does not decode greedily: {request.args[1]}")
        return Generation(settings["max_gen_toks"], tuple(filter(None, settings["until"])))

    def score(self, answered: Mapping[int, Row]) -> Scored:
        """Let lm-eval score the answers."""
        requests = {question.doc_id: question.content for question in self.questions()}
        replies = {
            request_key(request): reply
            for doc_id, row in answered.items()
            for request, reply in zip(requests[doc_id], row["responses"], strict=True)
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
        for sample in samples:
            by_doc[sample["doc_id"]].append(sample)
        better = result["higher_is_better"][self.task]
        return Scored(
            rows={doc_id: _scored(filtered) for doc_id, filtered in by_doc.items()},
            higher_is_better={name: value is not False for name, value in better.items()},
            official=_plain(result),
        )


def request_key(request: Instance) -> str:
    """A key of a request, from its type and arguments."""
    return hash_of([request.request_type, *request.args])


def _without_bars() -> contextlib.AbstractContextManager[Any]:
    """Hide lm-eval's progress bars; logging still reaches the terminal."""
    return contextlib.redirect_stderr(io.StringIO())


class _Replay(LM):  # type: ignore[misc]  # lm_eval has no types
    """Replays the logged answers."""

    def __init__(self, replies: Mapping[str, Any], lm: Any) -> None:
        super().__init__()
        self._replies, self._lm = replies, lm

    def generate_until(self, requests: Iterable[Instance]) -> list[str]:
        return [self._replies[request_key(request)] for request in requests]

    def loglikelihood(self, requests: Iterable[Instance]) -> list[tuple[float, bool]]:
        return [tuple(self._replies[request_key(request)]) for request in requests]

    def loglikelihood_rolling(self, requests: Iterable[Instance]) -> list[float]:
        raise NotImplementedError("refused when the questions were built")

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        return self._lm.apply_chat_template(*args, **options)

    @property
    def tokenizer_name(self) -> str:
        return str(self._lm.tokenizer_name)


def _scored(samples: list[Row]) -> Row:
    """A document's scores, from lm-eval's samples, one per filter; the first filter is unnamed."""
    scores: dict[str, float] = {}
    for number, sample in enumerate(samples):
        for name in sample["metrics"]:
            value = sample[name]
            label = name if not number else f"{name},{sample['filter']}"
            if isinstance(value, bool | int | float):
                scores[label] = float(value)
    written = [reply for reply in samples[0]["filtered_resps"] if isinstance(reply, str)]
    target = samples[0]["target"]
    return {
        "scores": scores,
        "answer": written[0] if written else None,
        "target": target if isinstance(target, str | None) else str(target),
    }


def _plain(result: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's result as JSON; other values (functions in a config) become their text."""
    plain: dict[str, Any] = json.loads(json.dumps(result, default=str))
    return plain
