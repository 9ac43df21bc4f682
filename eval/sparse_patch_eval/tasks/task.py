"""The lm-eval task behind every offline task: its requests to the model, and its scores.

A document asks for one greedy generation and the likelihoods of eight answers, all after the same
prompt, so that a runner can prefill once:

- `string_match`: RULER's score, the share of gold strings found in the generation, case ignored;
- `rank`: 1 if the right answer has the best mean log-likelihood per token, ties count as wrong;
- `answer_nll`: nats per token of the right answer.
"""

from __future__ import annotations

import re
from typing import Any

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from sparse_patch_eval.tasks.documents import Document, from_metadata
from sparse_patch_eval.tasks.table import GENERATORS

_CONTROL = re.compile(r"[\x00-\x1f]")


class OfflineTask(ConfigurableTask):  # type: ignore[misc]  # lm_eval is untyped
    """A task whose documents are generated; the task's name says which."""

    def __init__(self, config: dict[str, Any]) -> None:
        settings = {key: value for key, value in config.items() if key != "class"}
        name = settings["task"]
        if name not in GENERATORS:
            raise ValueError(f"unknown task {name!r}: use one of {', '.join(GENERATORS)}")
        settings["generation_kwargs"] = {
            "do_sample": False,
            "max_gen_toks": GENERATORS[name].tokens_to_generate,
            "until": [],
            **settings.get("generation_kwargs", {}),
        }
        super().__init__(config=settings)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Make the documents; only the haystack is fetched, the first time."""
        documents = from_metadata(self.config.task, {**(self.config.metadata or {}), **kwargs})
        self.dataset = {"test": datasets.Dataset.from_list(documents)}

    def doc_to_target(self, doc: Document, doc_to_target: Any = None) -> str:
        """The whole right answer."""
        target: str = doc["candidates"][doc["gold"]]
        return target

    def construct_requests(self, doc: Document, ctx: str, **kwargs: Any) -> list[Instance]:
        """One generation, then a likelihood of each candidate, in order."""
        metadata = kwargs["metadata"]
        settings = dict(self.config.generation_kwargs)
        requests: list[tuple[str, tuple[str, Any]]] = [("generate_until", (ctx, settings))]
        requests += [("loglikelihood", (ctx, f" {candidate}")) for candidate in doc["candidates"]]
        return [
            Instance(request_type=kind, doc=doc, arguments=arguments, idx=n, metadata=metadata)
            for n, (kind, arguments) in enumerate(requests)
        ]


def score_all(doc: Document, results: list[Any]) -> dict[str, float]:
    """Scores of a document whose gold strings must all be found."""
    return _scores(doc, results, all_needed=True)


def score_any(doc: Document, results: list[Any]) -> dict[str, float]:
    """Scores of a document whose gold strings are spellings of one answer."""
    return _scores(doc, results, all_needed=False)


def _scores(doc: Document, results: list[Any], *, all_needed: bool) -> dict[str, float]:
    generation, *likelihoods = results
    text = _CONTROL.sub("\n", generation.strip()).lower()
    matches = [gold.lower() in text for gold in doc["outputs"]]
    means = [
        total / tokens
        for (total, _), tokens in zip(likelihoods, doc["candidate_tokens"], strict=True)
    ]
    right = means.pop(doc["gold"])
    return {
        "string_match": sum(matches) / len(matches) if all_needed else float(any(matches)),
        "rank": float(right > max(means)),
        "answer_nll": 0.0 - right,  # not -right: no score is -0.0
    }
