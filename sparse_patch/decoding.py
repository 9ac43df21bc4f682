"""Whether a decode step goes on from the one before, so that what was chosen then still holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Newest keys that must be the same. One would tell sequences apart, but for the first layer, whose
# keys know their token and place only.
_TAIL = 16


@dataclass(frozen=True)
class DecodeStep:
    """The last decode step of one batch row: the method's memory, and what it was a memory of."""

    memory: Any
    kv_len: int
    tail: Tensor

    @classmethod
    def of(cls, k: Tensor, memory: Any) -> DecodeStep:
        return cls(memory, k.shape[1], k[:, -_TAIL:].clone())

    def leads_to(self, k: Tensor) -> bool:
        """Is `k [kv_heads, kv_len, dim]` the same sequence with one key more?

        It is not after beams were reordered, the cache was cropped, or another text came in.
        """
        before = k[:, :-1][:, -_TAIL:]
        return (
            k.shape[1] == self.kv_len + 1
            and (before.dtype, before.device) == (self.tail.dtype, self.tail.device)
            and torch.equal(before, self.tail)
        )
