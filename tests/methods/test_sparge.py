"""Sparge's selection against loops, with key blocks half as long as query blocks."""

import pytest
import torch

from sparse_patch import get_method
from tests.methods import scorer_checks as checks

BLOCK_Q, BLOCK_K = 64, 32
# Self-similarities of these inputs lie around this. In noise they are about 1 / block.
GUARD = {"noise": 0.016, "structured": 0.55}


def plan_of(q, k, offset=0, **params):
    params = {"block_size": BLOCK_Q, "gamma": 0.8, **params}
    return get_method("sparge", **params).plan(q, k, scale=checks.SCALE, q_offset=offset)


def alike(x, positions):
    """Mean over the Gram matrix of the cosines of some rows."""
    rows = x[list(positions)].double()
    norms = torch.stack([row.norm() for row in rows])
    return float((rows @ rows.T / (norms[:, None] * norms)).mean())


def mixed_blocks(x, n, block, guard):
    spans = [range(j, min(j + block, n)) for j in range(0, n, block)]
    return {j for j, span in enumerate(spans) if alike(x, span) < guard}


def restated(q, k, offset, guard, choose):
    """`keeps(head, m)` as in the card; `choose` picks from the logits of one row."""
    n = k.shape[1]
    keys = k.double() - k.double().mean(1, keepdim=True)
    means = [checks.block_means(one, n, BLOCK_K) for one in keys]
    mixed = [mixed_blocks(one, n, BLOCK_K, guard) for one in keys]

    def keeps(head, m):
        rows, seen = checks.rows_in(m, n, offset, BLOCK_Q), checks.seen_by(m, n, BLOCK_Q, BLOCK_K)
        group = head * checks.KV_HEADS // checks.HEADS
        if alike(q[head], rows) < guard:
            return set(seen)
        mean_q = checks.mean(q[head], rows)
        logits = {
            j: float(mean_q @ means[group][j]) * checks.SCALE for j in seen if j not in mixed[group]
        }
        forced = checks.forced(m, n, BLOCK_Q, BLOCK_K, sink=1, local=1)
        return choose(logits, forced) | mixed[group] & set(seen)

    return keeps


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("call", checks.CALLS, ids=str)
def test_equals_loops(call, guarded):
    q, k, v = checks.inputs(*call)
    guard = GUARD[call[0]] if guarded else -1.0
    plan = plan_of(q, k, call[2], similarity=guard)
    checks.assert_keeps(plan, restated(q, k, call[2], guard, checks.by_mass(0.8)), BLOCK_Q, BLOCK_K)
    checks.assert_lawful(plan, q, k, v)
    assert plan.density < 1


def test_the_guard_of_these_tests_tells_blocks_apart():
    q, k, _ = checks.inputs("structured", 512, 0)
    keys = k - k.mean(1, keepdim=True)
    for x, block in ((q, BLOCK_Q), (keys, BLOCK_K)):
        mixed = sum(len(mixed_blocks(one, 512, block, GUARD["structured"])) for one in x)
        assert 0 < mixed < len(x) * 512 // block


def test_top_k_takes_the_guarded_blocks_on_top():
    q, k, _ = checks.inputs("structured", 490, 128)
    guard = GUARD["structured"]
    plan = plan_of(q, k, 128, similarity=guard, select="topk", topk=5, gamma=0.98)
    keeps = restated(q, k, 128, guard, checks.by_rank(5))
    checks.assert_keeps(plan, keeps, BLOCK_Q, BLOCK_K)


def test_mixed_blocks_are_computed_whatever_the_mass():
    q, k, _ = checks.inputs("structured", 512, 0)
    some = plan_of(q, k, similarity=-1.0, gamma=0.01)
    assert some.density < 0.7
    assert plan_of(q, k, similarity=1.0, gamma=0.01).density == 1


def test_a_mean_that_all_keys_share_changes_nothing():
    q, k, _ = checks.inputs("structured", 512, 0)
    plan, moved = (plan_of(q, x, similarity=0.55) for x in (k, k + 3.0))
    assert plan.density < 1
    assert torch.equal(plan.to_dense_mask(), moved.to_dense_mask())


def test_key_blocks_are_half_a_query_block():
    q, k, _ = checks.inputs("structured", 500, 77)
    method = get_method("sparge")
    assert (method.block_size, method.block_k) == (128, 64)
    plan = plan_of(q, k, 77, similarity=-1.0)
    assert (plan.block_q, plan.runs[0].width) == (BLOCK_Q, BLOCK_K)
    kept = checks.listed(plan, 16, BLOCK_K).sum()
    causal = checks.HEADS * sum(int(last) // BLOCK_K + 1 for last in plan.last_rows())
    assert plan.density == pytest.approx(float(kept) / causal)


@pytest.mark.parametrize("offset", [0, 128, 77])
def test_rectification_pools_key_blocks_that_no_row_keeps(offset):
    q, k, v = checks.inputs("structured", 500, offset)
    plan = plan_of(q, k, offset, similarity=-1.0, gamma=0.3, rectify="lse")
    checks.assert_lawful(plan, q, k, v)
    tokens, pooled = plan.runs
    assert (pooled.width, pooled.pool) == (BLOCK_K, BLOCK_K)
    for head in range(checks.HEADS):
        for b in range(plan.n_q_blocks):
            kept, gone = (
                set(run.start[head, b, : int(run.count[head, b])].tolist())
                for run in (tokens, pooled)
            )
            past = {j for j in range(0, 500, BLOCK_K) if j + BLOCK_K <= offset + b * BLOCK_Q}
            assert gone == past - kept


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"similarity": 1.5}, r"similarity=1\.5 must be a number >= -1 and <= 1"),
        ({"block_size": 16}, "block_size=16 must be one of 32, 64, 128, 256"),
        ({"gamma": 2.0}, r"gamma=2\.0"),
        ({"topk": 3}, "topk=3 does nothing with select='top_p'"),
        ({"simthreshd1": 0.6}, "no parameter 'simthreshd1'"),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        get_method("sparge", **params)
