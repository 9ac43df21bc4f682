"""From scores to blocks, against one-line definitions."""

import math

import pytest
import torch

from sparse_patch import selection
from sparse_patch.selection import BlockGrid


def test_cover_is_the_smallest_set_strictly_above():
    mass = torch.tensor([[0.125, 0.5, 0.25, 0.125]])
    assert [int(selection.cover(mass, s)) for s in (0.4, 0.5, 0.74, 0.75, 0.9)] == [1, 2, 2, 3, 4]


def test_top_mask_takes_a_count_per_row_and_the_first_of_equals():
    scores = torch.tensor([[1.0, 3, 2, 3], [0, 0, 0, 0]])
    got = selection.top_mask(scores, torch.tensor([3, 2]))
    assert got.int().tolist() == [[0, 1, 1, 1], [1, 1, 0, 0]]


GRIDS = [
    # q_len, kv_len, block_q, block_k
    (64, 64, 16, 16),
    (40, 77, 16, 16),
    (33, 75, 16, 4),
    (1, 50, 8, 8),
]


def grid_of(shape):
    return BlockGrid(*shape, torch.device("cpu"))


def row_blocks(shape):
    """Positions of each query block of the position grid that holds a query."""
    q_len, kv_len, block_q, _ = shape
    positions = range(kv_len - q_len, kv_len)
    return [
        [p for p in positions if p // block_q == block]
        for block in range(positions[0] // block_q, positions[-1] // block_q + 1)
    ]


@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_a_grid_knows_what_each_query_block_may_see(shape):
    grid, (_, kv_len, block_q, block_k) = grid_of(shape), shape
    rows = row_blocks(shape)
    blocks = range(-(-kv_len // block_k))
    assert (grid.rows, grid.blocks) == (len(rows), len(blocks))
    assert grid.first_row == rows[0][0] // block_q
    # Seen by some row of the query block, were it full; its own blocks have key 0 or below ahead.
    ends = [(row[0] // block_q + 1) * block_q for row in rows]
    assert grid.causal().tolist() == [[b * block_k < end for b in blocks] for end in ends]
    own = [row[0] // block_q * block_q // block_k for row in rows]
    assert grid.distance().tolist() == [[first - b for b in blocks] for first in own]


@pytest.mark.parametrize("shape", GRIDS, ids=str)
@pytest.mark.parametrize(("sink", "local"), [(0, 1), (1, 1), (2, 3), (99, 1)])
def test_forced_blocks_are_the_first_and_the_latest(shape, sink, local):
    grid, (_, _, block_q, block_k) = grid_of(shape), shape
    for row, got in zip(row_blocks(shape), grid.forced(sink, local), strict=True):
        own = range(row[0] // block_q * block_q // block_k, grid.blocks)
        seen = [b for b in range(grid.blocks) if b * block_k < (row[0] // block_q + 1) * block_q]
        assert got.nonzero()[:, 0].tolist() == [
            b for b in seen if b < sink or b > own[0] - local or b in own
        ]


@pytest.mark.parametrize("shape", GRIDS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 9, 999])
def test_last_rows_are_the_query_blocks_of_the_last_tokens(shape, tokens):
    want = [any(p >= shape[1] - tokens for p in row) for row in row_blocks(shape)]
    assert grid_of(shape).last_rows(tokens).tolist() == want


def scores_of(lists=2, rows=6, blocks=6, seed=0):
    """Scores with ties, what is causal and what is forced (the first block and the own)."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 3, (lists, rows, blocks), generator=generator).float()
    causal = torch.ones(rows, blocks, dtype=torch.bool).tril()
    forced = torch.eye(rows, blocks, dtype=torch.bool)
    forced[:, 0] = True
    return scores, causal, forced


def ranking(scores, causal, forced):
    """The ranking of one row, by Python's stable sort."""
    scores = scores.masked_fill(forced, 99)
    return sorted(range(len(scores)), key=lambda b: (not causal[b], -float(scores[b])))


def test_rank_puts_forced_first_then_the_best_then_the_future():
    scores, causal, forced = scores_of()
    order = selection.rank(scores, causal, forced)
    for one_list in range(2):
        for row in range(6):
            want = ranking(scores[one_list, row], causal[row], forced[row])
            n = int(causal[row].sum())
            assert order[one_list, row, :n].tolist() == want[:n]
            assert sorted(order[one_list, row, n:].tolist()) == sorted(want[n:])


def test_rank_puts_unknown_scores_last_but_before_the_future():
    scores = torch.tensor([[[0.0, float("nan"), float("-inf"), 1.0, 9.0]]])
    causal = torch.tensor([[True, True, True, True, False]])
    order = selection.rank(scores, causal, torch.zeros(1, 5, dtype=torch.bool))
    assert order[0, 0].tolist() == [3, 0, 1, 2, 4]


def test_mass_is_softmax_over_what_may_be_seen():
    scores, causal, _ = scores_of()
    mass = selection.mass_of(scores, causal)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 6))
    assert bool((mass[:, ~causal] == 0).all())
    torch.testing.assert_close(mass[1, 3, :4], scores[1, 3, :4].softmax(0))
    nothing = selection.mass_of(scores, torch.zeros_like(causal))
    assert bool((nothing == 0).all())


@pytest.mark.parametrize("forced_first", [True, False])
@pytest.mark.parametrize("gamma", [0.05, 0.5, 0.75, 0.999])
def test_top_p_counts_until_the_mass_is_reached(gamma, forced_first):
    scores, causal, forced = scores_of(rows=9, blocks=9)
    mass = selection.mass_of(scores, causal)
    got = selection.count_top_p(mass, forced, gamma, forced_first=forced_first)
    for one_list in range(2):
        for row in range(9):
            mine = mass[one_list, row].double()
            always = set(forced[row].nonzero()[:, 0].tolist())
            first = always if forced_first else set()
            order = sorted(range(9), key=lambda b: (b not in first, -float(mine[b])))
            kept, total = set(), 0.0
            for block in order:
                if total >= gamma * float(mine.sum()):
                    break
                kept.add(block)
                total += float(mine[block])
            assert int(got[one_list, row]) == len(kept | always)


def test_top_p_takes_a_share_per_list_and_of_what_a_row_holds():
    mass = torch.tensor([[[4.0, 3, 2, 1]], [[0.4, 0.3, 0.2, 0.1]]])
    none = torch.zeros(1, 4, dtype=torch.bool)
    gamma = torch.tensor([0.5, 0.95])[:, None, None]
    assert selection.count_top_p(mass, none, gamma).tolist() == [[2], [4]]


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 1.0])
def test_threshold_counts_what_is_near_the_best_of_its_row(alpha):
    scores, causal, forced = scores_of()
    got = selection.count_threshold(scores, causal, forced, alpha)
    for one_list in range(2):
        for row in range(6):
            mass = scores[one_list, row].double().exp()[: row + 1]
            near = (mass >= alpha * mass.max() * (1 - 1e-6)) | forced[row, : row + 1]
            assert int(got[one_list, row]) == int(near.sum())


@pytest.mark.parametrize("keep", [0.05, 0.4, 0.7, 1.0])
def test_global_counts_what_survives_a_contest_of_all_rows(keep):
    scores, causal, forced = scores_of(rows=8, blocks=8)
    mass = selection.mass_of(scores, causal)
    got = selection.count_global(mass, causal, forced, keep)
    pairs = [(row, block) for row in range(8) for block in range(row + 1)]
    for one_list in range(2):
        best = sorted(pairs, key=lambda p: (not forced[p], -float(mass[one_list][p])))
        kept = {*best[: math.ceil(keep * len(pairs))], *(p for p in pairs if forced[p])}
        assert got[one_list].tolist() == [sum(r == row for r, _ in kept) for row in range(8)]


def test_reach_is_the_smallest_set_that_holds_a_share():
    mass = torch.tensor([[0.125, 0.5, 0.25, 0.125]])
    shares = (0.1, 0.5, 0.51, 0.75, 0.9, 1.0)
    assert [int(selection.reach(mass, s)) for s in shares] == [1, 1, 2, 2, 4, 4]
    both = selection.reach(mass.repeat(2, 1), torch.tensor([0.5, 0.9]))
    assert both.tolist() == [1, 4]
    assert int(selection.reach(10 * mass, 0.51)) == 2  # a share of what is there


def test_mask_of_marks_the_beginning_of_each_ranked_row():
    order = torch.tensor([[[2, 0, 1], [1, 2, 0]]])
    count = torch.tensor([[1, 0], [2, 3], [3, 1], [0, 2]])
    got = selection.mask_of(order, count).int()
    assert got[0].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert got[1].tolist() == [[1, 0, 1], [1, 1, 1]]
    assert got[2].tolist() == [[1, 1, 1], [0, 1, 0]]
    assert got[3].tolist() == [[0, 0, 0], [0, 1, 1]]
    own = selection.mask_of(torch.cat([order, order.flip(-1)]), torch.ones(4, 2).long()).int()
    assert own.argmax(-1).tolist() == [[2, 1], [2, 1], [1, 0], [1, 0]]


@pytest.mark.parametrize("offset", [0, 16, 5, 30])
def test_the_query_grid_keeps_what_either_block_of_the_position_grid_keeps(offset):
    q_len, block = 40, 16
    blocks = [p // block for p in range(offset, offset + q_len)]
    n = blocks[-1] - blocks[0] + 1
    mask = torch.rand(2, n, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    got = selection.to_query_grid(mask, q_len, offset, block)
    for i, first in enumerate(range(0, q_len, block)):
        mine = {b - blocks[0] for b in blocks[first : first + block]}
        assert torch.equal(got[:, i], mask[:, list(mine)].any(1))
    assert got.shape[1] == 3
