"""ProxyAttn against a plain restatement of the paper, and its properties one by one."""

import pytest
import torch

from sparse_patch import get_method
from tests.golden.gen_inputs import make_qkv

BLOCK = 32


def structured(n=700, heads=4, kv_heads=2, seed=3):
    q, k, _ = (torch.tensor(x[0]).transpose(0, 1) for x in make_qkv(seed, n, heads, kv_heads, 64))
    return q.float(), k.float()


def plan_of(q, k, offset=0, **params):
    params = {"min_budget": 0, "block_size": BLOCK, "gamma": 0.8, **params}
    return get_method("proxyattn", **params).plan(q, k, scale=0.125, q_offset=offset)


def restated(q, k, *, proxies, stride_q, stride_k, gamma, min_budget, sink, local, pool):
    """bool `[heads, blocks, blocks]`: section 2 of the card, one head and one row at a time."""
    heads, n, _ = q.shape
    blocks = -(-n // BLOCK)
    mask = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    for head in range(heads):
        group = head * proxies // heads
        mean_q = q[group * heads // proxies : (group + 1) * heads // proxies].mean(0)
        per_kv = k.shape[0] // proxies
        mean_k = k[group * per_kv : (group + 1) * per_kv].mean(0)
        logits = mean_q @ mean_k.T * 0.125
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        hidden[:, torch.arange(n) % stride_k != 0] = True
        probs = logits.masked_fill(hidden, float("-inf")).double().softmax(-1)
        last = (q[head, -BLOCK:] @ k[head * k.shape[0] // heads].T * 0.125).double()
        last = last.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1)[-BLOCK:], float("-inf"))
        share = [s.sum() / BLOCK for s in last.softmax(-1).split(BLOCK, 1)]
        running, budget = 0.0, 0
        for value in sorted(map(float, share), reverse=True):
            running, budget = running + value, budget + 1
            if running >= gamma:
                break
        budget = max(budget, -(-min_budget // BLOCK))
        for m in range(blocks):
            rows = torch.arange(m * BLOCK, min((m + 1) * BLOCK, n))
            cells = probs[rows[rows % stride_q == 0], : (m + 1) * BLOCK].split(BLOCK, 1)
            worth = [float(c.amax() if pool == "max" else c.sum()) for c in cells]
            forced = [b for b in range(m + 1) if b < sink or m - b < local]
            others = sorted(set(range(m + 1)) - set(forced), key=lambda b: (-worth[b], b))
            kept = (forced + others)[: max(budget, len(forced))]
            mask[head, m, kept] = True
    return mask


def block_mask(plan):
    """bool `[heads, q_blocks, k_blocks]` of a plan with one list."""
    (run,) = plan.runs
    start, _ = run.expand(plan.heads)
    n_blocks = -(-plan.kv_len // run.width)
    mask = torch.zeros(plan.heads, plan.n_q_blocks, n_blocks, dtype=torch.bool)
    head, row, slot = run.valid(plan.heads).nonzero(as_tuple=True)
    mask[head, row, (start[head, row, slot] // run.width).long()] = True
    return mask


@pytest.mark.parametrize("n", [512, 700])
@pytest.mark.parametrize(
    "params",
    [
        {"proxies": 2, "stride_q": 16, "stride_k": 1, "sink": 1, "local": 2, "pool": "max"},
        {"proxies": 1, "stride_q": 4, "stride_k": 4, "sink": 0, "local": 1, "pool": "max"},
        {"proxies": 2, "stride_q": 8, "stride_k": 2, "sink": 2, "local": 3, "pool": "sum"},
    ],
    ids=["ours", "paper", "sum"],
)
@pytest.mark.parametrize(("gamma", "min_budget"), [(0.8, 0), (0.5, 100)])
def test_selection_follows_the_card(n, params, gamma, min_budget):
    q, k = structured(n)
    want = restated(q, k, gamma=gamma, min_budget=min_budget, **params)
    plan = plan_of(
        q,
        k,
        n_proxy=params["proxies"],
        stride_q=params["stride_q"],
        stride_k=params["stride_k"],
        sink_blocks=params["sink"],
        local_blocks=params["local"],
        pool=params["pool"],
        gamma=gamma,
        min_budget=min_budget,
    )
    assert torch.equal(block_mask(plan), want)
    assert plan.density < 1


def test_the_paper_preset_is_its_setting_for_one_proxy():
    method = get_method("proxyattn", preset="paper")
    assert (method.n_proxy, method.stride_q, method.stride_k, method.gamma) == (1, 4, 4, 0.95)
    assert (method.sink_blocks, method.local_blocks, method.min_budget) == (0, 1, 2048)


def test_heads_of_a_group_share_one_list_and_differ_in_its_length():
    q, k = structured(heads=8)
    plan = plan_of(q, k)
    (run,) = plan.runs
    assert run.start.shape[0] == 2  # one per KV head, not per query head
    assert run.count.shape[0] == 8
    assert len(set(run.count[:4, -1].tolist())) > 1
    mask = block_mask(plan)
    for group in (mask[:4], mask[4:]):
        by_size = group[group.sum((1, 2)).argsort()]
        assert bool((by_size[:-1] <= by_size[1:]).all())  # each list begins the next longer one


def test_a_budget_is_a_number_of_blocks_for_all_rows():
    q, k = structured(1024)
    plan = plan_of(q, k, budget_rows="constant")
    count = plan.runs[0].count
    seen = torch.arange(1, count.shape[1] + 1)
    assert torch.equal(count, torch.minimum(count[:, -1:], seen).int())
    growing = plan_of(q, k, budget_rows="proportional")
    assert growing.density < plan.density
    assert torch.equal(growing.runs[0].count[:, -1], count[:, -1])


def test_a_bad_number_of_proxies_is_named():
    q, k = structured(heads=6, kv_heads=3)
    with pytest.raises(ValueError, match="n_proxy=2 must divide the 3 KV heads"):
        plan_of(q, k, n_proxy=2)


def test_short_input_is_exact():
    q, k = structured(300)
    assert plan_of(q, k, min_budget=300) is None
    assert plan_of(q, k, min_budget=200) is not None
    assert plan_of(q[:, -20:], k, offset=280) is None  # a chunk shorter than a block


def test_a_later_chunk_ranks_its_rows_as_the_whole_prompt_does():
    q, k = structured(1024)
    whole = block_mask(plan_of(q, k))
    chunk = plan_of(q[:, 512:], k, offset=512)
    assert torch.equal(block_mask(chunk), whole[:, 16:])
