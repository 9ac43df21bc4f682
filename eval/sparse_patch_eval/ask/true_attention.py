"""True attention of some query rows: the standard for a method's choice of keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_patch_eval.ask.capture import Attention

__all__ = ["block_mass", "probabilities"]


def probabilities(q: Tensor, k: Tensor, rows: Tensor, *, scale: float) -> Tensor:
    """Causal attention of query rows `rows [n]`, ascending: float32 `[heads, n, keys]`.

    Keys up to the position of the last row.

    Args:
        q: `[heads, length, dim]`, the last `length` positions.
        k: `[kv_heads, kv_len, dim]`.
    """
    position = rows + k.shape[1] - q.shape[1]
    keys = int(position[-1]) + 1
    queries = (q[:, rows].float() * scale).reshape(len(k), -1, q.shape[2])
    scores = (queries @ k[:, :keys].float().mT).view(len(q), len(rows), keys)
    late = torch.arange(keys, device=rows.device) > position[:, None]
    return scores.masked_fill_(late, float("-inf")).softmax(-1)


def block_mass(attention: Attention, rows: Tensor, width: int) -> Tensor:
    """Attention of query rows by blocks of `width` keys: float32 `[heads, n, blocks]`."""
    probs = probabilities(attention.q, attention.k, rows, scale=attention.scale)
    blocks = -(-attention.k.shape[1] // width)
    probs = F.pad(probs, (0, blocks * width - probs.shape[-1]))
    return probs.view(len(probs), len(rows), blocks, width).sum(-1)
