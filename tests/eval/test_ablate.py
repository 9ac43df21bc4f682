"""A method on some heads: the others see all, and the chosen ones what they did."""

import pytest
import torch
from study.ablate import OnlyHeads, show_all

import sparse_patch
from sparse_patch import BlockPlan, RunList

N = 300


def qk(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, N, 16, generator=g), torch.randn(2, N, 16, generator=g)


def masks(plan):
    mask = plan.to_dense_mask()
    return mask.repeat_interleave(4 // mask.shape[0], 0)


PLANS = {
    "per head": sparse_patch.get_method("flexprefill", gamma=0.5, min_budget=1, block_size=32).plan(
        *qk(), scale=0.25, q_offset=0
    ),
    "shared ranking": sparse_patch.get_method(
        "proxyattn", gamma=0.6, min_budget=32, block_size=32
    ).plan(*qk(), scale=0.25, q_offset=0),
    "static": BlockPlan(N, N, 64, sink=3, window=20),
    "later chunk": BlockPlan(100, N, 64, sink=3, window=20),
    "key order": BlockPlan(
        N,
        N,
        64,
        (RunList.from_mask(torch.ones(1, 5, 9, dtype=torch.bool).tril(), 32),),
        key_order=torch.randperm(N, generator=torch.Generator().manual_seed(0))[None],
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_other_heads_see_all_and_the_chosen_ones_the_same(name):
    plan = PLANS[name]
    mixed = masks(show_all(plan, 4, frozenset({1, 2}), torch.device("cpu")))
    causal = torch.ones(plan.q_len, N, dtype=torch.bool).tril(N - plan.q_len)
    assert torch.equal(mixed[[1, 2]], masks(plan)[[1, 2]])
    assert not mixed[1].equal(causal)
    assert torch.equal(mixed[0], causal)
    assert torch.equal(mixed[3], causal)


def test_layers_without_chosen_heads_run_exact_and_those_with_all_the_plain_method():
    base = sparse_patch.get_method("a_shape", sink=3, window=20)
    every = frozenset(range(4))
    method = OnlyHeads(method=base, heads={1: frozenset({0}), 2: every})
    q, k = qk()
    plans = [method.for_layer(n).plan(q, k, scale=0.25, q_offset=0) for n in range(3)]
    assert plans[0] is None
    assert len(plans[1].runs) == 1
    assert plans[2].runs == ()


def test_layers_that_the_method_keeps_dense_stay_so():
    base = sparse_patch.get_method("a_shape", sink=3, window=20, dense_layers=2)
    method = OnlyHeads(method=base, heads={1: frozenset({0})})
    assert method.for_layer(1).plan(*qk(), scale=0.25, q_offset=0) is None


def test_pooled_keys_are_refused():
    pooled = RunList(torch.zeros(1, 5, 1, dtype=torch.int32), torch.ones(1, 5).int(), 32, pool=32)
    with pytest.raises(ValueError, match="pooled keys"):
        show_all(BlockPlan(N, N, 64, (pooled,)), 4, frozenset({0}), torch.device("cpu"))
