"""Recall is the dense attention mass of the kept keys."""

import pytest
import torch

from sparse_patch import BlockPlan, recall


def case(q_len=100, kv_len=130):
    torch.manual_seed(0)
    q, k = torch.randn(4, q_len, 16) * 2, torch.randn(2, kv_len, 16)
    mask = torch.rand(4, -(-q_len // 16), -(-kv_len // 16)) < 0.5
    plan = BlockPlan.from_block_mask(mask, block_q=16, block_k=16, q_len=q_len, kv_len=kv_len)
    causal = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    scores = (q @ k.repeat_interleave(2, 0).mT / 4).masked_fill(~causal, float("-inf"))
    return q, k, plan, (scores.softmax(-1) * plan.to_dense_mask()).sum(-1)


def test_recall_is_the_kept_probability():
    q, k, plan, kept = case()
    torch.testing.assert_close(recall(q, k, plan), kept.mean(-1), atol=1e-6, rtol=0)


def test_recall_of_some_rows_takes_whole_blocks_from_the_end():
    q, k, plan, kept = case()
    some = recall(q, k, plan, rows=48)  # 3 of 7 blocks: every second from the last
    rows = torch.cat([torch.arange(b * 16, min(b * 16 + 16, 100)) for b in (6, 4, 2, 0)])
    torch.testing.assert_close(some, kept[:, rows].mean(-1), atol=1e-6, rtol=0)


def test_everything_kept_is_recall_one():
    q, k, _, _ = case()
    plan = BlockPlan(100, 130, 16, window=130)
    assert recall(q, k, plan).tolist() == pytest.approx([1.0] * 4)


def test_recall_under_a_soft_cap_is_that_of_the_capped_logits():
    torch.manual_seed(0)
    q, k = 3 * torch.randn(4, 40, 16), torch.randn(2, 50, 16)
    plan = BlockPlan(40, 50, 16, sink=3, window=9)
    scores = 1.5 * torch.tanh(q @ k.repeat_interleave(2, 0).mT / 4 / 1.5)
    causal = torch.ones(40, 50, dtype=torch.bool).tril(10)
    probs = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    want = (probs * plan.to_dense_mask()).sum(-1).mean(-1)
    got = recall(q, k, plan, softcap=1.5)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    assert bool(((got - recall(q, k, plan)).abs() > 1e-3).all())
