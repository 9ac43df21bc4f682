"""An engine's batch, one sequence after another: who has which rows, and how many keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """The tokens of one sequence in a step: a prompt, a chunk of one, or a decode step.

    Attributes:
        index: which sequence of the batch it is.
        start, stop: its rows among the tokens of the batch; they are the sequence's last.
        kv_len: tokens of the sequence so far, these included.
    """

    index: int
    start: int
    stop: int
    kv_len: int

    @property
    def q_len(self) -> int:
        return self.stop - self.start

    @property
    def is_fresh(self) -> bool:
        """Are all keys that it sees among the batch's own?"""
        return self.q_len == self.kv_len


def pieces_of(starts: Sequence[int], lengths: Sequence[int]) -> list[Piece]:
    """The sequences of a batch; places that hold none (padding) are left out.

    Args:
        starts: where each sequence's rows begin, and where the last one's end.
        lengths: tokens of each sequence so far.
    """
    places = zip(pairwise(starts), lengths, strict=True)
    return [
        Piece(i, start, stop, kv) for i, ((start, stop), kv) in enumerate(places) if stop > start
    ]


def rows_of(pieces: Sequence[Piece], device: torch.device | str = "cpu") -> slice | Tensor:
    """The rows of some pieces among the tokens of the batch, as a slice where they are one."""
    joined = all(one.stop == after.start for one, after in pairwise(pieces))
    if joined:
        return slice(pieces[0].start, pieces[-1].stop)
    return torch.cat([torch.arange(one.start, one.stop, device=device) for one in pieces])


def starts_of(pieces: Sequence[Piece]) -> list[int]:
    """Where the rows of each begin, and the last one's end, if only these were in the batch."""
    starts = [0]
    for one in pieces:
        starts.append(starts[-1] + one.q_len)
    return starts
