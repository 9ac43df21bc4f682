"""Rankings and lists in C++ against the plain functions that they stand in for."""

import pytest
import torch
from sparse_patch_kernels.cpu import selection
from sparse_patch_kernels.estimators.compaction import compact
from sparse_patch_kernels.estimators.compaction import native as native_compaction
from sparse_patch_kernels.estimators.ranking import native, rank, rank_and_test

pytestmark = pytest.mark.skipif(not selection.has("lists"), reason="no C++ compiler on PATH")


def dice(seed):
    return torch.Generator().manual_seed(seed)


def masks(rows, blocks, per_list=None):
    """Causal blocks, with the first and the last one forced."""
    column, row = torch.arange(blocks), torch.arange(rows)[:, None]
    last = (row + 1) * blocks // rows
    allowed, forced = column < last, (column == 0) | (column == last - 1)
    if per_list is None:
        return allowed, forced
    return allowed.expand(per_list, -1, -1), forced & (torch.rand(per_list, rows, 1) < 0.5)


# Equal scores keep the order of their indices, in short rows and in long ones.
@pytest.mark.parametrize("blocks", [1, 7, 63, 64, 500, 3000])
@pytest.mark.parametrize("per_list", [None, 3])
@pytest.mark.parametrize(
    "scores",
    [
        lambda shape: torch.randn(shape, generator=dice(0)) * 50,
        lambda shape: torch.randint(-2, 3, shape, generator=dice(1)) * 0.5,
        lambda shape: torch.zeros(shape).neg_(),
        lambda shape: torch.tensor([float("nan"), float("-inf"), float("inf"), -0.0, 0.0, -1e38])[
            torch.randint(6, shape, generator=dice(2))
        ],
    ],
    ids=["random", "ties", "zeros", "not finite"],
)
def test_rank(scores, blocks, per_list):
    shape, (allowed, forced) = (3, 5, blocks), masks(5, blocks, per_list)
    got = native.rank(scores(shape), allowed, forced)
    assert torch.equal(got, rank.plain(scores(shape), allowed, forced))


def test_masks_of_one_row_hold_for_all_rows():
    scores, (allowed, forced) = torch.randn(2, 5, 70, generator=dice(6)), masks(1, 70)
    for masks_of_one in ((allowed, forced), (allowed[None], forced[None])):
        got = native.rank(scores, *masks_of_one)
        assert torch.equal(got, rank.plain(scores, *masks_of_one))


def test_rank_leaves_to_pytorch_what_it_cannot_take():
    allowed, forced = masks(5, 8)
    assert native.rank(torch.zeros(2, 5, 8, dtype=torch.float64), allowed, forced) is NotImplemented
    assert rank(torch.zeros(2, 5, 8, dtype=torch.float64), allowed, forced).shape == (2, 5, 8)


@pytest.mark.parametrize("reduce", ["sum", "rms"])
@pytest.mark.parametrize(
    ("rows", "blocks", "m"), [(6, 6, 6), (6, 96, 90), (40, 160, 160), (1, 9, 2)]
)
def test_rank_and_test(rows, blocks, m, reduce):
    block = torch.arange(rows).repeat_interleave(5)
    allowed, forced = masks(rows, blocks)
    mass = torch.rand(4, len(block), m, generator=dice(3)).pow(4) * allowed[block, :m]
    mass[:, :, 0] += 1e-3
    mass /= mass.sum(-1, keepdim=True)
    sample = (torch.arange(len(block)) % 5)[None] == torch.tensor([[0], [0], [2]])
    sample[0] |= sample[2]
    call = (mass, block, sample, allowed, forced)
    got, want = (
        native.rank_and_test(*call, reduce=reduce),
        rank_and_test.plain(*call, reduce=reduce),
    )
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=1e-4)


def test_rank_and_test_shows_a_row_that_is_nan():
    mass = torch.full((1, 4, 6), 1 / 6)
    mass[0, 3] = float("nan")
    sample = torch.tensor([[True, True, False, False]] * 2 + [[False, False, True, True]])
    allowed, forced = torch.ones(1, 6, dtype=torch.bool), torch.zeros(1, 6, dtype=torch.bool)
    call = (mass, torch.zeros(4, dtype=torch.int64), sample, allowed, forced)
    for function in (native.rank_and_test, rank_and_test.plain):
        assert bool(function(*call, reduce="rms")[1].isnan().all())


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 70), (2, 1, 700)])
def test_compact(shape, share):
    mask = torch.rand(shape, generator=dice(4)) < share
    got, want = native_compaction.compact(mask), compact.plain(mask)
    assert torch.equal(got[1], want[1])
    assert got[0].shape == want[0].shape
    valid = torch.arange(want[0].shape[2]) < want[1][..., None]
    assert torch.equal(got[0][valid], want[0][valid])
    assert bool(((got[0] >= 0) & (got[0] < shape[2])).all())


def test_threads_change_nothing(monkeypatch):
    allowed, forced = masks(20, 80)
    mass = torch.rand(7, 60, 80, generator=dice(5))
    block, sample = torch.arange(20).repeat_interleave(3), torch.ones(3, 60, dtype=torch.bool)
    results = []
    for n in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n: n)
        results.append(
            (
                native.rank(mass, allowed[block], forced[block]),
                *native.rank_and_test(mass, block, sample, allowed, forced, reduce="sum"),
                *native_compaction.compact(mass > 0.5),
            )
        )
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
