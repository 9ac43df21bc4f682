"""BlockPlan: what it shows, how it counts, what it refuses."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_patch_kernels import BlockPlan, RunList, counting


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


@pytest.mark.parametrize(("q_len", "kv_len", "width"), [(64, 64, 16), (50, 75, 16), (33, 90, 8)])
@pytest.mark.parametrize("pool", [1, 4])
def test_density_of_reordered_runs_on_the_grid(q_len, kv_len, width, pool, monkeypatch):
    """Counted from sorted positions, a few heads at a time, as slot by slot."""
    monkeypatch.setattr(counting, "_MOST_COUNTS", 70)
    draw = torch.Generator().manual_seed(q_len)
    mask = torch.rand(4, -(-q_len // 16), -(-kv_len // width), generator=draw) < 0.6
    order = torch.stack([torch.randperm(kv_len, generator=draw) for _ in range(2)])
    if pool > 1:
        mask[..., -1] = False  # a run there may be cut short
    runs = RunList.from_mask(mask, width, pool)
    assert runs.on_grid
    plan = BlockPlan(q_len, kv_len, 16, (runs,), key_order=order)
    slow = dataclasses.replace(plan, runs=(dataclasses.replace(runs, on_grid=False),))
    assert torch.equal(plan.head_density(), slow.head_density())
    assert float(plan.head_density().min()) > 0


def test_a_list_that_claims_a_grid_must_be_on_it():
    start = torch.tensor([[[0, 24]]], dtype=torch.int32)
    runs = RunList(start, torch.tensor([[2]], dtype=torch.int32), 16, on_grid=True)
    with pytest.raises(ValueError, match="off the grid of its width, 16"):
        BlockPlan(64, 64, 64, (runs,))


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


def test_from_mask_lists_what_it_marks():
    mask = torch.rand(3, 5, 9, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[0, 0], mask[1, 1] = False, True
    made = RunList.from_mask(mask, 8, 4)
    assert (made.width, made.pool, made.start.shape) == (8, 4, (3, 5, 9))
    for head in range(3):
        for row in range(5):
            listed = made.start[head, row, : made.count[head, row]].tolist()
            assert listed == [8 * j for j in range(9) if mask[head, row, j]]
    assert RunList.from_mask(torch.zeros(1, 2, 3, dtype=torch.bool), 8).count.tolist() == [[0, 0]]


def ranked():
    """Two lists, best run first, for four heads that take 1, 3, 2 and 0 of their list."""
    start = torch.tensor([[[24, 0, 16]], [[8, 16, 0]]]).int()
    return RunList(start, torch.tensor([[1], [3], [2], [0]]).int(), 8)


def test_a_ranked_list_expands_to_ascending_ones():
    start, count = ranked().expand(4)
    listed = [start[head, 0, : count[head, 0]].tolist() for head in range(4)]
    assert ranked().ranked
    assert listed == [[24], [0, 16, 24], [8, 16], []]
    assert torch.equal(ranked().counts(8), count.repeat_interleave(2, 0))
    wide = ranked().expand(8)
    assert torch.equal(wide[0][2, 0, :3], torch.tensor([0, 16, 24]).int())
    assert torch.equal(wide[1], ranked().counts(8))


def test_a_ranked_list_shows_and_counts_the_beginning_of_each_head():
    plan = BlockPlan(32, 32, 32, (ranked(),))
    seen = plan.to_dense_mask()[:, -1].view(4, 4, 8)
    assert torch.equal(seen.any(-1), seen.all(-1))
    assert seen.any(-1).int().tolist() == [[0, 0, 0, 1], [1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert plan.head_density().tolist() == [0.25, 0.75, 0.5, 0.0]


def pooled_plan(order=None):
    """One query block at positions 16..23 of 24: tokens 0..7, and 8..15 as groups of `pool`."""
    tokens, far = runs([[[0]]], [[1]], 8), runs([[[8]]], [[1]], 8)
    return lambda pool: BlockPlan(
        8, 24, 8, (tokens, RunList(far.start, far.count, 8, pool)), key_order=order
    )


@pytest.mark.parametrize(("pool", "groups"), [(2, 4), (4, 2), (8, 1)])
def test_a_pooled_group_counts_as_one_key(pool, groups):
    # Blocks of 8: one of three is kept, and the groups come on top.
    assert pooled_plan()(pool).density == pytest.approx((8 + groups) / 24)


def test_pooled_groups_that_no_row_sees_do_not_count():
    # Keys 0..19 in groups of 4, last row 13: groups 0..3 reach to 3, 7, 11, 15.
    run = RunList(torch.tensor([[[0]]]).int(), torch.ones(1, 1).int(), 20, 4)
    plan = BlockPlan(14, 14, 14, (run,))
    assert plan.density == pytest.approx(3 / 14)
    order = torch.tensor([0, 13, *range(1, 13)])[None]  # under it group 0 reaches to 13
    assert dataclasses.replace(plan, key_order=order).density == pytest.approx(3 / 14)
    early = BlockPlan(7, 14, 7, (run,), key_order=order)
    assert early.density == pytest.approx(3 / 14)
    run = RunList(torch.zeros(1, 2, 1).int(), torch.ones(1, 2).int(), 8, 4)
    late = BlockPlan(14, 14, 7, (run,), key_order=order)  # rows 0..6: group 1, slots 4..7, no more
    assert late.density == pytest.approx((1 + 2) / (7 + 14))


@pytest.mark.parametrize("reordered", [False, True])
def test_pooled_keys_are_the_groups_and_visible_from_their_last_key_on(reordered):
    order = torch.arange(23, -1, -1)[None] if reordered else None
    plan = pooled_plan(order)(4)
    groups = plan.pooled_keys(plan.runs[1], 0, 0)
    assert groups.tolist() == (
        [[15, 14, 13, 12], [11, 10, 9, 8]] if reordered else [[8, 9, 10, 11], [12, 13, 14, 15]]
    )
    ends = plan.group_ends(4)[0]
    assert ends[2:4].tolist() == groups.amax(1).tolist()
    assert len(ends) == 6


def test_pooled_keys_leave_out_what_the_end_cuts():
    run = RunList(torch.tensor([[[0, 8]]]).int(), torch.tensor([[2]]).int(), 8, 4)
    plan = BlockPlan(14, 14, 14, (run,))
    assert plan.pooled_keys(run, 0, 0)[:, 0].tolist() == [0, 4, 8]
    assert plan.group_ends(4).tolist() == [[3, 7, 11]]


def with_pooled(start, width, pool, **fields):
    """64 positions, one query block of the last 16 rows, tokens 16..31, and one pooled run."""
    pooled = RunList(torch.tensor([[[start]]]).int(), torch.ones(1, 1).int(), width, pool)
    return BlockPlan(16, 64, 16, (runs([[[16]]], [[1]], 16), pooled), **fields)


@pytest.mark.parametrize(
    ("start", "width", "pool", "fields"),
    [
        (24, 16, 8, {}),
        (0, 32, 4, {}),
        (0, 8, 4, {"sink": 1}),
        (32, 8, 4, {"window": 10}),  # row 48 sees 39
        (24, 16, 8, {"key_order": torch.randperm(64)[None]}),
    ],
)
def test_a_pooled_run_must_not_overlap_anything(start, width, pool, fields):
    with pytest.raises(ValueError, match="count twice"):
        with_pooled(start, width, pool, **fields)


def test_a_pooled_run_may_touch_its_neighbours_and_two_token_lists_may_overlap():
    with_pooled(32, 8, 4, sink=16, window=9)
    plan = with_pooled(0, 16, 4)
    dataclasses.replace(plan, runs=(plan.runs[0], *plan.runs))


def test_pooled_runs_lie_on_the_grid_of_their_groups():
    with pytest.raises(ValueError, match="groups of 4"):
        with_pooled(2, 8, 4)


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
        (lambda: dataclasses.replace(runs([[[0]]], [[1]], 8), pool=3), "pool=3 must divide"),
        (lambda: runs([[[0]], [[0]]], [[1], [1], [1]], 8), "2 lists and 3 counts"),
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
