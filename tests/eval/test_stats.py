"""Bootstrap intervals, ranks and winners on cases with a known answer."""

import numpy as np
import pytest
from sparse_patch_eval.base.stats import bootstrap
from study.report import ranks, winner


def test_two_values_have_the_interval_that_can_be_counted():
    """Draws of two prompts: both 0 and both 1 come a quarter of the time each."""
    got = bootstrap([0.0, 1.0])
    assert (got.mean, got.low, got.high, got.n) == (0.5, 0.0, 1.0, 2)


def test_equal_values_have_no_interval():
    got = bootstrap([0.25] * 5)
    assert (got.mean, got.low, got.high) == (0.25, 0.25, 0.25)


def test_many_values_have_the_normal_interval():
    x = np.random.default_rng(3).normal(5, 2, 400)
    got = bootstrap(x)
    half = 1.96 * x.std() / 20
    assert got.low == pytest.approx(x.mean() - half, abs=0.05 * half)
    assert got.high == pytest.approx(x.mean() + half, abs=0.05 * half)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        got = bootstrap(rng.normal(1, 1, 20))
        covered += got.low <= 1 <= got.high
    assert 0.88 <= covered / 200 <= 0.98


def test_a_seed_gives_one_interval():
    x = np.random.default_rng(0).random(40)
    assert bootstrap(x, seed=4) == bootstrap(x, seed=4)
    assert bootstrap(x, seed=4) != bootstrap(x, seed=5)


def test_no_values_are_an_error():
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


def test_equals_share_the_better_rank():
    means = {"a": 0.2, "b": 0.1, "c": 0.2, "d": 0.9}
    assert ranks(means, True) == {"a": 2, "b": 1, "c": 2, "d": 4}
    assert ranks(means, False) == {"a": 2, "b": 4, "c": 2, "d": 1}


def test_a_small_steady_difference_wins_over_a_large_spread():
    spread = list(np.random.default_rng(0).normal(0, 10, 12))
    best, ties = winner(
        {
            "best": spread,
            "near": [x + 0.01 for x in spread],
            "mixed": [*spread[:-1], spread[-1] + 9],
        },
        True,
    )
    assert best == "best"
    assert ties == ["mixed"]  # one prompt of twelve says so
    assert winner({"a": [1, 2], "b": [0, 1]}, False)[0] == "a"
