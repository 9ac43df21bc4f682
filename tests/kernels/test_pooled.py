"""Pooled runs: what they mean, which way through the CPU backend they take, what that costs."""

import dataclasses
import math

import pytest
import torch
from sparse_patch_kernels import (
    BlockPlan,
    RunList,
    block_sparse_attention,
)
from sparse_patch_kernels.cpu import forward, native, pooled

from tests.memory import largest_tensor

N, BLOCK = 256, 32
N_BLOCKS = N // BLOCK


@pytest.fixture(autouse=True, params=["compiled kernel", "PyTorch"])
def way_of_the_cpu(request, monkeypatch):
    """Both ways through the CPU backend; pooled runs are PyTorch's in either."""
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "_kernel", lambda: None)


def sequence(heads=4, kv_heads=2, dim=16, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (heads, kv_heads, kv_heads)
    return [torch.randn(h, N, dim).to(dtype) for h in shapes]


def block_plan(level, q_len=N):
    """Level 1 blocks are kept, level p blocks are pooled p to one, level 0 blocks are left out."""
    runs = [RunList.from_mask(level == p, BLOCK, int(p)) for p in level.unique() if p]
    return BlockPlan(q_len, N, BLOCK, tuple(runs))


def random_levels(choices, heads=4, seed=0):
    """Diagonal blocks level 1, each earlier block one of `choices`, later ones none."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.tensor(choices)[
        torch.randint(0, len(choices), (heads, N_BLOCKS, N_BLOCKS), generator=generator)
    ]
    level = level.tril(-1)
    level.diagonal(dim1=1, dim2=2).fill_(1)
    return level


def by_definition(q, k, v, plan, scale):
    """Row by row in float64: every visible key, and every visible group as one key."""
    q, k, v = q.double(), k.double(), v.double()
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_full(q.shape[:2], float("-inf"))
    for head in range(q.shape[0]):
        kv_head, mine = head * k.shape[0] // q.shape[0], head * plan.heads // q.shape[0]
        for row in range(q.shape[1]):
            position, block = plan.kv_len - plan.q_len + row, row // plan.block_q
            order = range(plan.kv_len)
            if plan.key_order is not None:
                order = plan.key_order[mine * len(plan.key_order) // plan.heads].tolist()
            keys, values, weights = [], [], []
            for run in plan.runs:
                starts = run.start[mine * len(run.start) // plan.heads, block]
                count = run.count[mine * len(run.count) // plan.heads, block]
                for start in starts[:count].tolist():
                    for first in range(start, start + run.width, run.pool):
                        slots = range(first, first + run.pool)
                        if slots[-1] >= plan.kv_len or max(order[s] for s in slots) > position:
                            continue
                        group = [order[s] for s in slots]
                        keys.append(sum(k[kv_head, j] for j in group) / run.pool)
                        values.append(sum(v[kv_head, j] for j in group) / run.pool)
                        weights.append(float(run.pool))
            if keys:
                logits = torch.stack(keys) @ q[head, row] * scale
                mass = torch.tensor(weights, dtype=torch.float64) * logits.exp()
                out[head, row] = mass @ torch.stack(values) / mass.sum()
                lse[head, row] = mass.sum().log()
    return out, lse


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("q_len", [N, 100])
def test_the_reference_is_the_definition(q_len, ordered):
    q, k, v = sequence(heads=2, kv_heads=1, dim=8)
    runs = block_plan(random_levels([0, 1, 2, 4, 8, 32], heads=2)).runs
    n_q = -(-q_len // BLOCK)
    runs = tuple(RunList(r.start[:, -n_q:], r.count[:, -n_q:], r.width, r.pool) for r in runs)
    order = torch.stack([torch.randperm(N) for _ in range(2)]) if ordered else None
    # At q_len = 100 the rows of a block are 28 positions before those the lists were made for.
    plan = BlockPlan(q_len, N, BLOCK, runs, key_order=order)
    got = block_sparse_attention(
        q[:, -q_len:], k, v, plan, scale=0.3, backend="reference", return_lse=True
    )
    want = by_definition(q[:, -q_len:], k, v, plan, 0.3)
    for mine, truth in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), truth, atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("pool", [2, 8, 32])
def test_pooling_equal_neighbours_changes_nothing(backend, pool):
    q, k, v = sequence(dtype=torch.float64)
    k, v = (x[:, ::pool].repeat_interleave(pool, 1) for x in (k, v))
    level = random_levels([0, 1, pool])
    pooled, whole = block_plan(level), block_plan((level > 0).int())
    got = block_sparse_attention(q, k, v, pooled, backend=backend, return_lse=True)
    want = block_sparse_attention(q, k, v, whole, backend=backend, return_lse=True)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


PYRAMID = random_levels([0, 0, 0, 1, 2, 4, 8])
PLANS = {
    "rectified": block_plan(random_levels([1, BLOCK, BLOCK, BLOCK])),
    "pyramid": block_plan(PYRAMID),
    "pyramid, ordered": dataclasses.replace(
        block_plan(PYRAMID), key_order=torch.randperm(N)[None]
    ),
    "no token list": dataclasses.replace(block_plan(PYRAMID), runs=block_plan(PYRAMID).runs[1:]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("rectified", ["_aligned", "_masked"]),
        ("pyramid", ["_aligned", *["_gathered"] * 3]),
        ("pyramid, ordered", ["attend_any", *["_masked"] * 3]),
        ("no token list", ["attend_any", *["_gathered"] * 3]),
    ],
)
def test_the_token_list_keeps_its_fast_path_and_sparse_levels_gather(monkeypatch, name, ways):
    taken = []

    def watch(module, way):
        original = getattr(module, way)
        monkeypatch.setattr(module, way, lambda *args: (taken.append(way), original(*args))[1])

    monkeypatch.setattr(native, "_kernel", lambda: None)
    watch(forward, "_aligned")
    watch(forward, "attend_any")
    watch(pooled, "_gathered")
    watch(pooled, "_masked")
    block_sparse_attention(*sequence(), PLANS[name], backend="cpu")
    assert taken == ways


@pytest.mark.parametrize("tile", [1, 5000])
@pytest.mark.parametrize("name", PLANS)
def test_both_ways_agree_in_tiles_of_any_size(monkeypatch, name, tile):
    q, k, v = sequence()
    want = block_sparse_attention(q, k, v, PLANS[name], backend="reference", return_lse=True)
    monkeypatch.setattr(pooled, "_TILE", tile)
    monkeypatch.setattr("sparse_patch_kernels.cpu.fused._TILE", tile)
    gathered = block_sparse_attention(q, k, v, PLANS[name], backend="cpu", return_lse=True)
    monkeypatch.setattr(pooled, "_is_sparse_past", lambda *_: False)
    masked = block_sparse_attention(q, k, v, PLANS[name], backend="cpu", return_lse=True)
    for got in (gathered, masked):
        torch.testing.assert_close(got, want, atol=3e-6, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_run_past_the_end_is_cut_to_whole_groups(backend):
    """A plan for full blocks, run on lengths that end inside the last: 10 of 16 keys are there."""
    q, k, v = (x[:, :26] for x in sequence())
    run = RunList(torch.tensor([[[0], [16]]]).int(), torch.ones(1, 2).int(), 16, 4)
    plan = BlockPlan(32, 32, 16, (run,))
    out, lse = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    alone = [
        math.log(4) + float(q[0, 25] @ k[0, first : first + 4].mean(0)) / 4 for first in (16, 20)
    ]
    assert float(lse[0, 25]) == pytest.approx(math.log(sum(map(math.exp, alone))), abs=3e-6)
    assert bool(lse[:, 16:19].isneginf().all())  # before the first group of their block is whole
    assert bool((out[:, 16:19] == 0).all())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", PLANS)
def test_large_logits_stay_finite_and_nan_stays_in_its_row(backend, name):
    q, k, v = sequence()
    out = block_sparse_attention(q * 1e4, k, v, PLANS[name], backend=backend)
    assert bool(torch.isfinite(out).all())
    q[:, -5] = float("nan")
    out = block_sparse_attention(q, k, v, PLANS[name], backend=backend)
    assert bool(out[:, -5].isnan().all())
    assert not bool(out[:, :-5].isnan().any())
    assert not bool(out[:, -4:].isnan().any())


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("pool", [2, 64])
def test_cpu_never_builds_a_square(monkeypatch, pool, ordered):
    n, block = 2048, 64
    monkeypatch.setattr(pooled, "_TILE", 1 << 14)
    monkeypatch.setattr("sparse_patch_kernels.cpu.fused._TILE", 1 << 14)
    q, k, v = torch.randn(2, n, 8), torch.randn(1, n, 8), torch.randn(1, n, 8)
    past = torch.ones(2, n // block, n // block, dtype=torch.bool).tril(-1)
    order = torch.arange(n)[None] if ordered else None
    plan = BlockPlan(n, n, block, (RunList.from_mask(past, block, pool),), key_order=order)
    largest = largest_tensor(lambda: block_sparse_attention(q, k, v, plan, backend="cpu"))
    assert 0 < largest <= block * n // 2 + n  # one query block against every second key
