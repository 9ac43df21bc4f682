"""The pieces that methods share, against one-line definitions."""

import pytest
import torch

from sparse_patch import scoring


@pytest.mark.parametrize("offset", [0, 3, 8, 13])
def test_pool_mean_averages_the_rows_of_each_grid_block(offset):
    x = torch.randn(2, 29, 4)
    pooled = scoring.pool_mean(x, 8, offset)
    blocks = (torch.arange(29) + offset) // 8
    for i, block in enumerate(blocks.unique()):
        torch.testing.assert_close(pooled[:, i], x[:, blocks == block].mean(1))
    assert pooled.shape[1] == len(blocks.unique())


def test_pool_mean_accumulates_in_float32():
    x = torch.full((1, 4096, 1), 1.001, dtype=torch.bfloat16)
    assert scoring.pool_mean(x, 4096).item() == pytest.approx(float(x[0, 0, 0]), rel=1e-6)


def test_probe_lines_sum_probabilities_down_and_along():
    q, k = torch.randn(4, 8, 16), torch.randn(2, 30, 16)
    vertical, slash = scoring.probe_lines(q, k, 0.25)
    scores = q @ k.repeat_interleave(2, 0).mT * 0.25
    causal = torch.ones(8, 30, dtype=torch.bool).tril(22)
    probs = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    torch.testing.assert_close(vertical, probs.mean(1))
    for distance in range(30):
        along = sum(probs[:, i, 22 + i - distance] for i in range(8) if 0 <= 22 + i - distance)
        torch.testing.assert_close(slash[:, 29 - distance], along / 8 + torch.zeros(4))


def test_pool_sum_pads_the_last_block():
    assert scoring.pool_sum(torch.ones(1, 5), 2).tolist() == [[2, 2, 1]]
