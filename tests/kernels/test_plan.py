"""BlockPlan: what it shows, how it counts, what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_patch_kernels import BlockPlan, RunList


def runs(starts, counts, width):
    return RunList(
        torch.tensor(starts, dtype=torch.int32), torch.tensor(counts, dtype=torch.int32), width
    )


def by_definition(plan: BlockPlan) -> torch.Tensor:
    """The visibility rule of plan.py, one key at a time."""
    mask = torch.zeros(plan.heads, plan.q_len, plan.kv_len, dtype=torch.bool)
    for head in range(plan.heads):
        for row in range(plan.q_len):
            position, block = plan.q_offset + row, row // plan.block_q
            slots = set()
            for run in plan.runs:
                start = run.start[head * run.start.shape[0] // plan.heads, block]
                count = run.count[head * run.count.shape[0] // plan.heads, block]
                for first in start[:count].tolist():
                    slots.update(range(first, min(first + run.width, plan.kv_len)))
            if plan.key_order is not None:
                order = plan.key_order[head * plan.key_order.shape[0] // plan.heads]
                slots = {int(order[slot]) for slot in slots}
            for key in range(position + 1):
                near = position - key < plan.window
                mask[head, row, key] = key in slots or key < plan.sink or near
    return mask


@st.composite
def plans(draw):
    q_len = draw(st.integers(1, 40))
    kv_len = q_len + draw(st.integers(0, 30))
    block_q = draw(st.sampled_from([1, 4, 16]))
    heads = draw(st.sampled_from([1, 2]))
    n_blocks = -(-q_len // block_q)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    lists = []
    for _ in range(draw(st.integers(0, 2))):
        width = draw(st.sampled_from([1, 3, 8]))
        # Every second slot of the grid at most, so that unaligned starts stay disjoint.
        shift = draw(st.integers(0, width - 1))
        last = BlockPlan(q_len, kv_len, block_q).last_rows()
        rows = [
            [
                [
                    s
                    for s in range(shift, int(end) + 1, width)
                    if torch.rand(1, generator=generator) < 0.5
                ]
                for end in last
            ]
            for _ in range(heads)
        ]
        most = max(1, max(len(r) for head in rows for r in head))
        starts = [[r + [0] * (most - len(r)) for r in head] for head in rows]
        lists.append(runs(starts, [[len(r) for r in head] for head in rows], width))
    assert all(r.start.shape[1] == n_blocks for r in lists)
    order = None
    if draw(st.booleans()):
        order = torch.stack([torch.randperm(kv_len, generator=generator) for _ in range(heads)])
    return BlockPlan(
        q_len,
        kv_len,
        block_q,
        tuple(lists),
        sink=draw(st.integers(0, 6)),
        window=draw(st.integers(0, 9)),
        key_order=order,
    )


@given(plans())
@settings(max_examples=60, deadline=None)
def test_token_mask_follows_the_rule(plan):
    assert torch.equal(plan.to_dense_mask(), by_definition(plan))


@given(plans())
@settings(max_examples=60, deadline=None)
def test_density_counts_keys_some_row_sees(plan):
    if len(plan.runs) == 1 and not plan.sink and not plan.window and plan.key_order is None:
        return  # counted in blocks of the run's width: the tests below
    blocks = plan.to_dense_mask().split(plan.block_q, dim=1)
    seen = torch.stack([block.any(1).sum(-1) for block in blocks]).sum(0)
    causal = sum(int(row) + 1 for row in plan.last_rows())
    assert torch.allclose(plan.head_density(), seen.double() / causal)


@pytest.mark.parametrize(("q_len", "kv_len"), [(512, 512), (500, 500), (256, 512), (200, 456)])
def test_block_mask_density_is_kept_over_causal_blocks(q_len, kv_len):
    n_q, n_k = -(-q_len // 64), -(-kv_len // 64)
    mask = torch.rand(3, n_q, n_k, generator=torch.Generator().manual_seed(0)) < 0.4
    plan = BlockPlan.from_block_mask(mask, block_q=64, block_k=64, q_len=q_len, kv_len=kv_len)
    causal = torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)
    kept = (mask & causal).sum((1, 2)) / causal.sum()
    assert torch.allclose(plan.head_density(), kept.double())
    assert plan.density == pytest.approx(float(kept.mean()))


def test_block_mask_round_trip_is_token_exact():
    mask = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    tokens = BlockPlan.from_block_mask(mask, block_q=16, block_k=16).to_dense_mask()
    wide = mask.repeat_interleave(16, 1).repeat_interleave(16, 2)
    assert torch.equal(tokens, wide & torch.ones(128, 128, dtype=torch.bool).tril())


def test_a_plan_without_lengths_fits_ragged_tensors():
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    plan = BlockPlan.from_block_mask(mask, block_q=128, block_k=128)
    tokens = plan.to_dense_mask(1000, 1000)
    assert torch.equal(tokens[0], torch.ones(1000, 1000, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match="q_len=1024"):
        plan.to_dense_mask(800, 800)


def test_unequal_blocks_make_a_square_plan():
    mask = torch.ones(1, 15, 8, dtype=torch.bool)
    plan = BlockPlan.from_block_mask(mask, block_q=64, block_k=128)
    assert (plan.q_len, plan.kv_len) == (960, 960)


def test_group_lists_serve_their_heads():
    shared = runs([[[0, 8]]], [[1], [2]], 8)  # one list, a count per head
    plan = BlockPlan(16, 16, 16, (shared,))
    assert plan.heads == 2
    assert plan.to_dense_mask()[0, 15].sum() == 8
    assert plan.to_dense_mask()[1, 15].sum() == 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: runs([[[8, 0]]], [[2]], 8), "ascending and disjoint"),
        (lambda: runs([[[0, 4]]], [[2]], 8), "ascending and disjoint"),
        (lambda: runs([[[0, 64]]], [[2]], 8), "after the last row"),
        (lambda: runs([[[-8, 0]]], [[2]], 8), "before key 0"),
        (lambda: runs([[[0, 8]]], [[3]], 8), "larger than its list"),
        (lambda: runs([[[0], [0]]], [[1], [1]], 8), "query blocks"),
        (lambda: runs([[[0]]], [[1]], 0), "at least 1 token"),
        (lambda: RunList(torch.zeros(1, 1, 1), torch.zeros(1, 1), 8), "int32"),
        (lambda: RunList(torch.zeros(1).int(), torch.zeros(1, 1).int(), 8), r"\[lists, n_q_blocks"),
    ],
)
def test_bad_lists_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        BlockPlan(16, 16, 16, (make(),))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"q_len": 0, "kv_len": 4, "block_q": 4}, "q_len"),
        ({"q_len": 8, "kv_len": 4, "block_q": 4}, "last rows"),
        ({"q_len": 4, "kv_len": 4, "block_q": 0}, "block_q"),
        ({"q_len": 4, "kv_len": 4, "block_q": 4, "sink": -1}, "sink"),
        (
            {"q_len": 4, "kv_len": 4, "block_q": 4, "key_order": torch.arange(3)[None]},
            "key_order",
        ),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BlockPlan(**fields)


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)])
def test_a_block_mask_must_be_boolean_and_three_dimensional(mask):
    with pytest.raises(ValueError, match="bool"):
        BlockPlan.from_block_mask(mask, block_q=8, block_k=8)


def test_block_mask_must_cover_the_lengths():
    with pytest.raises(ValueError, match="does not cover"):
        BlockPlan.from_block_mask(
            torch.ones(1, 2, 2, dtype=torch.bool), block_q=8, block_k=8, q_len=40, kv_len=40
        )
