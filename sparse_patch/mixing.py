"""One plan from those of several methods, each for some heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sparse_patch_kernels import BlockPlan, RunList


@dataclass(frozen=True)
class Part:
    """A plan that decides for some heads.

    Attributes:
        heads: of the merged plan.
        places: where these are among the heads that the plan was made for.
        of: how many heads that were.
        plan: the plan.
    """

    heads: Sequence[int]
    places: Sequence[int]
    of: int
    plan: BlockPlan


def merged(
    parts: Sequence[Part], heads: int, kv_len: int, device: torch.device
) -> BlockPlan | None:
    """The plan in which each part decides for its heads, and other heads see every key.

    Args:
        parts: disjoint in their heads.
        heads: of the merged plan.

    Returns:
        The plan; None without any part.

    Raises:
        ValueError: parts that are no lists of blocks, or of blocks of different sizes.
    """
    if not parts:
        return None
    width, block_q = _form(parts)
    first = parts[0].plan
    every = torch.arange(0, kv_len, width, dtype=torch.int32, device=device)
    seen = first.last_rows(device) // width + 1
    start = every.expand(heads, first.n_q_blocks, -1).clone()
    count = seen.to(torch.int32).expand(heads, -1).clone()
    for part in parts:
        own, n = part.plan.runs[0].expand(part.plan.heads)
        lists = torch.tensor([place * part.plan.heads // part.of for place in part.places])
        target = torch.tensor(part.heads)
        # What lists hold past their counts is padding, whatever it is.
        start[target, :, : own.shape[2]] = own[lists]
        count[target] = n[lists]
    return BlockPlan(first.q_len, first.kv_len, block_q, (RunList(start, count, width),))


def _form(parts: Sequence[Part]) -> tuple[int, int]:
    """Width and rows of the blocks that all parts list.

    Raises:
        ValueError: there is no such form.
    """
    forms = set()
    for plan in (part.plan for part in parts):
        simple = len(plan.runs) == 1 and plan.key_order is None and not plan.sink + plan.window
        if not simple or plan.runs[0].pool > 1:
            raise ValueError(
                "profile: methods share a layer only where each lists whole blocks of keys (no "
                "window, key order or pooled keys); give such a method a layer of its own"
            )
        forms.add((plan.runs[0].width, plan.block_q))
    if len(forms) > 1:
        raise ValueError(
            f"profile: methods that share a layer need blocks of one size, got {sorted(forms)}"
        )
    return forms.pop()
