"""Scoring continuations of prompts: grouping, and a batch in one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Score = tuple[float, bool]
"""Log-probability of a continuation, nats, and whether greedy decoding would have written it."""


class Scored(NamedTuple):
    """A continuation to score: its request (None: not cached) and its tokens."""

    request: tuple[str, str] | None
    context: list[int]
    continuation: list[int]

    @property
    def input(self) -> list[int]:
        """Tokens of a forward that scores all of it: the last token predicts nothing."""
        return self.context + self.continuation[:-1]


def groups_of(asked: Sequence[Scored], tokens: Callable[[Scored], list[int]]) -> list[list[int]]:
    """Indices of requests grouped by equal tokens, longest first, so memory runs out early."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(asked):
        groups.setdefault(tuple(tokens(request)), []).append(number)
    return [groups[key] for key in sorted(groups, key=lambda key: (-len(key), key))]


@torch.no_grad()
def score_batch(
    model: Any, inputs: list[list[int]], targets: list[list[list[int]]], device: torch.device
) -> list[list[Score]]:
    """The scores of the continuations that each input ends with, in one forward.

    The mask says where each input ends, so no method sees padding.

    Args:
        inputs: context and continuation without its last token.
        targets: the continuations of each input.
    """
    length = max(map(len, inputs))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in inputs], device=device)
    ends = torch.tensor([len(row) for row in inputs], device=device)
    mask = torch.arange(length, device=device) < ends[:, None]
    padded = {} if bool(mask.all()) else {"attention_mask": mask.long()}
    # Logits of the whole batch and vocabulary would be the largest tensor by far.
    starts = [len(o) - max(map(len, w)) for o, w in zip(inputs, targets, strict=True)]
    kept = length - min(starts)
    logits = model(ids, logits_to_keep=kept, **padded).logits[:, -kept:]
    result = []
    for row, row_tokens, continuations in zip(logits, inputs, targets, strict=True):
        end = kept - (length - len(row_tokens))
        result.append([_score(row[end - len(c) : end], c) for c in continuations])
    return result


def _score(logits: Tensor, continuation: Sequence[int]) -> Score:
    """Log-probability, nats, and whether greedy, given the logits `[len(continuation), vocab]`."""
    target = torch.tensor(list(continuation), device=logits.device)
    log_probs = logits.float().log_softmax(-1).gather(1, target[:, None])
    return float(log_probs.sum()), bool((logits.argmax(-1) == target).all())
