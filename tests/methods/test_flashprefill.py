"""FlashPrefill against loops over single queries."""

import math

import pytest
import torch

from sparse_patch import get_method
from tests.methods import scorer_checks as checks

BLOCK = 32


def plan_of(q, k, offset=0, **params):
    params = {"block_size": BLOCK, "dense_rows": BLOCK + 1, **params}
    method = get_method("flashprefill", **params)
    return method.plan(q, k, scale=checks.SCALE, q_offset=offset)


def shares(q, k, n, offset, head, m):
    """a[m] over the blocks before m: sums over single queries, divided by the row's."""
    means = checks.block_means(k[head * checks.KV_HEADS // checks.HEADS], n, BLOCK)
    a = {
        j: sum(
            math.exp(float(q[head, row].double() @ means[j]) * checks.SCALE)
            for row in checks.rows_in(m, n, offset, BLOCK)
        )
        for j in range(m)
    }
    return {j: value / sum(a.values()) for j, value in a.items()}


@pytest.mark.parametrize("alpha", [0.12, 0.5])
@pytest.mark.parametrize("call", checks.CALLS[1:], ids=str)
def test_equals_loops(call, alpha):
    q, k, v = checks.inputs(*call)
    _, n, offset = call
    n_blocks = -(-n // BLOCK)

    def keeps(head, m):
        if m >= n_blocks - 2:
            return set(range(m + 1))
        a = shares(q, k, n, offset, head, m)
        high = {j for j in a if a[j] >= alpha * max(a.values())}
        return high | checks.forced(m, n, BLOCK, BLOCK, sink=2, local=4)

    plan = plan_of(q, k, offset, alpha=alpha)
    checks.assert_keeps(plan, keeps, BLOCK, BLOCK)
    checks.assert_lawful(plan, q, k, v)


def test_budgets_take_the_best_blocks_of_the_same_scores():
    q, k, _ = checks.inputs("structured", 437, 75)
    forced = {"sink_blocks": 0, "local_blocks": 1, "dense_rows": 0}

    def best_of_row(head, m):
        return checks.best(shares(q, k, 437, 75, head, m), 4) | {m}

    plan = plan_of(q, k, 75, select="topk", topk=5, **forced)
    checks.assert_keeps(plan, best_of_row, BLOCK, BLOCK)
    floor = plan_of(q, k, 75, alpha=1.0, min_budget=5 * BLOCK, **forced)
    checks.assert_keeps(floor, best_of_row, BLOCK, BLOCK)


def test_a_later_chunk_selects_what_the_whole_prompt_selects_there():
    q, k, _ = checks.inputs("structured", 500, 0)
    params = {"sink_blocks": 0, "local_blocks": 1, "alpha": 0.5}
    whole, chunk = plan_of(q, k, **params), plan_of(q[:, 256:], k, 256, **params)
    assert int(chunk.runs[0].count[:, 0].max()) > 1  # more than the row's own
    assert torch.equal(chunk.to_dense_mask(), whole.to_dense_mask()[:, 256:])


def test_one_query_is_heard_among_many():
    """One query of a block looks at block 1 and the others away from it: their mean would not."""
    q, k = torch.zeros(1, 8 * BLOCK, 4), torch.zeros(1, 8 * BLOCK, 4)
    k[0, BLOCK : 2 * BLOCK, 0] = 1.0
    q[0, 5 * BLOCK :, 0], q[0, 5 * BLOCK, 0] = -20.0, 200.0
    forced = {"sink_blocks": 0, "local_blocks": 1, "dense_rows": 0}
    first = {
        name: get_method(name, block_size=BLOCK, select="topk", topk=2, **forced)
        .plan(q, k, scale=0.5, q_offset=0)
        .runs[0]
        .start[0, 5, 0]
        for name in ("flashprefill", "mean_pool")
    }
    assert first == {"flashprefill": BLOCK, "mean_pool": 0}


def test_the_default_makes_two_last_blocks_dense_however_ragged():
    method = get_method("flashprefill", sink_blocks=0, local_blocks=1, alpha=1.0)
    for n in (1024, 1025, 1100, 1151):
        q, k = torch.randn(1, n, 8), torch.randn(1, n, 8)
        count = method.plan(q, k, scale=1.0, q_offset=0).runs[0].count[0]
        full = torch.arange(1, len(count) + 1) == count
        # The first two rows see all they could: one block, and the best of one block.
        assert full.nonzero()[:, 0].tolist() == [0, 1, len(count) - 2, len(count) - 1]


def test_presets_are_the_thresholds_per_model():
    alphas = {p: get_method("flashprefill", preset=p).alpha for p in ("llama", "qwen3")}
    assert alphas == {"llama": 0.18, "qwen3": 0.12}
    method = get_method("flashprefill")
    assert (method.select, method.alpha) == ("threshold", 0.12)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"alpha": 0.0}, r"alpha=0\.0 must be a number > 0 and <= 1"),
        ({"gamma": 0.8}, "gamma=0.8 does nothing with select='threshold'"),
        ({"select": "top_k"}, "select='top_k' must be one of"),
        ({"dense_rows": -1}, "dense_rows=-1"),
        ({"preset": "lama"}, "did you mean 'llama'"),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        get_method("flashprefill", **params)
