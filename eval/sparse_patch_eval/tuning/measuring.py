"""Measurements of candidates on the prompts of a tuning, and of a profile's speed-up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparse_patch
from sparse_patch import Profile
from sparse_patch_eval.ask.capture import capture
from sparse_patch_eval.base.rows import RowFile
from sparse_patch_eval.tuning.choice import Candidate, Measured, measure_layer

# Number of last positions over which a KL is averaged.
_KL_TOKENS = 64
_SPEED_ROUNDS = 3


def measure(
    file: RowFile,
    lm: PreTrainedModel,
    prompt: Tensor,
    key: dict[str, Any],
    candidates: Sequence[Candidate],
    rows: int,
) -> None:
    """Measure every layer and candidate without a row, and add the row."""
    specs = [candidate.spec for candidate in candidates]
    known = {(r["layer"], r["spec"]) for r in file.rows if _is_of(r, key)}
    n_layers = lm.config.get_text_config().num_hidden_layers
    todo = {
        layer: [i for i, spec in enumerate(specs) if (layer, spec) not in known]
        for layer in range(n_layers)
    }
    layers = [layer for layer, left in todo.items() if left]
    if not layers:
        return
    for layer, inside in capture(lm, prompt, layers).layers.items():
        left = todo[layer]
        density, recall = measure_layer([candidates[i] for i in left], layer, inside, rows=rows)
        for place, i in enumerate(left):
            values = {"density": density[place].tolist(), "recall": recall[place].tolist()}
            file.add({**key, "layer": layer, "spec": specs[i], **values})


def _is_of(row: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(row[name] == value for name, value in key.items())


def mean_of(
    file: RowFile, keys: Sequence[dict[str, Any]], candidates: Sequence[Candidate]
) -> Measured:
    """Means of the measurements on some prompts."""
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in file.rows:
        if any(_is_of(row, key) for key in keys):
            rows.setdefault((row["spec"], row["layer"]), []).append(row)
    layers = sorted({layer for _, layer in rows})

    def table(name: str) -> Tensor:
        return torch.tensor(
            [
                [_column_means([row[name] for row in rows[candidate.spec, n]]) for n in layers]
                for candidate in candidates
            ],
            dtype=torch.float64,
        )

    return Measured(candidates, layers, table("density"), table("recall"))


def _column_means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def last_logits(lm: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits float32 `[positions, vocab]` of the last positions."""
    with torch.inference_mode():
        logits: Tensor = lm(ids, use_cache=False, logits_to_keep=_KL_TOKENS).logits[0]
    return logits.float()


def speed_up(lm: PreTrainedModel, ids: Tensor, profile: Profile) -> float:
    """Dense / patched time of a prefill, median of rounds in turns."""

    def seconds() -> float:
        start = time.perf_counter()
        last_logits(lm, ids).sum().item()  # waits for the device
        return time.perf_counter() - start

    ratios = []
    for _ in range(_SPEED_ROUNDS):
        dense = seconds()
        with sparse_patch.patch(lm, profile=profile, min_length=0, min_queries=0):
            ratios.append(dense / seconds())
    return statistics.median(ratios)
