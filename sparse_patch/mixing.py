"""One plan merged from the plans of several methods, each for some heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sparse_patch_kernels import BlockPlan, RunList
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A plan that decides for some heads.

    Attributes:
        heads: heads of the merged plan.
        places: their indices among the heads that the plan was made for.
        of: number of heads that the plan was made for.
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
        heads: number of heads of the merged plan.

    Returns:
        The plan, in blocks of the narrowest part; None without any part.

    Raises:
        ValueError: the parts cannot be mixed (see `common_form`).
    """
    if not parts:
        return None
    width, block_q = common_form([part.plan for part in parts])
    first = parts[0].plan
    all_starts = torch.arange(0, kv_len, width, dtype=torch.int32, device=device)
    last = first.last_rows(device)
    start = all_starts.expand(heads, first.n_q_blocks, -1).clone()
    count = (last // width + 1).to(torch.int32).expand(heads, -1).clone()
    for part in parts:
        starts, n = _in_runs_of(width, part.plan, last)
        lists = torch.tensor([place * part.plan.heads // part.of for place in part.places])
        target = torch.tensor(part.heads)
        # Entries past a list's count are padding and may have any value.
        starts = starts[lists, :, : start.shape[2]]
        start[target, :, : starts.shape[2]] = starts
        count[target] = n[lists]
    return BlockPlan(first.q_len, first.kv_len, block_q, (RunList(start, count, width),))


def common_form(plans: Sequence[BlockPlan]) -> tuple[int, int]:
    """Width and rows of the blocks in which all plans can be written.

    Raises:
        ValueError: a plan is not a list of whole blocks, their rows differ, or a width is not a
            multiple of the narrowest.
    """
    for plan in plans:
        simple = len(plan.runs) == 1 and plan.key_order is None and not plan.sink + plan.window
        if not simple or plan.runs[0].pool > 1:
            raise ValueError(
                "profile: methods share a layer only where each lists whole blocks of keys (no "
                "window, key order or pooled keys); give such a method a layer of its own"
            )
    forms = {(plan.runs[0].width, plan.block_q) for plan in plans}
    width, block_q = min(forms)
    if any(wide % width or rows != block_q for wide, rows in forms):
        shown = ", ".join(f"{wide} keys x {rows} rows" for wide, rows in sorted(forms))
        raise ValueError(
            "profile: methods that share a layer need blocks with the same number of rows, and "
            f"widths that the narrowest divides; got {shown}; give them the same block_size"
        )
    return width, block_q


def _in_runs_of(width: int, plan: BlockPlan, last: Tensor) -> tuple[Tensor, Tensor]:
    """Start `[heads, n_q_blocks, n]` and count of a plan's list, its runs cut into runs of `width`.

    last `[n_q_blocks]`: a block's last row, after which no run may begin.
    """
    (run,) = plan.runs
    start, count = run.expand(plan.heads)
    pieces = run.width // width
    if pieces == 1:
        return start, count
    cut = torch.arange(0, run.width, width, dtype=torch.int32, device=start.device)
    start = (start[..., None] + cut).flatten(2)
    listed = torch.arange(start.shape[2], device=start.device) < count[..., None] * pieces
    in_sight = listed & (start <= last[:, None])
    return start, in_sight.sum(-1, dtype=torch.int32)
