"""The offline tasks: RULER's definitions with its parameters, and the others."""

from __future__ import annotations

from sparse_patch_eval.tasks.copying import Copying
from sparse_patch_eval.tasks.counting import CommonWords, FrequentWords
from sparse_patch_eval.tasks.kv_retrieval import KvRetrieval
from sparse_patch_eval.tasks.niah import Niah
from sparse_patch_eval.tasks.passkey import Passkey
from sparse_patch_eval.tasks.problem import Generator
from sparse_patch_eval.tasks.qa import Qa
from sparse_patch_eval.tasks.tracing import Tracing

RULER: dict[str, Generator] = {
    "sp_niah_single_1": Niah(type_haystack="noise"),
    "sp_niah_single_2": Niah(type_haystack="essay"),
    "sp_niah_single_3": Niah(type_haystack="essay", type_needle_v="uuids"),
    "sp_niah_multikey_1": Niah(type_haystack="essay", num_needle_k=4),
    "sp_niah_multikey_2": Niah(type_haystack="needle"),
    "sp_niah_multikey_3": Niah(
        type_haystack="needle", type_needle_k="uuids", type_needle_v="uuids"
    ),
    "sp_niah_multivalue": Niah(type_haystack="essay", num_needle_v=4),
    "sp_niah_multiquery": Niah(type_haystack="essay", num_needle_q=4),
    "sp_vt": Tracing(num_chains=1, num_hops=4),
    "sp_cwe": CommonWords(freq_cw=30, freq_ucw=3, num_cw=10),
    "sp_fwe": FrequentWords(alpha=2.0),
    "sp_qa_1": Qa(hops=1),
    "sp_qa_2": Qa(hops=2),
}
"""RULER's 13 tasks; keys are words and values numbers unless stated (its synthetic.yaml)."""

GRID = "sp_niah_grid"

GRID_WORDINGS: dict[str, Generator] = {
    "copy": Copying(),
    "question": Niah(type_haystack="essay", tokens_to_generate=16),
}
"""The grid's question: in the needle's own words, or as in RULER."""

GENERATORS: dict[str, Generator] = {
    **RULER,
    GRID: GRID_WORDINGS["copy"],
    "sp_passkey": Passkey(),
    "sp_kv_retrieval": KvRetrieval(),
    "sp_needle": Copying(keys=1),
    "sp_needle_multi": Copying(keys=8),
}
"""All tasks by lm-eval's name."""
