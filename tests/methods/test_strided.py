"""Strided: sampled rows against their definition, and what the ranking is for."""

import pytest
import torch
from sparse_patch_kernels.estimators.token_scores import plain

from sparse_patch import block_scorer, get_method, held_out
from sparse_patch.block_scorer import BlockScorer
from sparse_patch.selection import BlockGrid, rank
from tests.golden.gen_inputs import make_qkv
from tests.kernels.structured import sequence

BLOCK = 32


def structured(n=700, heads=4, kv_heads=2, seed=3):
    q, k, _ = (torch.tensor(x[0]).transpose(0, 1) for x in make_qkv(seed, n, heads, kv_heads, 64))
    return q.float(), k.float()


def scores_of(q, k, offset=0, **params):
    method = get_method("strided", block_size=BLOCK, **params)
    return method.block_scores(q, k, scale=0.125, q_offset=offset)


def mass_of(q, k):
    """float32 `[heads, q_len, blocks]`: what every row gives every key block."""
    group = q.shape[0] // k.shape[0]
    logits = q @ k.repeat_interleave(group, 0).mT * 0.125
    hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
    probs = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.stack([c.sum(-1) for c in probs.split(BLOCK, -1)], -1)


@pytest.mark.parametrize("weigh", ["rms", "sum", "max"])
@pytest.mark.parametrize("rank", ["head", "group"])
def test_a_block_is_worth_what_its_sampled_rows_give_it(weigh, rank):
    q, k = structured()
    got = scores_of(q, k, weigh=weigh, rank=rank, stride=8)
    ranked = q.view(2, 2, 700, 64).mean(1) if rank == "group" else q
    mass = mass_of(ranked, k)
    assert got.shape == (ranked.shape[0], 22, 22)
    for m in range(22):
        rows = torch.arange(m * BLOCK, min((m + 1) * BLOCK, 700), 8)
        if weigh == "max":  # of single keys, not of blocks
            continue
        cells = mass[:, rows, : m + 1]
        want = cells.square().sum(1).sqrt() if weigh == "rms" else cells.sum(1)
        torch.testing.assert_close(got[:, m, : m + 1].exp(), want, atol=1e-6, rtol=1e-4)


def test_the_block_before_is_always_kept():
    q, k = structured()
    method = get_method("strided", block_size=BLOCK, gamma=1e-6)
    mask = method.plan(q, k, scale=0.125, q_offset=0).to_dense_mask()
    row = torch.arange(BLOCK, 700)
    for key in (torch.zeros_like(row), row - BLOCK, row):
        assert bool(mask[:, row, key].all())


def test_a_block_that_one_row_needs_beats_one_that_all_need_a_little():
    """Two past blocks: 31 rows give the first 0.17, one row gives the second 0.9."""
    n = 8 * BLOCK
    k = torch.zeros(1, n, 2)
    k[0, BLOCK, 0] = k[0, 2 * BLOCK, 1] = 1.0
    q = torch.zeros(1, n, 2)
    thin, sharp = torch.tensor(16.0).log(), torch.tensor(9.0 * n).log()
    q[0, -BLOCK:, 0] = thin
    q[0, -1, 0], q[0, -1, 1] = 0.0, sharp

    def lead_of_the_sharp_block(weigh):
        method = get_method("strided", block_size=BLOCK, stride=1, weigh=weigh)
        scores = method.block_scores(q, k, scale=1.0, q_offset=0)[0, -1]
        return float(scores[2] - scores[1])

    assert lead_of_the_sharp_block("sum") < 0 < lead_of_the_sharp_block("rms")


def test_a_group_ranking_is_shared_and_cut_per_head():
    q, k = structured()
    method = get_method("strided", block_size=BLOCK, gamma=0.8, rank="group")
    (run,) = method.plan(q, k, scale=0.125, q_offset=0).runs
    assert (run.start.shape[0], run.count.shape[0]) == (2, 4)


def test_a_later_chunk_scores_its_rows_as_the_whole_prompt_does():
    q, k = structured(768)
    whole, chunk = scores_of(q, k), scores_of(q[:, 512:], k, offset=512)
    seen = torch.isfinite(whole[:, 16:])
    torch.testing.assert_close(chunk[seen], whole[:, 16:][seen])


