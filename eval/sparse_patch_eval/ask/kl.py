"""KL divergence between two predictions of the next token."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kl_divergence", "kl_rows"]

# Positions compared at a time: a vocabulary is large.
_CHUNK = 128


def kl_rows(dense: Tensor, sparse: Tensor) -> Tensor:
    """KL(dense || sparse) in nats, per position: `[n, vocab]` logits twice -> `[n]`."""
    parts = []
    for n in range(0, len(dense), _CHUNK):
        log_p = dense[n : n + _CHUNK].log_softmax(-1)
        log_q = sparse[n : n + _CHUNK].log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts)


def kl_divergence(dense: Tensor, sparse: Tensor) -> float:
    """`kl_rows` of one position: logits `[vocab]` twice."""
    return float(kl_rows(dense[None], sparse[None]))
