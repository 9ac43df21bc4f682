"""DHSA with fixed chunks against loops: one list for all heads."""

import pytest
import torch

from sparse_patch import get_method
from tests.methods import scorer_checks as checks

BLOCK, TOPK = 32, 6


def plan_of(q, k, offset=0, **params):
    params = {"block_size": BLOCK, "topk": TOPK, **params}
    return get_method("dhsa", **params).plan(q, k, scale=checks.SCALE, q_offset=offset)


def restated(q, k, offset, topk, dense_rows):
    n = k.shape[1]
    mean_q, mean_k = sum(q.double()) / len(q), sum(k.double()) / len(k)
    spans = [range(j, min(j + BLOCK, n)) for j in range(0, n, BLOCK)]
    chunks = [sum(mean_k[i] for i in span) / len(span) ** 0.5 for span in spans]

    def keeps(_, m):
        if (m + 1) * BLOCK > n - dense_rows:
            return set(range(m + 1))
        query = checks.mean(mean_q, checks.rows_in(m, n, offset, BLOCK))
        scores = {j: float(query @ chunks[j]) for j in range(m + 1)}
        return checks.by_rank(topk)(scores, checks.forced(m, n, BLOCK, BLOCK, sink=1, local=2))

    return keeps


@pytest.mark.parametrize("topk", [TOPK, 2])
@pytest.mark.parametrize("call", checks.CALLS, ids=str)
def test_equals_loops(call, topk):
    q, k, v = checks.inputs(*call)
    plan = plan_of(q, k, call[2], topk=topk)
    checks.assert_keeps(plan, restated(q, k, call[2], topk, 64), BLOCK, BLOCK)
    checks.assert_lawful(plan, q, k, v)
    assert plan.density < 1


@pytest.mark.parametrize("length", [20, 1])
def test_a_short_last_chunk_counts_by_the_root_of_its_length(length):
    """A sum over sqrt(length) rewards long chunks; a plain mean would put the short one first."""
    n = 8 * BLOCK + length
    q, k = torch.ones(4, n, 8), torch.ones(2, n, 8)
    k[:, -length:] *= 1.1
    scores = get_method("dhsa", block_size=BLOCK).block_scores(q, k, scale=1.0, q_offset=0)
    assert scores.shape == (1, 9, 9)
    torch.testing.assert_close(scores[0, -1, 0], torch.tensor(8.0 * BLOCK**0.5))
    torch.testing.assert_close(scores[0, -1, -1], torch.tensor(8.0 * 1.1 * length**0.5))


def test_all_heads_share_one_list():
    q, k, v = checks.inputs("structured", 512, 0)
    assert plan_of(q, k).runs[0].start.shape[0] == 1
    ranked = plan_of(q, k, select="per_head_budget", topk=16, gamma=0.5, dense_rows=0)
    (run,) = ranked.runs
    assert run.ranked
    assert (run.start.shape[0], run.count.shape[0]) == (1, 4)
    assert len(set(run.count[:, -1].tolist())) > 1
    checks.assert_lawful(ranked, q, k, v)


def test_every_row_keeps_its_latest_tokens_and_the_first():
    q, k, _ = checks.inputs("noise", 500, 77)
    mask = plan_of(q, k, 77, topk=1, dense_rows=0).to_dense_mask()[0]
    for row in range(len(mask)):
        position = row + 77
        assert bool(mask[row, max(0, position - BLOCK + 1) : position + 1].all())
        assert bool(mask[row, : min(BLOCK, position + 1)].all())


def test_the_last_queries_see_everything():
    q, k, _ = checks.inputs("noise", 500, 77)
    mask = plan_of(q, k, 77, dense_rows=40).to_dense_mask()[0]
    causal = torch.ones(423, 500, dtype=torch.bool).tril(77)
    assert torch.equal(mask[-40:], causal[-40:])
    assert not torch.equal(mask, causal)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"select": "top_p"},
            "select='top_p' must be one of 'topk', 'per_head_budget', 'held_out'",
        ),
        ({"topk": 0}, "topk=0 must be a whole number >= 1"),
        ({"gamma": 0.5}, "gamma=0.5 does nothing with select='topk'"),
        ({"local_blocks": 0}, "local_blocks=0"),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        get_method("dhsa", **params)
