"""Rankings of blocks by score, and what a ranking loses on rows that it was not made from.

A ranking puts the forced blocks first, then the others by score, the lower index first among
equals, and blocks that may not be seen last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import has_native
from ..compaction import lists_at_once
from ..token_scores import by_block

_NEVER = float("-inf")


@has_native
def rank(scores: Tensor, allowed: Tensor, forced: Tensor) -> Tensor:
    """Block indices, best first.

    Args:
        scores: float32 `[lists, rows, blocks]`; NaN counts as the lowest number.
        allowed, forced: bool `[rows, blocks]` or `[lists, rows, blocks]`.

    Returns:
        int32 `[lists, rows, blocks]`.
    """
    order = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    allowed, forced = allowed.expand_as(scores), forced.expand_as(scores)
    for some in lists_at_once(scores):
        part = scores[some].masked_fill(scores[some].isnan(), _NEVER)
        part = part.clamp_(min=torch.finfo(scores.dtype).min)
        part.masked_fill_(forced[some], float("inf")).masked_fill_(~allowed[some], _NEVER)
        order[some] = part.argsort(dim=-1, descending=True, stable=True)
    return order


@has_native
def rank_and_test(
    mass: Tensor, block: Tensor, sample: Tensor, allowed: Tensor, forced: Tensor, *, reduce: str
) -> tuple[Tensor, Tensor]:
    """Scores of blocks, and what rankings made from a part of the rows lose on others.

    Args:
        mass: float32 `[heads, n, m]`, what rows give to the first m blocks: shares that sum to 1.
        block: int64 `[n]`, ascending: the query block of each row, from 0.
        sample: bool `[3, n]`: rows to score by; rows to rank by; rows to test that ranking on. Each
            query block has some of the first two.
        allowed, forced: bool `[rows, blocks]`, a row per query block.
        reduce: "sum" or "rms", see `token_scores`.

    Returns:
        float32 `[heads, rows, blocks]`, scores by the first sample; and `[heads, blocks]`, entry
        n - 1 the sum, over the tested rows, of the square of what lies outside of the first n
        ranked blocks.
    """
    heads, (rows, blocks) = len(mass), allowed.shape
    scores = mass.new_full((2, heads, rows, blocks), float("-inf"))
    for of_sample, taken in zip(scores, sample[:2], strict=True):
        of_sample[..., : mass.shape[2]] = by_block(mass[:, taken], block[taken], reduce)
    tested = sample[2]
    squares = mass.new_zeros(heads, blocks)
    order = rank(scores[1], allowed, forced)[:, block[tested]]
    add_losses(squares, mass[:, tested], order)
    return scores[0], squares


def add_losses(squares: Tensor, mass: Tensor, order: Tensor) -> None:
    """Add up squares of what rows of `mass [heads, rows, m]` lose by their first n ranked blocks.

    Args:
        squares: `[heads, blocks]`, by n - 1.
        order: `[heads, rows, n]`; where n is less than m, no row has mass past n.
    """
    n = order.shape[2]
    ranked = torch.nn.functional.pad(mass, (0, n - mass.shape[2])).gather(2, order.long())
    squares[:, :n] += (1 - ranked.cumsum(-1)).clamp_(min=0).square_().sum(1)
