"""Offline tasks for lm-eval: RULER, a needle grid, passkey, key-value retrieval, needles.

No hub is needed: prompts are generated, from text that installs from PyPI. `TASKS_FOLDER` is for
lm-eval's `include_path`; `OFFLINE` lists all tasks. The two question answering tasks stand in for
RULER's, whose paragraphs are not available offline (see `qa`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TASKS_FOLDER = Path(__file__).parent
"""The folder of the YAML files."""


@dataclass(frozen=True)
class Tasks:
    """The tasks behind a name.

    Attributes:
        names: lm-eval's names of the single tasks.
        summary: one line.
    """

    names: tuple[str, ...]
    summary: str


_SINGLE = {
    "sp_niah_single_1": "RULER: a number in repeated noise",
    "sp_niah_single_2": "RULER: a number in prose",
    "sp_niah_single_3": "RULER: a UUID in prose",
    "sp_niah_multikey_1": "RULER: one of four numbers in prose",
    "sp_niah_multikey_2": "RULER: one of many numbers, nothing else around",
    "sp_niah_multikey_3": "RULER: one of many UUIDs with UUIDs as keys",
    "sp_niah_multivalue": "RULER: four numbers of one key in prose",
    "sp_niah_multiquery": "RULER: the numbers of four keys in prose",
    "sp_vt": "RULER: all variables of a chain of assignments",
    "sp_cwe": "RULER: the ten most common words of a list",
    "sp_fwe": "RULER: the three most frequent made-up words of a text",
    "sp_qa_1": "stands in for RULER's SQuAD: one of many invented documents answers",
    "sp_qa_2": "stands in for RULER's HotpotQA: two invented documents must be combined",
    "sp_niah_grid": "one number in prose at each depth, for a heat map",
    "sp_passkey": "a pass key in repeated filler",
    "sp_kv_retrieval": "one value out of a JSON object of UUID pairs",
    "sp_needle": "one number in prose, asked for with its own words (small models can)",
    "sp_needle_multi": "one of eight numbers in prose, asked for with its own words",
}

OFFLINE: dict[str, Tasks] = {
    "ruler": Tasks(tuple(_SINGLE)[:13], "RULER's 13 tasks, generated offline"),
    "niah": Tasks(("sp_niah_grid",), _SINGLE["sp_niah_grid"]),
    "passkey": Tasks(("sp_passkey",), _SINGLE["sp_passkey"]),
    "kv_retrieval": Tasks(("sp_kv_retrieval",), _SINGLE["sp_kv_retrieval"]),
    "needle": Tasks(("sp_needle", "sp_needle_multi"), "numbers in prose that a small model finds"),
    **{name: Tasks((name,), summary) for name, summary in _SINGLE.items()},
}
"""The offline names for `--tasks`: short names, and every single task."""
