"""What attention costs: the arithmetic, measuring, and the file that keeps it."""

import dataclasses
import json
import os
import warnings

import pytest
import torch
from sparse_patch_kernels import BlockPlan, block_sparse_attention

from sparse_patch import costs
from sparse_patch.costs import CostModel, Rate, Work

MODEL = CostModel(sdpa=Rate(1, 0, 2), dense=Rate(3, 1, 1), sparse=Rate(3, 4, 1))
"""Seconds that are easy to work out."""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache folder of its own, nothing remembered, and a measurement that takes no time."""
    monkeypatch.setenv("SPARSE_PATCH_CACHE", str(tmp_path))
    measured = []
    monkeypatch.setattr(costs, "measure", lambda dtype: measured.append(dtype) or MODEL)
    monkeypatch.setattr(costs, "compiled", lambda: "attention-1.so")
    for cache in (costs._of_this_machine, costs._warn_unwritable):
        cache.cache_clear()
    yield tmp_path / "costs", measured
    for cache in (costs._of_this_machine, costs._warn_unwritable):
        cache.cache_clear()


def forget():
    costs._of_this_machine.cache_clear()


def test_work_counts_causal_pairs():
    q, k, v = torch.zeros(4, 3, 8), torch.zeros(2, 5, 8), torch.zeros(2, 5, 6)
    work = Work.of(q, k, v)
    assert work == Work(heads=4, kv_heads=2, q_len=3, kv_len=5, dims=14)
    assert work.pairs == 3 + 4 + 5


def test_seconds_of_exact_attention_are_those_of_the_faster_way():
    work = Work(heads=1, kv_heads=1, q_len=10, kv_len=10, dims=1)  # 55 pairs
    assert MODEL.exact_seconds(work) == 3 + 10 + 55
    assert MODEL.exact_by_op(work)
    small = dataclasses.replace(work, q_len=1, kv_len=1)
    assert MODEL.exact_seconds(small) == 1 + 2
    assert not MODEL.exact_by_op(small)


def test_sdpa_cannot_do_soft_caps_and_sinks_and_masks_what_is_not_square():
    small = Work(heads=1, kv_heads=1, q_len=1, kv_len=1, dims=1)
    assert MODEL.exact_by_op(dataclasses.replace(small, plain=False))
    fast = dataclasses.replace(MODEL, sdpa=Rate(0, 0, 1))
    square = Work(heads=1, kv_heads=1, q_len=10, kv_len=10, dims=1)
    assert fast.exact_seconds(square) == 55
    later = dataclasses.replace(square, kv_len=30)  # 255 pairs are seen, 300 computed
    assert dataclasses.replace(fast, dense=Rate(1e9, 0, 0)).exact_seconds(later) == 300
    step = dataclasses.replace(square, q_len=1)
    assert fast.exact_seconds(step) == 10


def test_seconds_of_sparse_attention_follow_what_is_kept_and_who_shares_it():
    work = Work(heads=4, kv_heads=2, q_len=64, kv_len=64, dims=1)
    pairs = 64 * 65 / 2
    mask = torch.ones(4, 4, 4, dtype=torch.bool)
    a_head = BlockPlan.from_block_mask(mask, block_q=16, block_k=16)
    assert MODEL.sparse_seconds(work, 0.5, a_head) == 3 + 4 * pairs / 2 * (4 / 16 + 1)
    shared = BlockPlan.from_block_mask(mask[:1], block_q=16, block_k=16)  # by 2 heads a KV head
    assert MODEL.sparse_seconds(work, 0.5, shared) == 3 + 4 * pairs / 2 * (4 / 32 + 1)


@pytest.mark.parametrize("number", [-1.0, 0.0, float("nan"), float("inf")])
def test_bad_numbers_are_refused(number):
    with pytest.raises(ValueError, match=r"dense=.*must be finite numbers of seconds from 0"):
        dataclasses.replace(MODEL, dense=Rate(0, number, 0))


def test_a_model_goes_through_json():
    assert CostModel.from_dict(json.loads(json.dumps(MODEL.to_dict()))) == MODEL


@pytest.mark.parametrize(
    "numbers",
    [
        [],
        {},
        {**MODEL.to_dict(), "dense": 1},
        {**MODEL.to_dict(), "dense": {"call": 1}},
        {**MODEL.to_dict(), "dense": {"call": 1, "row": "x", "pair": 1}},
        {**MODEL.to_dict(), "dense": {"call": 1, "row": -1, "pair": 1}},
    ],
)
def test_other_json_is_refused(numbers):
    with pytest.raises(ValueError, match="CostModel"):
        CostModel.from_dict(numbers)


def test_the_rate_goes_through_both_points():
    rate = Rate(call=0.5, row=2e-3, pair=1e-4)
    work = Work(costs._HEADS, 1, 1, 1, 2 * costs._DIM)
    points = [
        (rows, pairs, rate.seconds(work, rows, pairs)) for rows, pairs in ((9, 50), (40, 800))
    ]
    found = costs._rate(rate.call, points)
    assert found.row == pytest.approx(rate.row)
    assert found.pair == pytest.approx(rate.pair)


@pytest.mark.parametrize("seconds", [(1e-6, 1.0), (1.0, 1.1), (0.1, 0.1)])
def test_noise_makes_no_rate_negative(seconds):
    points = [(9, 50, seconds[0]), (40, 800, seconds[1])]
    found = costs._rate(0.2, points)
    assert min(found.row, found.pair) >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_gives_costs_that_grow(monkeypatch, dtype):
    monkeypatch.setattr(costs, "_NEAR", 128)
    monkeypatch.setattr(costs, "_FAR", 384)
    monkeypatch.setattr(costs, "_REPEAT_SECONDS", 0.0)
    before = torch.random.get_rng_state()
    model = costs.measure(dtype)
    assert torch.equal(torch.random.get_rng_state(), before)
    short, long = (Work(4, 2, n, n, 128) for n in (256, 16384))
    assert 0 < model.exact_seconds(short) < model.exact_seconds(long)
    assert 0 < model.sparse_seconds(long, 0.1) < model.sparse_seconds(long, 0.9)


def test_the_plan_that_keeps_all_is_exact_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(heads, n, 16) for heads, n in ((4, 70), (2, 200), (2, 200)))
    got = block_sparse_attention(q, k, v, costs.keeps_all(70, 200), backend="cpu")
    seen = torch.ones(70, 200, dtype=torch.bool).tril(130)
    want = torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=seen, enable_gqa=True
    )[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


# --- the cache -----------------------------------------------------------------------------------


def test_a_machine_is_measured_once(fresh):
    folder, measured = fresh
    assert costs.of_this_machine(torch.float32) == MODEL
    costs.of_this_machine(torch.float32)
    forget()  # as another process
    assert costs.of_this_machine(torch.float32) == MODEL
    assert measured == [torch.float32]
    costs.of_this_machine(torch.bfloat16)
    assert measured == [torch.float32, torch.bfloat16]
    assert len(list(folder.iterdir())) == 2  # and nothing half written


def test_other_threads_and_another_kernel_are_another_machine(fresh, monkeypatch):
    _, measured = fresh
    costs.of_this_machine(torch.float32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    costs.of_this_machine(torch.float32)
    assert len(measured) == 2
    monkeypatch.setattr(costs, "compiled", lambda: None)
    forget()
    costs.of_this_machine(torch.float32)
    assert len(measured) == 3


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such bits")
def test_a_file_that_others_can_write_is_measured_again(fresh):
    folder, measured = fresh
    costs.of_this_machine(torch.float32)
    (path,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    path.chmod(0o666)
    forget()
    costs.of_this_machine(torch.float32)
    assert len(measured) == 2
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "list", "foreign", "negative", "binary", "nan", "deep", "twice"]
)
def test_a_damaged_or_foreign_file_is_measured_again(fresh, damage):
    folder, measured = fresh
    costs.of_this_machine(torch.float32)
    (path,) = folder.iterdir()
    whole = path.read_text()
    content = json.loads(whole)
    foreign = {**content, "machine": {**content["machine"], "cpu": "another"}}
    content["costs"]["sdpa"]["pair"] = -1.0
    path.write_bytes(
        {
            "cut": whole[:60].encode(),
            "empty": b"",
            "list": b"[1, 2]",
            "foreign": json.dumps(foreign).encode(),
            "negative": json.dumps(content).encode(),
            "binary": b"\xff\xfe\x00",
            "nan": whole.replace('"call": ', '"call": NaN, "was": ').encode(),
            "deep": b"[" * 10**5,
            "twice": whole.replace('"machine"', '"machine": 1, "machine"').encode(),
        }[damage]
    )
    forget()
    assert costs.of_this_machine(torch.float32) == MODEL
    assert len(measured) == 2
    assert path.read_text() == whole


def test_a_cache_that_cannot_be_written_is_warned_of_once(fresh):
    folder, measured = fresh
    folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="SPARSE_PATCH_CACHE"):
        assert costs.of_this_machine(torch.float32) == MODEL
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert costs.of_this_machine(torch.float32) == MODEL
    assert len(measured) == 2
