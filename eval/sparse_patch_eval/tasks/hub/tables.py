"""The known benchmarks of the hub, and the needs of each of their tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from sparse_patch_eval.tasks.hub.data import Source


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the hub, or one task of it.

    Attributes:
        name: of the benchmark, also where this entry is a single task.
        summary: one line.
        folder: folder of lm-eval's definitions, below its `tasks`.
        tasks: lm-eval task name -> where its data is; None where lm-eval makes the data itself.
        packages: module to import -> what to `pip install` for it.
        lengths: does a task exist in several lengths (`metadata["max_seq_lengths"]`)?
        truncation: how the authors shorten a prompt that is too long for the model: "middle", or
            None where they do not, because the length is part of the task.
    """

    name: str
    summary: str
    folder: str
    tasks: Mapping[str, Source | None]
    packages: Mapping[str, str]
    lengths: bool = False
    truncation: Literal["middle"] | None = None


BABILONG_LENGTHS = {1024 * n: f"{n}k" for n in (0, 1, 2, 4, 8, 16, 32, 64, 128)}
BABILONG_LONG = frozenset(f"babilong_qa{n}" for n in range(1, 11))  # the others: 0k only
RULER_SHORTEST = 1024  # lm-eval's ruler_vt never returns at 512
# fmt: off
_LONGBENCH_E = [
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec",
    "triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
]
_LONGBENCH = [
    *_LONGBENCH_E, "narrativeqa", "multifieldqa_zh", "musique", "dureader", "qmsum", "vcsum",
    "lsht", "passage_retrieval_zh",
]
# fmt: on
_LONGBENCH2 = {
    "govt_single": "government_single",
    "legal_single": "legal_single",
    "lit_single": "literary",
    "fin_single": "financial_single",
    "academic_single": "academic_single",
    "detective": "detective",
    "event_order": "event_ordering",
    "govt_multi": "government_multi",
    "legal_multi": "legal_multi",
    "academic_multi": "academic_multi",
    "fin_multi": "financial_multi",
    "news_multi": "multinews",
    "user_guide": "user_guide_qa",
    "translate": "new_language_translation",
    "many_shot": "manyshot_learning",
    "agent_history": "agent_history_qa",
    "dialogue_history": "dialogue_history_qa",
    "code": "code_repo_qa",
    "graph": "graph_reasoning",
    "table": "table_qa",
}
_INFINITEBENCH = {
    "passkey": "passkey",
    "number_string": "number_string",
    "kv_retrieval": "kv_retrieval",
    "code_run": "code_run",
    "code_debug": "code_debug",
    "math_find": "math_find",
    "longbook_qa_chn": "longbook_qa_chn",
    # The dataset says "eng" where lm-eval says "en".
    **{f"{name}_en": f"{name}_eng" for name in ("longbook_qa", "longbook_sum", "longbook_choice")},
    "longdialogue_qa_en": "longdialogue_qa_eng",
}
_RULER = [
    *(f"niah_single_{n}" for n in (1, 2, 3)),
    *(f"niah_multikey_{n}" for n in (1, 2, 3)),
    *("niah_multivalue", "niah_multiquery", "ruler_vt", "ruler_cwe", "ruler_fwe"),
    *("ruler_qa_squad", "ruler_qa_hotpot"),
]
# What lm-eval's RULER fetches while it makes data.
ESSAYS = Source("baber/paul_graham_essays", None, "train")
ESSAY_TASKS = frozenset(
    f"niah_{name}" for name in ["single_2", "single_3", "multikey_1", "multivalue", "multiquery"]
)
QA_HOSTS = {
    "ruler_qa_squad": "https://rajpurkar.github.io (SQuAD 2.0 dev)",
    "ruler_qa_hotpot": "https://huggingface.co/datasets/namlh2004/hotpotqa",
}


def _longbench(names: list[str], suffix: str) -> dict[str, Source | None]:
    configs = [name + suffix for name in names]
    return {f"longbench_{c}": Source("Xnhyacinth/LongBench", c, "test") for c in configs}


def _benchmarks() -> dict[str, Benchmark]:
    zh = {"jieba": "jieba", "fuzzywuzzy": "fuzzywuzzy", "rouge": "rouge"}
    longbench = Benchmark(
        name="longbench",
        summary="21 English and Chinese tasks, 5k-15k tokens: QA, summaries, few-shot, code",
        folder="longbench",
        tasks=_longbench(_LONGBENCH, ""),
        packages=zh,
        truncation="middle",
    )
    return {
        "longbench": longbench,
        "longbench_e": replace(
            longbench,
            name="longbench_e",
            summary="13 tasks of LongBench with even lengths (0-4k, 4-8k, 8k+ words)",
            tasks=_longbench(_LONGBENCH_E, "_e"),
        ),
        "longbench2": Benchmark(
            name="longbench2",
            summary="503 four-way questions on texts of 8k to 2M words",
            folder="longbench2",
            tasks={
                f"longbench2_{task}": Source("recursal/longbench-v2", config, "train")
                for task, config in _LONGBENCH2.items()
            },
            packages={},
            truncation="middle",
        ),
        "infinitebench": Benchmark(
            name="infinitebench",
            summary="11 tasks on 100k+ tokens: retrieval, code, maths, books, dialogue",
            folder="infinitebench",
            tasks={
                f"infinitebench_{task}": Source(
                    "xinrongzhang2022/InfiniteBench", None, split, f"{split}.jsonl"
                )
                for task, split in _INFINITEBENCH.items()
            },
            packages={"rouge_score": "rouge-score"},
            truncation="middle",
        ),
        "babilong": Benchmark(
            name="babilong",
            summary="bAbI questions whose facts are scattered over a book, 0k to 128k tokens",
            folder="babilong",
            # The configuration is the length, which the caller gives.
            tasks={
                f"babilong_qa{n}": Source("RMT-team/babilong-1k-samples", None, f"qa{n}")
                for n in range(1, 21)
            },
            packages={},
            lengths=True,
        ),
        "ruler_lm_eval": Benchmark(
            name="ruler_lm_eval",
            summary="RULER's 13 tasks as lm-eval makes them (500 samples a length, needs network)",
            folder="ruler",
            tasks=dict.fromkeys(_RULER),
            packages={"wonderwords": "wonderwords", "nltk": "nltk", "scipy": "scipy"},
            lengths=True,
        ),
    }


def _entries() -> dict[str, Benchmark]:
    """Every benchmark, and every task of one as a benchmark of one task."""
    entries = {}
    for name, benchmark in _benchmarks().items():
        shown = dict(benchmark.tasks)
        if name == "babilong":  # what the paper reports; the others load by name
            shown = {f"babilong_qa{n}": shown[f"babilong_qa{n}"] for n in range(1, 6)}
        entries[name] = replace(benchmark, tasks=shown)
        for task, source in benchmark.tasks.items():
            entries[task] = replace(benchmark, tasks={task: source})
    return entries


HUB: dict[str, Benchmark] = _entries()
