"""Time a prefill, and decode from it.

Time-to-first-token here is one forward of the whole prompt that fills a KV cache and yields the
logits of the last position; tokenising and loading are outside.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

__all__ = ["Prefill", "prefill"]


@dataclass(frozen=True)
class Prefill:
    """One prefill.

    Attributes:
        seconds: wall time until the logits of the last prompt token were available.
        tail: float32 `[kept, vocab]`, logits of the last prompt tokens.
        cache: the KV cache, ready to decode from; decoding extends it.
    """

    seconds: float
    tail: Tensor
    cache: Cache

    @property
    def logits(self) -> Tensor:
        """float32 `[vocab]`, for the first new token."""
        return self.tail[-1]


@torch.inference_mode()
def prefill(model: PreTrainedModel, input_ids: Tensor, *, kept: int = 1) -> Prefill:
    """Run `input_ids [1, length]` through `model` and take the time.

    Args:
        kept: number of last tokens whose logits to return.
    """
    _wait_for(input_ids.device)
    start = time.perf_counter()
    out = model(input_ids, use_cache=True, logits_to_keep=kept)
    first = int(out.logits[0, -1].argmax())  # reading it waits for the device
    seconds = time.perf_counter() - start
    assert first >= 0
    return Prefill(seconds, out.logits[0].float(), out.past_key_values)


@torch.inference_mode()
def decode(model: PreTrainedModel, start: Prefill, count: int) -> list[int]:
    """The next `count` tokens after a prefill, greedily. Uses the prefill's cache up."""
    tokens = [int(start.logits.argmax())]
    while len(tokens) < count:
        step = torch.tensor([tokens[-1:]], device=start.logits.device)
        out = model(step, past_key_values=start.cache, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
