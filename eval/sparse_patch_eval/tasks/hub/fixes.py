"""Our changes to lm-eval's definitions of the hub benchmarks, with reasons.

Each function takes a task's configuration as lm-eval 0.4.13 has it and returns the fields to
replace. Sources: the authors' repositories (THUDM/LongBench `config/`, `pred.py`, `eval.py`;
OpenBMB/InfiniteBench `src/`; booydar/babilong `babilong/metrics.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

Config = dict[str, Any]
Scorer = Callable[[dict[str, Any], list[str]], dict[str, float]]

# LongBench's evaluation reads the first line of these answers only.
_FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
# White space at the joints of the official prompts that lm-eval's copies lost.
_JOINTS = {
    "triviaqa": ("{{context}}\n{{", "{{context}}\n\n{{"),
    "samsum": ("{{context}}\n{{", "{{context}}\n\n{{"),
    "passage_count": ("The final answer is:", "The final answer is: "),
    "passage_retrieval_en": ("The answer is:", "The answer is: "),
    "lcc": ("Next line of code:", "Next line of code:\n"),
    "repobench-p": ("Next line of code:", "Next line of code:\n"),
}
_ROOMS = {"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}
# All possible answers of the BABILong tasks for which the authors' list is known.
_BABILONG_LABELS = {
    **{f"qa{n}": _ROOMS for n in (1, 2, 3, 4)},
    "qa5": {"bill", "fred", "jeff", "mary", "apple", "football", "milk"},
    "qa6": {"no", "yes"},
    "qa7": {"two", "one", "none"},
    "qa9": {"no", "yes"},
    "qa10": {"maybe", "no", "yes"},
}


def longbench(base: Config) -> Config:
    """The official prompt once, not twice, and the first line of few-shot answers."""
    name = base["dataset_name"].removesuffix("_e")
    changed: Config = {"doc_to_text": _longbench_prompt(base["doc_to_text"], name)}
    if name in _FIRST_LINE:
        # A stop at the first newline scores 0 where the model begins with one; the official
        # evaluation drops leading newlines first.
        changed["generation_kwargs"] = {**base["generation_kwargs"], "until": []}
        changed["process_results"] = _of_first_line(base["process_results"])
    return changed


def longbench2(base: Config) -> Config:
    """No change: scored by the likelihood of the four letters, as in lm-eval."""
    return {}


def infinitebench(base: Config) -> Config:
    """No stop at the first newline, and ROUGE without stemming, as in `compute_scores.py`.

    The prompts end without an answer prefix, so a model may begin with a newline, which lm-eval's
    stop turns into an empty answer.
    """
    changed: Config = {"generation_kwargs": {**base["generation_kwargs"], "until": []}}
    if base["task"].endswith("longbook_sum_en"):
        changed["process_results"] = _rouge_lsum
    return changed


def babilong(base: Config) -> Config:
    """All of the task's examples (lm-eval shows two of three), and the authors' comparison."""
    changed: Config = {"num_fewshot": len(base["fewshot_config"]["samples"])}
    labels = _BABILONG_LABELS.get(base["test_split"])
    if labels is not None:
        changed["process_results"] = _only_label(labels)
    return changed


def ruler(base: Config) -> Config:
    """One metric, `string_match`, for any length.

    lm-eval names its metrics after six lengths and reports -1 for 4096 when that was not asked.
    """
    metric = {"metric": "string_match", "aggregation": "mean", "higher_is_better": True}
    return {"metric_list": [metric], "process_results": _of_own_length(base["process_results"])}


def _longbench_prompt(template: str, name: str) -> str:
    """A template for both forms of the data.

    Xnhyacinth/LongBench, which lm-eval reads, comes with the prompt already in its columns: context
    + question + answer_prefix is the official prompt. (lm-eval adds its own once more.) The
    authors' files have only `context` and `input`.
    """
    bare = template.replace(*_JOINTS.get(name, ("", "")))
    bare = bare.replace("{{question}}", "{{question if question is defined else input}}")
    opening = json.dumps(template.split("{{context}}")[0][:20], ensure_ascii=False)
    done = "{{context}}{{question}}{{answer_prefix}}"
    return f"{{% if context.startswith({opening}) %}}{done}{{% else %}}{bare}{{% endif %}}"


def _of_first_line(score: Scorer) -> Scorer:
    def first_line(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        return score(doc, [results[0].lstrip("\n").split("\n")[0]])

    return first_line


def _of_own_length(score: Scorer) -> Scorer:
    def own_length(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        return {"string_match": score(doc, results)[str(doc["max_length"])]}

    return own_length


def _rouge_lsum(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeLsum"], use_stemmer=False)
    best = max(scorer.score(answer, results[0])["rougeLsum"].fmeasure for answer in doc["answer"])
    return {"score": best}


def _only_label(labels: set[str]) -> Scorer:
    """Right if the target is the only possible answer in the first sentence of the output.

    Answers that the question itself names do not count.
    """

    def only_label(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        sentence = re.split(r"\.|<context>|<example>", results[0].lower())[0]
        named = {label for label in labels if label in doc["question"].lower()}
        answers = {label for label in labels if label in sentence} - named
        return {"acc": float(answers == {doc["target"].lower()})}

    return only_label
