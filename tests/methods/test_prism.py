"""Prism against loops over bands, dimensions and blocks."""

import pytest
import torch

from sparse_patch import get_method
from tests.methods import scorer_checks as checks

BLOCK, GAMMA = 32, 0.8


def plan_of(q, k, offset=0, **params):
    method = get_method("prism", **{"block_size": BLOCK, "gamma": GAMMA, **params})
    return method.plan(q, k, scale=q.shape[2] ** -0.5, q_offset=offset)


def rms(vectors, dims):
    entries = [float(vector[d]) ** 2 for vector in vectors for d in dims]
    return (sum(entries) / len(entries)) ** 0.5


def band_logits(queries, keys, dims, m):
    """Logits of one query block mean in one band, as the card has them."""
    dim = len(queries[0])
    every = range(dim)
    temperature = (len(dims) / dim) ** 0.5
    temperature *= rms(queries, dims) / rms(queries, every) * rms(keys, dims) / rms(keys, every)
    products = [sum(float(queries[m][d] * key[d]) for d in dims) for key in keys]
    return [product / (len(dims) ** 0.5 * temperature) for product in products]


def restated(q, k, offset, bands, choose):
    """`keeps(head, m)`: the union over bands, lists of dimensions, of what `choose` picks."""
    n, first = k.shape[1], offset // BLOCK
    rows = [checks.rows_in(m, n, offset, BLOCK) for m in range(first, -(-n // BLOCK))]
    queries = [[checks.mean(one, of_block) for of_block in rows] for one in q]
    keys = [checks.block_means(one, n, BLOCK) for one in k]

    def keeps(head, m):
        forced, kept = checks.forced(m, n, BLOCK, BLOCK, sink=1, local=1), set()
        for dims in bands:
            group = keys[head * checks.KV_HEADS // checks.HEADS]
            logits = band_logits(queries[head], group, dims, m - first)
            kept |= choose(dict(enumerate(logits[: m + 1])), forced)
        return kept

    return keeps


# Of 16 pairs (i, i + 16): the first 8, the last 12.
BANDS = [[*range(8), *range(16, 24)], [*range(4, 16), *range(20, 32)]]


@pytest.mark.parametrize("call", checks.CALLS, ids=str)
def test_equals_loops(call):
    q, k, v = checks.inputs(*call)
    plan = plan_of(q, k, call[2])
    keeps = restated(q, k, call[2], BANDS, checks.by_mass(GAMMA))
    checks.assert_keeps(plan, keeps, BLOCK, BLOCK)
    checks.assert_lawful(plan, q, k, v)
    assert plan.density < 1


def test_bands_are_shares_of_the_pairs():
    q, k, _ = checks.inputs("structured", 437, 75)
    plan = plan_of(q, k, 75, high=0.25, low=0.5)
    bands = [[*range(4), *range(16, 20)], [*range(8, 16), *range(24, 32)]]
    keeps = restated(q, k, 75, bands, checks.by_mass(GAMMA))
    checks.assert_keeps(plan, keeps, BLOCK, BLOCK)


def test_other_policies_join_the_choices_of_both_bands_too():
    q, k, _ = checks.inputs("structured", 437, 75)
    plan = plan_of(q, k, 75, select="topk", topk=4, gamma=0.95)
    keeps = restated(q, k, 75, BANDS, checks.by_rank(4))
    checks.assert_keeps(plan, keeps, BLOCK, BLOCK)
    assert int(plan.runs[0].count.max()) > 4


def test_default_bands_are_those_of_the_paper(monkeypatch):
    """64 and 96 of 128 dimensions: 32 and 48 pairs."""
    seen = []

    def spy(q, k, band, scale):
        seen.append(band.nonzero()[:, 0].tolist())
        return torch.zeros(q.shape[0], q.shape[1], k.shape[1])

    monkeypatch.setattr("sparse_patch.methods.prism._band_scores", spy)
    q, k = torch.randn(4, 300, 128), torch.randn(2, 300, 128)
    assert get_method("prism").plan(q, k, scale=0.1, q_offset=0) is not None
    high, low = range(32), range(16, 64)
    assert seen == [[*band, *(i + 64 for i in band)] for band in (high, low)]
    assert get_method("prism").gamma == 0.95


def test_a_fast_signal_is_heard_where_slow_dimensions_drown_it():
    """The slow dimensions like block 5 most, by far; one fast one points at block 2."""
    q, k = torch.zeros(1, 8 * BLOCK, 32), torch.zeros(1, 8 * BLOCK, 32)
    q[..., 8:16], k[..., 8:16] = 30.0, 30.0
    k[0, 5 * BLOCK : 6 * BLOCK, 8:16] = 31.0
    q[..., 0], k[0, 2 * BLOCK : 3 * BLOCK, 0] = 1.0, 1.0

    def last_row(name):
        method = get_method(name, block_size=BLOCK, select="topk", topk=3)
        (run,) = method.plan(q, k, scale=0.2, q_offset=0).runs
        return (run.start[0, -1, : int(run.count[0, -1])] // BLOCK).tolist()

    assert last_row("mean_pool") == [0, 5, 7]
    assert last_row("prism") == [0, 2, 5, 7]


def test_a_head_of_zeros_has_flat_scores():
    (run,) = plan_of(torch.zeros(1, 8 * BLOCK, 32), torch.ones(1, 8 * BLOCK, 32), gamma=0.5).runs
    assert (run.start[0, -1, : int(run.count[0, -1])] // BLOCK).tolist() == [0, 1, 2, 3, 7]


def test_an_odd_head_dim_has_no_pairs():
    with pytest.raises(ValueError, match="even head_dim, got 7"):
        get_method("prism").plan(torch.ones(2, 300, 7), torch.ones(1, 300, 7), scale=1, q_offset=0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"high": 0.0}, r"high=0\.0 must be a number > 0 and <= 1"),
        ({"low": 1.5}, r"low=1\.5"),
        ({"gamma": -1.0}, r"gamma=-1\.0"),
        ({"alpha": 0.5}, "alpha=0.5 does nothing with select='top_p'"),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        get_method("prism", **params)
