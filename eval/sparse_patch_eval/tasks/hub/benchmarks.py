"""Long-context benchmarks from the Hugging Face hub, or from a local folder of its files.

The tasks are lm-eval's (0.4.13: prompts, metrics), with the changes of `fixes` where lm-eval
departs from the authors' code and a line or two can fix it. `data_dir` reads the same files from
disk (`data`). Scores are 0 to 1 where the authors print percent. Remaining differences from the
official code, and fixed ones:

LongBench (arXiv:2308.14508)
* lm-eval reads Xnhyacinth/LongBench, where the prompt is already part of the columns, and wraps the
  official prompt around it again; fixed: it comes once (for the authors' own files too).
* lm-eval loses white space at prompt joints (triviaqa, samsum, code, synthetic) and stops few-shot
  answers at the first newline even if that is the whole answer; fixed.
* Prompts too long for the model are cut in the middle: `truncate_middle`, which the caller applies.
  The authors cut text before their chat template and encode again; we cut token ids.
* Few-shot and code tasks are meant to run without a chat template.
* samsum ends at the first newline token officially; here its first line counts, which is the same.
* LongBench-E: the authors report by length (0-4k, 4-8k, 8k+ words, column `length`), here it is one
  mean. lm-eval's group `longbench_e` lacks its summarisation and synthetic tasks; ours has all 13.
LongBench v2 (arXiv:2412.15204)
* The authors sample up to 128 tokens at temperature 0.1 and read "The correct answer is (X)". Here
  (recursal/longbench-v2, the same 503 questions) the prompt ends in "Answer:" and the likeliest of
  A, B, C, D is taken: every answer can be read, so scores differ from the paper's. No chain of
  thought and no retrieval.
InfiniteBench (arXiv:2402.13718)
* lm-eval cannot load it (its feature list is no `datasets.Features`; four splits end in `_eng`);
  fixed, as are its stop at the first newline and the stemming in ROUGE-Lsum.
* The prompts are those for GPT-4 ("inspect the options" for "inspect through the options"); the
  authors use others, with an answer prefix, for open models. Under a chat template the first
  sentence becomes the system message.
* math_calc is missing. In longbook_choice and code_debug the last lone letter decides, where the
  authors, if that is wrong, also accept the first letter, the option's text or "answer is". Chinese
  F1 keeps four kinds of curly quotes that the authors drop.
BABILong (arXiv:2406.10149)
* Instruction, format and examples are the authors', without their <example> and <context> tags and
  in another order; 16 new tokens, not 20. lm-eval shows two of three examples and counts any
  mention of the target; fixed (qa8, qa11-20 keep the mention rule: their labels are unknown).
* `babilong` is qa1-qa5, which the paper reports; qa6-qa20 load by name, qa11-qa20 at 0k only.
RULER as lm-eval has it (arXiv:2404.06654): our own `ruler` tasks need no network, these do
* Always 500 samples per length, so loading takes a minute per task and length.
* The tokenizer is loaded without a repository's code, which lm-eval would run.
* Samples come from Python's global random state; `load_tasks` seeds it per task, and restores it.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparse_patch_eval.tasks.hub.load import load_task
from sparse_patch_eval.tasks.hub.tables import (
    BABILONG_LENGTHS,
    BABILONG_LONG,
    HUB,
    RULER_SHORTEST,
    Benchmark,
)

__all__ = ["HUB", "Benchmark", "check", "load_tasks", "truncate_middle"]


def truncate_middle(ids: Sequence[int], room: int) -> list[int]:
    """Keep the first and the last half of a prompt that is too long: `room` tokens in all.

    Instruction and question stand at the two ends. Source: LongBench's `pred.py` and
    InfiniteBench's `eval_utils.py`; of an odd `room` the end gets one token more.

    Raises:
        ValueError: `room` is negative.
    """
    if room < 0:
        raise ValueError(f"room must be 0 or more tokens, not {room}")
    if len(ids) <= room:
        return list(ids)
    first = room // 2
    return [*ids[:first], *ids[len(ids) - (room - first) :]]


def check(names: Iterable[str], lengths: Sequence[int] | None = None) -> list[Benchmark]:
    """The entries of `HUB` by these names, after all checks that need no data.

    Args:
        names: benchmarks or single tasks.
        lengths: prompt lengths asked for, in tokens; benchmarks without lengths ignore them.

    Raises:
        ValueError: a name is unknown, or a task has no such length.
        ImportError: a package is missing; says what to `pip install`.
    """
    chosen = [_entry(name) for name in names]
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError('lm-eval is missing: pip install "sparse-patch[eval]"')
    for benchmark in chosen:
        absent = [pip for module, pip in benchmark.packages.items() if not _importable(module)]
        if absent:
            raise ImportError(
                f"{benchmark.name} needs packages that are not installed: "
                f"pip install {' '.join(absent)}"
            )
        if benchmark.lengths:
            _check_lengths(benchmark, lengths)
    return chosen


def load_tasks(
    names: Iterable[str],
    *,
    data_dir: Path | None = None,
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Load tasks of `HUB` as lm-eval tasks, with our changes, ready for `lm_eval.evaluate`.

    Documents of benchmarks with lengths have a column `max_length` (tokens).

    Args:
        names: benchmarks or single tasks; a task named twice is loaded once.
        data_dir: a folder with the datasets' files; None reads the hub.
        metadata: `max_seq_lengths` (list of token counts: BABILong, default 0k; RULER, default
            4096), `tokenizer` (string, RULER) and `seed` (RULER).

    Returns:
        lm-eval task name -> `lm_eval.api.task.Task`, in the order asked for.

    Raises:
        ValueError, ImportError: see `check`.
        FetchError: data cannot be fetched or read; says what to download, and how.
    """
    asked = dict(metadata or {})
    chosen = check(names, asked.get("max_seq_lengths"))
    loaded: dict[str, Any] = {}
    for benchmark in chosen:
        for task in benchmark.tasks:
            if task not in loaded:
                loaded[task] = load_task(benchmark, task, data_dir, asked)
    return loaded


def _entry(name: str) -> Benchmark:
    if name not in HUB:
        near = difflib.get_close_matches(name, HUB, n=3) or ["longbench", "infinitebench"]
        raise ValueError(f"unknown benchmark {name!r}: did you mean {' or '.join(near)}?")
    return HUB[name]


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _check_lengths(benchmark: Benchmark, lengths: Sequence[int] | None) -> None:
    if lengths is None:
        return
    if not lengths:
        raise ValueError(f"{benchmark.name}: max_seq_lengths is empty; give one length or more")
    if benchmark.folder == "ruler":
        short = [length for length in lengths if length < RULER_SHORTEST]
        if short:
            raise ValueError(
                f"{benchmark.name}: length {short[0]} is below {RULER_SHORTEST}, where lm-eval's "
                "generators may never return; use longer ones, or our own `ruler`"
            )
        return
    unknown = [length for length in lengths if length not in BABILONG_LENGTHS]
    if unknown:
        known = ", ".join(f"{length} ({name})" for length, name in BABILONG_LENGTHS.items())
        raise ValueError(f"{benchmark.name} has no length {unknown[0]}; it has {known}")
    short_only = [task for task in benchmark.tasks if task not in BABILONG_LONG]
    if short_only and any(lengths):
        raise ValueError(f"{short_only[0]} exists at length 0 (0k) only, not at {max(lengths)}")
