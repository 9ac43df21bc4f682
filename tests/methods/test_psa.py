"""Pyramid sparse attention: levels by their definition, causal rules, what pooling must not do."""

import dataclasses

import pytest
import torch
from sparse_patch_kernels import block_sparse_attention
from sparse_patch_kernels.cpu import forward, pooled
from sparse_patch_kernels.estimators.token_scores import token_scores

from sparse_patch import get_method
from sparse_patch.methods import psa
from sparse_patch.selection import count_top_p, mass_of
from tests.golden.gen_inputs import make_qkv

BLOCK, SKIP = 32, 99
ENDS = (0.5, 0.7, 0.8, 0.9)


def generated(n=512, heads=4, kv_heads=2, seed=3):
    arrays = make_qkv(seed, n, heads, kv_heads, 64)
    return [torch.tensor(a[0]).transpose(0, 1) for a in arrays]


def plan_of(q, k, **params):
    params = {"block_size": BLOCK, "thresholds": ENDS, **params}
    return get_method("psa", **params).plan(q, k, scale=0.125, q_offset=k.shape[1] - q.shape[1])


def levels_of(plan):
    """int `[heads, q_blocks, k_blocks]`: tokens per key of each block, or SKIP."""
    level = torch.full((plan.heads, plan.n_q_blocks, -(-plan.kv_len // BLOCK)), SKIP)
    for run in plan.runs:
        start = run.expand(plan.heads)[0]
        head, row, slot = run.valid(plan.heads).nonzero(as_tuple=True)
        block = (start[head, row, slot] // BLOCK).long()
        assert bool((level[head, row, block] == SKIP).all())  # no block at two levels
        level[head, row, block] = run.pool
    return level


def coarsest_by_loops(k, similarity):
    """Largest pool of each block of `k [kv_len, dim]` such that it and all smaller ones may be."""
    result = []
    for first in range(0, len(k), BLOCK):
        keys, coarsest = k[first : first + BLOCK].double(), 1
        for pool in (2, 4, 8):
            groups = range(0, BLOCK - pool + 1, pool)
            cosines = [torch.cosine_similarity(keys[g], keys[g + pool - 1], 0) for g in groups]
            if sum(cosines) / len(cosines) < similarity:
                break
            coarsest = pool
        result.append(coarsest)
    return result


def levels_by_loops(q, k, ends=ENDS, similarity=0.5, sink=1, local=2):
    """The definition, on a grid that starts at position 0; rows are those that hold a query."""
    scores = token_scores(q, k, 0.125, block=BLOCK, stride_q=16).double().exp()
    heads, rows, blocks = scores.shape
    first_row = blocks - rows
    level = torch.full(scores.shape, SKIP)
    for head in range(heads):
        whole = k[head * len(k) // heads][: k.shape[1] // BLOCK * BLOCK]
        coarsest = [*coarsest_by_loops(whole, similarity), 1]
        for row in range(rows):
            own = first_row + row
            mass = (scores[head, row, : own + 1] / scores[head, row, : own + 1].sum()).tolist()
            forced = {b for b in range(own + 1) if b < sink or b > own - local}
            before = 0.0
            for block in sorted(range(own + 1), key=lambda b: (b not in forced, -mass[b], b)):
                fits = [pool for pool, end in zip((1, 2, 4, 8), ends, strict=True) if before < end]
                if block in forced:
                    level[head, row, block] = 1
                elif fits:
                    level[head, row, block] = min(fits[0], coarsest[block])
                before += mass[block]
    return level


@pytest.mark.parametrize("n", [512, 490])
@pytest.mark.parametrize(
    "params", [{}, {"similarity": 0.9}, {"similarity": -1}, {"sink_blocks": 0, "local_blocks": 1}]
)
def test_levels_follow_their_definition(n, params):
    q, k, _ = (x[:, :n] for x in generated())
    names = {"sink_blocks": "sink", "local_blocks": "local", "similarity": "similarity"}
    want = levels_by_loops(q, k, **{names[key]: value for key, value in params.items()})
    got = levels_of(plan_of(q, k, **params))
    assert torch.equal(got, want)
    if params.get("similarity") == -1:  # the test sees every level
        assert {1, 2, 4, 8, SKIP} == set(got.unique().tolist())


@pytest.mark.parametrize(("offset", "n"), [(256, 512), (224, 500)])
def test_a_later_chunk_has_the_levels_of_the_whole_prompt(offset, n):
    q, k, _ = (x[:, :n] for x in generated())
    whole, chunk = plan_of(q, k), plan_of(q[:, offset:], k)
    assert torch.equal(levels_of(chunk), levels_of(whole)[:, offset // BLOCK :])


@pytest.mark.parametrize("offset", [1, 100, 301])
def test_an_unaligned_chunk_takes_the_finer_of_two_levels(offset):
    q, k, v = generated()
    chunk = plan_of(q[:, offset:], k)
    rows = levels_by_loops(q[:, offset:], k)
    got = levels_of(chunk)
    for block in range(chunk.n_q_blocks):
        first, end = chunk.row_range(block)
        mine = {first // BLOCK, (end - 1) // BLOCK}
        want = torch.stack([rows[:, r - offset // BLOCK] for r in mine]).amin(0)
        assert torch.equal(got[:, block], want)
    out = block_sparse_attention(q[:, offset:], k, v, chunk)
    want = block_sparse_attention(q[:, offset:], k, v, chunk, backend="reference")
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)


def test_a_block_that_holds_nearly_all_is_whole():
    """It crosses every threshold at once, and is the last one to drop."""
    q, k, _ = generated()
    k[:, 100] = 8 * q.view(2, 2, 512, 64).mean((1, 2))
    level = levels_of(plan_of(q, k, sink_blocks=0))
    mass = mass_of(
        token_scores(q, k, 0.125, block=BLOCK, stride_q=16), torch.ones(16, 16).tril().bool()
    )
    alone = mass[..., 3] > ENDS[-1]
    assert bool(alone.any())
    assert bool((level[..., 3][alone] == 1).all())


@pytest.mark.parametrize(("q_len", "n"), [(512, 512), (477, 477), (211, 477)])
def test_own_latest_first_and_partial_blocks_are_whole(q_len, n):
    q, k, _ = (x[:, :n] for x in generated())
    plan = plan_of(q[:, -q_len:], k, thresholds=(1e-6, 2e-6, 3e-6, 1.0), similarity=-1)
    level = levels_of(plan)
    assert bool((level == 8).any())
    for block in range(plan.n_q_blocks):
        first, end = plan.row_range(block)
        assert bool((level[:, block, 0] == 1).all())
        latest = slice(max(0, first // BLOCK - 1), (end - 1) // BLOCK + 1)
        assert bool((level[:, block, latest] == 1).all())
    assert bool(((level[..., -1] == 1) | (level[..., -1] == SKIP)).all())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("q_len", [490, 200])
def test_it_never_looks_ahead(q_len, backend):
    q, k, v = (x[:, :490] for x in generated())
    q = q[:, -q_len:]
    plan = plan_of(q, k, similarity=-1)
    before = block_sparse_attention(q, k, v, plan, backend=backend)
    for late in range(490 - q_len + 1, 490, 61):
        k2, v2 = k.clone(), v.clone()
        k2[:, late:], v2[:, late:] = 9.0, 9.0
        after = block_sparse_attention(q, k2, v2, plan, backend=backend)
        row = late - (490 - q_len)
        assert torch.equal(after[:, :row], before[:, :row])
        assert not torch.allclose(after[:, row:], before[:, row:])


def test_keys_and_values_that_agree_lose_nothing():
    q, k, v = generated()
    k, v = (x[:, ::8].repeat_interleave(8, 1) for x in (k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0), is_causal=True
    )
    plan = plan_of(q, k, thresholds=(0.1, 0.2, 0.3, 1.0), similarity=0.999)
    assert (levels_of(plan) == 8).any()
    assert plan.density < 0.6
    torch.testing.assert_close(block_sparse_attention(q, k, v, plan), exact, atol=1e-4, rtol=0)


def test_keys_that_disagree_are_not_pooled():
    q, k, _ = generated()
    k[0, 64:96:2] *= -1  # block 2 of KV head 0: neighbours point apart
    level = levels_of(plan_of(q, k, thresholds=(0.01, 0.02, 0.03, 1.0)))
    assert set(level[:2, 5:, 2].unique().tolist()) == {1}
    assert 8 in level[2:, 5:, 2]


def test_equal_thresholds_are_plain_top_p():
    q, k, _ = generated()
    level = levels_of(plan_of(q, k, thresholds=(0.8,) * 4))
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    forced = causal & ~causal.tril(-2)
    forced[:, 0] = True
    mass = mass_of(token_scores(q, k, 0.125, block=BLOCK, stride_q=16), causal)
    assert torch.equal((level == 1).sum(-1), count_top_p(mass, forced, 0.8))
    assert set(level.unique().tolist()) == {1, SKIP}


def test_density_counts_a_group_as_one_key():
    q, k, _ = generated()
    plan = plan_of(q, k, similarity=-1)
    level = levels_of(plan)
    kept = torch.where(level == SKIP, 0.0, BLOCK / level).double().sum()
    assert plan.density == pytest.approx(float(kept / (4 * BLOCK * 16 * 17 / 2)))


def test_more_of_a_row_costs_more_and_errs_less():
    q, k, v = generated()
    exact = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0), is_causal=True
    )
    densities, errors = [], []
    for ends in [(0.3, 0.4, 0.5, 0.6), (0.6, 0.7, 0.8, 0.9), (0.9, 0.92, 0.94, 0.96)]:
        plan = plan_of(q, k, thresholds=ends)
        out = block_sparse_attention(q, k, v, plan)
        densities.append(plan.density)
        errors.append(-float((out - exact).norm() / exact.norm()))
    assert densities == sorted(densities)
    assert errors == sorted(errors)


def test_heads_do_not_influence_each_other():
    q, k, _ = generated()
    level = levels_of(plan_of(q, k))
    for head in range(4):
        alone = levels_of(plan_of(q[head : head + 1], k[head // 2 : head // 2 + 1]))
        assert torch.equal(alone[0], level[head])


def test_the_cpu_backend_takes_its_fast_paths(monkeypatch):
    q, k, v = generated()
    plan = plan_of(q, k, similarity=-1)
    want = block_sparse_attention(q, k, v, plan, backend="reference")

    def never(*_):
        raise AssertionError("a slow path was taken")

    monkeypatch.setattr(forward, "attend_any", never)
    monkeypatch.setattr(pooled, "_masked", never)
    got = block_sparse_attention(q, k, v, plan, backend="cpu")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_exact_where_sparse_makes_no_sense():
    q, k, _ = generated()
    assert plan_of(q, k, thresholds=(1, 1, 1, 1)) is None
    assert plan_of(q[:, : 3 * BLOCK], k[:, : 3 * BLOCK]) is None
    assert plan_of(q[:, : 3 * BLOCK + 1], k[:, : 3 * BLOCK + 1]) is not None
    assert plan_of(q[:, -BLOCK + 1 :], k) is None


def test_a_broken_query_keeps_its_forced_blocks():
    q, k, _ = generated()
    q[:, 300] = float("nan")  # not sampled
    q[:, 320] = float("nan")
    level = levels_of(plan_of(q, k))
    assert bool((level[:, 10, [0, 9, 10]] == 1).all())
    assert bool((level[:, 10, 1:9] == SKIP).all())


def test_the_paper_preset_and_lists_from_json():
    assert get_method("psa", preset="paper").thresholds == (0.4, 0.5, 0.6, 0.8)
    assert get_method("psa", thresholds=[0.1, 0.2, 0.3, 0.4]).thresholds == (0.1, 0.2, 0.3, 0.4)
    assert dataclasses.replace(get_method("psa"), similarity=-1) == psa.PSA(similarity=-1)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"thresholds": (0.5, 0.4, 0.6, 0.8)}, "ascending"),
        ({"thresholds": (0.5, 0.6, 0.8)}, "4 ascending numbers"),
        ({"thresholds": (0.0, 0.5, 0.6, 0.8)}, "> 0 and <= 1"),
        ({"thresholds": (0.5, 0.6, 0.8, 1.5)}, "> 0 and <= 1"),
        ({"thresholds": (0.5, 0.6, 0.8, "x")}, "> 0 and <= 1"),
        ({"thresholds": (0.5, float("nan"), 0.8, 0.9)}, "> 0 and <= 1"),
        ({"thresholds": 0.5}, "a tuple"),
        ({"similarity": 1.1}, "similarity=1.1"),
        ({"block_size": 8}, "block_size=8"),
        ({"local_blocks": 0}, "local_blocks=0"),
        ({"threshold": 1}, "did you mean 'thresholds'"),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        get_method("psa", **params)
