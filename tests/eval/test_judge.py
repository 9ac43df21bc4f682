"""Density, recall and output error of a plan."""

import pytest
import torch
from sparse_patch_eval.ask.capture import Attention
from sparse_patch_eval.ask.judge import dense_output, judge, output_error, plan_of

import sparse_patch
from sparse_patch import BlockPlan, RunList


def attention(n=192, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(h, n, 16, generator=g) for h in (4, 2, 2))
    return Attention(2 * q, 2 * k, v, 0.2)


def block_plan(n=192, block=16, pool=1):
    mask = torch.rand(4, 12, 12, generator=torch.Generator().manual_seed(1)) < 0.4
    mask |= torch.eye(12, dtype=torch.bool)
    return BlockPlan.from_block_mask(mask, block_q=block, block_k=block, q_len=n, kv_len=n)


@pytest.mark.parametrize(
    "plan",
    [
        block_plan(),
        BlockPlan(192, 192, 32, sink=5, window=40),
        BlockPlan(192, 192, 16, runs=block_plan().runs, sink=20, window=3),
        BlockPlan(
            192, 192, 16, key_order=torch.arange(192).view(1, 6, 32).flip(-1).reshape(1, -1),
            runs=(RunList.from_mask(torch.ones(1, 12, 12, dtype=torch.bool).tril(), 16),),
        ),
    ],
)  # fmt: skip
def test_density_on_all_rows_is_the_plans(plan):
    assert judge(attention(), plan).density == pytest.approx(plan.density)


def test_pooled_groups_count_as_one_key_each():
    mask = torch.ones(1, 12, 12, dtype=torch.bool).tril(-1)
    pooled = RunList.from_mask(mask, 16, pool=8)
    local = BlockPlan.from_block_mask(torch.eye(12, dtype=torch.bool)[None], block_q=16, block_k=16)
    plan = BlockPlan(192, 192, 16, runs=(*local.runs, pooled))
    assert judge(attention(), plan).density == pytest.approx(plan.density)


def test_recall_is_that_of_the_library_per_head():
    one = attention()
    want = sparse_patch.recall(one.q, one.k, block_plan(), scale=one.scale, rows=64)
    assert judge(one, block_plan(), rows=64).recall == tuple(want.tolist())


def test_no_plan_is_density_1_and_recall_1_and_no_error():
    one = attention()
    assert judge(one, None) == judge(one, None, rows=3)
    assert (judge(one, None).density, judge(one, None).recall) == (1.0, (1.0,) * 4)
    assert output_error(one, None, dense_output(one)) == 0


def test_output_error_is_the_norm_of_the_difference_per_head():
    one = attention()
    k, v = (x.repeat_interleave(2, 0) for x in (one.k, one.v))
    scores = one.q @ k.mT * one.scale
    causal = torch.ones(192, 192, dtype=torch.bool).tril()

    def attend(mask):
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v

    dense, sparse = attend(causal), attend(block_plan().to_dense_mask())
    torch.testing.assert_close(dense_output(one), dense, atol=1e-5, rtol=1e-4)
    want = ((sparse - dense).norm(dim=(1, 2)) / dense.norm(dim=(1, 2))).mean()
    got = output_error(one, block_plan(), dense_output(one))
    assert got == pytest.approx(float(want), rel=1e-4)
    assert got > 0.1


def test_layers_that_patch_keeps_dense_have_no_plan():
    method = sparse_patch.get_method("a_shape", window=16, sink=4, dense_layers=2)
    assert plan_of(method, 1, attention()) is None
    assert plan_of(method, 2, attention()).window == 16
