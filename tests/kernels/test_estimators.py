"""The plain versions of the estimators, against one-line definitions."""

import math

import pytest
import torch
from sparse_patch_kernels.estimators import pooling, probe
from sparse_patch_kernels.estimators.token_scores import plain, token_scores


@pytest.mark.parametrize("offset", [0, 3, 8, 13])
def test_pool_mean_averages_the_rows_of_each_grid_block(offset):
    x = torch.randn(2, 29, 4)
    pooled = pooling.pool_mean(x, 8, offset)
    blocks = (torch.arange(29) + offset) // 8
    for i, block in enumerate(blocks.unique()):
        torch.testing.assert_close(pooled[:, i], x[:, blocks == block].mean(1))
    assert pooled.shape[1] == len(blocks.unique())


def test_pool_mean_accumulates_in_float32():
    x = torch.full((1, 4096, 1), 1.001, dtype=torch.bfloat16)
    assert pooling.pool_mean(x, 4096).item() == pytest.approx(float(x[0, 0, 0]), rel=1e-6)


def test_probe_lines_sum_probabilities_down_and_along():
    q, k = torch.randn(4, 8, 16), torch.randn(2, 30, 16)
    vertical, slash = probe.probe_lines(q, k, 0.25)
    scores = q @ k.repeat_interleave(2, 0).mT * 0.25
    causal = torch.ones(8, 30, dtype=torch.bool).tril(22)
    probs = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    torch.testing.assert_close(vertical, probs.mean(1))
    for distance in range(30):
        along = sum(probs[:, i, 22 + i - distance] for i in range(8) if 0 <= 22 + i - distance)
        torch.testing.assert_close(slash[:, 29 - distance], along / 8 + torch.zeros(4))


def test_pool_sum_pads_the_last_block():
    assert pooling.pool_sum(torch.ones(1, 5), 2).tolist() == [[2, 2, 1]]


def direct_token_scores(q, k, scale, block, stride_q, stride_k, reduce):
    """Block by block in float64, over every sampled query's whole softmax row."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[0] // k.shape[0], 0)
    q_len, kv_len = q.shape[1], k.shape[1]
    positions = torch.arange(kv_len - q_len, kv_len)
    keys = torch.arange(kv_len)
    row_blocks = (positions // block).unique()
    columns = -(-kv_len // block)
    result = torch.zeros(q.shape[0], len(row_blocks), columns, dtype=torch.float64)
    for i, row_block in enumerate(row_blocks):
        mine = positions[positions // block == row_block]
        sampled = mine[mine % stride_q == 0]
        for position in sampled if len(sampled) else mine[-1:]:
            logits = k @ q[:, position - positions[0], :, None] * scale
            shown = (keys % stride_k == 0) & (keys <= position)
            probs = logits[..., 0].masked_fill(~shown, float("-inf")).softmax(-1)
            for j in range(columns):
                part = probs[:, keys // block == j]
                if reduce == "sum":
                    result[:, i, j] += part.sum(-1)
                else:
                    result[:, i, j] = torch.maximum(result[:, i, j], part.amax(-1))
    return result.log()


@pytest.mark.parametrize("tile", [None, 1])
@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("strides", [(1, 1), (16, 1), (4, 8), (32, 16)], ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), [(64, 64), (75, 75), (48, 96), (41, 78), (5, 43)])
def test_token_scores_are_the_log_mass_of_real_softmax_rows(
    monkeypatch, q_len, kv_len, strides, reduce, tile
):
    if tile:  # one query block at a time
        monkeypatch.setattr(plain, "TILE_ELEMENTS", tile)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, q_len, 8, generator=generator) * 2
    k = torch.randn(2, kv_len, 8, generator=generator)
    stride_q, stride_k = strides
    got = token_scores(q, k, 0.5, block=16, stride_q=stride_q, stride_k=stride_k, reduce=reduce)
    want = direct_token_scores(q, k, 0.5, 16, stride_q, stride_k, reduce)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)


def test_token_scores_of_a_maximum_do_not_underflow():
    """Probabilities of e^-200 are 0 in float32; as logs they still rank."""
    k = torch.tensor([200.0, -20, -10, 0]).repeat_interleave(16)[None, :, None]
    scores = token_scores(torch.ones(1, 64, 1), k, 1.0, block=16, reduce="max")
    want = torch.tensor([200.0, -20, -10, 0]) - 200 - math.log(16)
    torch.testing.assert_close(scores[0, 3], want)


def test_token_scores_read_low_precision_in_float32():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 64, 16, generator=generator).bfloat16() for _ in range(2))
    got = token_scores(q, k, 0.25, block=16)
    torch.testing.assert_close(got, token_scores(q.float(), k.float(), 0.25, block=16))


def test_probe_mass_is_the_probe_rows_mean_probability_of_each_block():
    q, k = torch.randn(4, 8, 16), torch.randn(2, 30, 16)
    causal = torch.ones(8, 30, dtype=torch.bool).tril(22)
    scores = (q @ k.repeat_interleave(2, 0).mT).masked_fill(~causal, float("-inf"))
    mean = scores.softmax(-1).mean(1)
    want = torch.stack([mean[:, i : i + 8].sum(-1) for i in range(0, 30, 8)], -1)
    torch.testing.assert_close(probe.probe_mass(q, k, 1.0, 8), want)