def test_a_budget_is_what_held_out_rows_need():
    """The ranking of every second sampled row, tested on the rows between."""
    q, k = structured(512)
    plan = get_method("strided", block_size=BLOCK, gamma=0.8, stride=8).plan(
        q, k, scale=0.125, q_offset=0
    )
    tested = get_method("strided", block_size=BLOCK, stride=16, select="topk", topk=16)
    grid = BlockGrid(512, 512, BLOCK, BLOCK, q.device)
    order = rank(
        tested.block_scores(q, k, scale=0.125, q_offset=0), grid.causal(), grid.forced(1, 2)
    )
    mass = mass_of(q, k)
    for head in range(4):
        rows = torch.arange(8, 512, 16)
        ranked = mass[head, rows].gather(1, order[head, rows // BLOCK])
        loss = (1 - ranked.cumsum(1)).clamp(min=0).square().mean(0).sqrt()
        want = int((loss > 0.2).sum()) + 1
        assert int(plan.runs[0].count[head, -1]) == max(want, 3)


def test_more_gamma_keeps_more():
    q, k = structured(1024)
    plans = [
        get_method("strided", block_size=BLOCK, gamma=g).plan(q, k, scale=0.125, q_offset=0)
        for g in (0.5, 0.7, 0.9)
    ]
    assert plans[0].density < plans[1].density < plans[2].density < 1


@pytest.mark.parametrize("offset", [0, 37])
def test_key_blocks_may_be_smaller_than_query_blocks(offset):
    """The same rows, summed into smaller pieces; the choice is then finer."""
    q, k = structured(512)
    q = q[:, offset:]
    coarse, fine = (scores_of(q, k, offset, key_block=n).exp() for n in (32, 8))
    summed = fine.view(*coarse.shape, 4).sum(-1)
    torch.testing.assert_close(summed, coarse, atol=1e-5, rtol=1e-4)
    method = get_method("strided", block_size=BLOCK, key_block=8, gamma=0.7)
    plan = method.plan(q, k, scale=0.125, q_offset=offset)
    assert plan.runs[0].width == 8
    row = torch.arange(512 - offset)
    assert bool(plan.to_dense_mask()[:, row, row + offset].all())


def test_a_key_block_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="key_block=24 must divide block_size=128"):
        get_method("strided", key_block=24)


def test_the_fine_preset_lists_pieces_of_16_keys_and_keeps_the_last_rows_dense():
    q, k = structured(1024)
    plan = get_method("strided", preset="fine", gamma=0.8).plan(q, k, scale=0.125, q_offset=0)
    assert (plan.block_q, plan.runs[0].width) == (64, 16)
    mask = plan.to_dense_mask()
    assert plan.density < 1
    causal = torch.ones(64, 1024, dtype=torch.bool).tril(960)
    assert bool((mask[:, -64:] == causal).all())


@pytest.mark.parametrize(("q_len", "kv_len"), [(420, 420), (75, 420), (130, 200), (37, 333)])
@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 16, "stride": 4},
        {"block_size": 16, "stride": 16},
        {"block_size": 32, "stride": 8, "key_block": 8, "weigh": "rms"},
        {"block_size": 16, "stride": 1},
    ],
    ids=str,
)
def test_one_pass_over_the_sample_chooses_what_three_do(options, q_len, kv_len, monkeypatch):
    q, k, scale = sequence(4, 2, q_len, kv_len, 16)
    method = get_method("strided", gamma=0.6, **options)
    offset = kv_len - q_len
    want = BlockScorer.plan(method, q, k, scale=scale, q_offset=offset).to_dense_mask()
    assert 0 < int(want.sum()) < 4 * q_len * kv_len // 2
    monkeypatch.setattr(block_scorer, "ranking_loss", lambda *_, **__: pytest.fail("another pass"))
    for tile in (held_out.TILE_ELEMENTS, 1):
        for module in (held_out, plain):
            monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
        got = method.plan(q, k, scale=scale, q_offset=offset)
        assert torch.equal(got.to_dense_mask(), want)
