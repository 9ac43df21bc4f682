"""BigBird against loops: first blocks, a window, and lots that depend on no input."""

import itertools

import pytest
import torch

import sparse_patch
from sparse_patch import get_method
from tests.methods import scorer_checks as checks
from tests.zoo import tiny_model

BLOCK = 16


def plan_of(q, k, offset=0, **params):
    method = get_method("bigbird", **{"block_size": BLOCK, **params})
    return method.plan(q, k, scale=1.0, q_offset=offset)


def drawn(n, offset=0, **params):
    """bool `[rows, blocks]` of a call of `n` keys: blocks that are kept by lot only."""
    params = {"sink_blocks": 0, "local_blocks": 1, **params}
    plan = plan_of(torch.zeros(4, n - offset, 1), torch.zeros(2, n, 1), offset, **params)
    mask = checks.listed(plan, -(-n // BLOCK), BLOCK)[0]
    row = torch.arange(len(mask))[:, None] + offset // BLOCK
    return mask & (torch.arange(mask.shape[1]) < row)


def murmur(x):
    """The finalizer of MurmurHash3, in whole numbers of any size."""
    x %= 2**32
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def keeps(sink, local, lots, seed):
    def of_row(_, m):
        forced = checks.forced(m, (m + 1) * BLOCK, BLOCK, BLOCK, sink, local)
        lot = {n: murmur(murmur(murmur(seed) + m) + n) for n in set(range(m + 1)) - forced}
        return forced | checks.best(lot, lots)

    return of_row


@pytest.mark.parametrize("call", checks.CALLS, ids=str)
@pytest.mark.parametrize(
    ("sink", "local", "lots", "seed"), [(2, 3, 3, 0), (0, 1, 1, 7), (1, 2, 0, 0), (1, 1, 9, 2**31)]
)
def test_equals_loops(call, sink, local, lots, seed):
    q, k, v = checks.inputs(*call)
    params = {"sink_blocks": sink, "local_blocks": local, "random_blocks": lots, "seed": seed}
    plan = plan_of(q, k, call[2], **params)
    checks.assert_keeps(plan, keeps(sink, local, lots, seed), BLOCK, BLOCK)
    if seed == 0:
        checks.assert_lawful(plan, q, k, v)


def test_every_row_draws_as_many_blocks_as_it_is_told():
    mask = drawn(64 * BLOCK, random_blocks=5)
    past = torch.arange(64)
    assert torch.equal(mask.sum(-1), past.clamp(max=5))


def test_all_heads_share_one_list_that_no_input_moves():
    q, k, _ = checks.inputs("noise", 500, 0)
    (run,), (other,) = plan_of(q, k).runs, plan_of(-q, 2 * k).runs
    assert run.start.shape[0] == 1
    assert torch.equal(run.start, other.start)
    assert torch.equal(run.count, other.count)


@pytest.mark.parametrize("offset", [0, 10 * BLOCK])
def test_a_row_draws_the_same_in_a_chunk_and_in_a_longer_prompt(offset):
    whole = drawn(40 * BLOCK)
    part = drawn(30 * BLOCK, offset)
    assert torch.equal(part, whole[offset // BLOCK : 30, :30])


def test_no_block_is_drawn_much_more_often_than_another():
    """Of 1000 rows' draws of 20 among 256 and more, a block gets so many, give or take chance."""
    mask = drawn(1256 * BLOCK, random_blocks=20)[256:]
    chance = 20 / torch.arange(256, 1256)
    got, expected = mask[:, :256].sum(0), chance.sum()
    spread = (chance * (1 - chance)).sum().sqrt()
    assert (got - expected).abs().max() < 4.5 * spread
    assert got.double().std() == pytest.approx(float(spread), rel=0.25)


def test_rows_seeds_and_layers_draw_apart():
    """Of 8 blocks drawn from 200 or more, another draw holds one in 25 at most, but for chance."""
    one, other = (drawn(400 * BLOCK, random_blocks=8, seed=seed)[200:] for seed in (0, 1))
    for two in (other, one.roll(1, 0)):
        assert 0 < (one & two).sum() / one.sum() < 0.06
    method = get_method("bigbird", seed=3)
    assert method.for_layer(0) == method
    assert method.for_layer(2) == get_method("bigbird", seed=5)
    assert get_method("bigbird", seed=2**32 - 1).for_layer(1).seed == 0


@torch.no_grad()
def test_each_layer_of_a_model_draws_its_own():
    model = tiny_model("llama")
    params = {"block_size": BLOCK, "random_blocks": 1, "min_length": 0, "min_queries": 0}
    starts = []

    def observer(state, q, k, v, call, run):
        starts.append(run.plan.runs[0].start)
        return run.out

    with sparse_patch.patch(model, "bigbird", **params) as handle:
        handle.observe(observer)
        model(input_ids=torch.randint(6, 128, (1, 300)))
    assert len(starts) == model.config.num_hidden_layers > 1
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(starts, 2))


def test_exact_where_nothing_is_left_out():
    q, k = torch.zeros(4, 8 * BLOCK + 1, 8), torch.zeros(2, 8 * BLOCK + 1, 8)
    assert plan_of(q, k) is not None  # the ninth block has four others, of which three are drawn
    assert plan_of(q[:, 1:], k[:, 1:]) is None


def test_defaults_are_those_of_the_paper():
    method = get_method("bigbird")
    assert (method.block_size, method.random_blocks) == (64, 3)
    assert (method.sink_blocks, method.local_blocks) == (2, 3)


@pytest.mark.parametrize(
    ("params", "message"),
    [({"random_blocks": -1}, "random_blocks=-1"), ({"seed": 2**32}, "seed=4294967296")],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        get_method("bigbird", **params)
