"""Tri-shape: A-shape to the token, and dense last rows in whole blocks."""

import pytest
import torch

import sparse_patch
from sparse_patch import get_method
from tests.methods import scorer_checks as checks
from tests.zoo import tiny_model

N, SINK, WINDOW, LAST, BLOCK = 101, 5, 11, 20, 16


def plan_of(offset=0, n=N, **params):
    q, k = torch.randn(4, n, 8), torch.randn(2, n + offset, 8)
    params = {"sink": SINK, "window": WINDOW, "dense_rows": LAST, "block_size": BLOCK, **params}
    return get_method("tri_shape", **params).plan(q, k, scale=1.0, q_offset=offset)


@pytest.mark.parametrize("offset", [0, 7, 90])
def test_keeps_sink_window_and_last_rows(offset):
    mask = plan_of(offset).to_dense_mask()[0]
    for row in range(N):
        in_dense_block = row // BLOCK * BLOCK + BLOCK > N - LAST
        for key in range(N + offset):
            distance = row + offset - key
            near = key < SINK or distance < WINDOW or in_dense_block
            assert bool(mask[row, key]) == (distance >= 0 and near), (row, key)


def test_is_a_superset_of_the_token_exact_pattern():
    """The last n queries are dense, whatever the block; other rows stay as in A-shape."""
    shape = get_method("a_shape", sink=SINK, window=WINDOW, block_size=BLOCK)
    rows = shape.plan(torch.randn(4, N, 8), torch.randn(2, N, 8), scale=1.0, q_offset=0)
    mask, a_shape = plan_of().to_dense_mask()[0], rows.to_dense_mask()[0]
    assert bool(mask[N - LAST :].tril(N - LAST).sum() == sum(range(N - LAST + 1, N + 1)))
    first = (N - LAST) // BLOCK * BLOCK
    assert torch.equal(mask[:first], a_shape[:first])


@pytest.mark.parametrize("offset", [0, 7, 64])
def test_backends_agree(offset):
    q, k, v = torch.randn(4, N, 8), torch.randn(2, N + offset, 8), torch.randn(2, N + offset, 8)
    checks.assert_lawful(plan_of(offset), q, k, v)


def test_exact_where_the_window_or_the_last_rows_are_all_there_is():
    assert plan_of(window=N) is None
    assert plan_of(dense_rows=N) is None
    assert plan_of(dense_rows=N - BLOCK + 1) is None  # a row of the first block
    assert plan_of(dense_rows=N - BLOCK) is not None


def test_defaults_are_those_of_minference_and_the_preset_those_of_triangle_mix():
    plain, mix = get_method("tri_shape"), get_method("tri_shape", preset="triangle_mix")
    assert (plain.sink, plain.window, plain.dense_rows, plain.dense_layers) == (128, 3968, 100, 0)
    assert (mix.sink, mix.window, mix.dense_rows, mix.dense_layers) == (8, 512, 128, 16)


@torch.no_grad()
def test_triangle_mix_keeps_the_first_layers_dense():
    model = tiny_model("llama")
    params = {"preset": "triangle_mix", "window": 8, "dense_rows": 4, "block_size": 4}
    with sparse_patch.patch(
        model, "tri_shape", min_length=0, min_queries=0, dense_layers=3, **params
    ) as handle:
        model(input_ids=torch.randint(6, 128, (1, 40)))
    assert [layer.sparse_calls for layer in handle.report().layers] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"dense_rows": 0}, "TriShape: dense_rows=0 must be a whole number >= 1"),
        ({"window": 0}, "window=0"),
        ({"sink": -1}, "sink=-1"),
        ({"preset": "triangle"}, "did you mean 'triangle_mix'"),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        get_method("tri_shape", **params)
