"""XAttention against the authors' own answers, and what must hold beyond them."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from sparse_patch_kernels import BlockPlan, block_sparse_attention
from sparse_patch_kernels.estimators.token_scores import plain

import sparse_patch
from sparse_patch import get_method
from sparse_patch.methods.xattention import _released_chunk
from tests.golden.gen_inputs_pbs import load_inputs, make_qkv
from tests.zoo import tiny_model

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("xattn_*.npz"))


def test_all_golden_files_are_here():
    assert len(FILES) == 7


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem.removeprefix("xattn_"))
def test_golden(path):
    config, *arrays = load_inputs(path)
    golden = np.load(path)
    q, k, v = map(torch.tensor, arrays)
    scale = q.shape[2] ** -0.5
    method = get_method(
        "xattention",
        stride=config["stride"],
        gamma=config["threshold"],
        rule="released",
        chunk_size=config["chunk_size"],
    )
    mass = method.block_scores(q, k, scale=scale, q_offset=0).exp()
    blocks = mass.shape[1]
    want_mass = torch.tensor(golden["block_sum"])
    # Sums are up to 32, the files' own restatement is 3e-6 off.
    torch.testing.assert_close(mass, want_mass[:, :blocks, :blocks], atol=1e-5, rtol=0)
    assert not want_mass[:, blocks:].any()  # rows of nothing but padding
    plan = method.plan(q, k, scale=scale, q_offset=0)
    n = q.shape[1]
    mask = torch.tensor(golden["block_mask"])
    want = BlockPlan.from_block_mask(mask, block_q=128, block_k=128, q_len=n, kv_len=n)
    assert torch.equal(plan.to_dense_mask(), want.to_dense_mask())
    rows = torch.tensor(golden["out_rows"]).long()
    for backend in ("reference", "cpu"):
        out = block_sparse_attention(q, k, v, plan, scale=scale, backend=backend)
        torch.testing.assert_close(out[:, rows], torch.tensor(golden["out"]), atol=1e-5, rtol=0)


def generated(n=1024, heads=4, kv_heads=2, seed=3):
    q, k, v = map(torch.tensor, make_qkv(seed, n, heads, kv_heads, 64))
    return q, k, v


def plan_of(q, k, offset=0, **params):
    params = {"block_size": 64, **params}
    return get_method("xattention", **params).plan(q, k, scale=0.125, q_offset=offset)


def naive_scores(q, k, scale, offset, block, stride):
    """Mass of each block pair by the formula, with every group written out."""
    heads, kv_len = q.shape[0], k.shape[1]
    groups = -(-kv_len // stride)
    after = groups * stride - kv_len
    whole_q = torch.nn.functional.pad(q, (0, 0, offset, after))
    whole_k = torch.nn.functional.pad(k, (0, 0, 0, after))
    whole_k = whole_k.repeat_interleave(heads // k.shape[0], 0)
    x = sum(
        whole_q[:, stride - 1 - p :: stride] @ whole_k[:, p::stride].mT for p in range(stride)
    ) * (scale / stride)
    causal = torch.ones(groups, groups, dtype=torch.bool).tril()
    probs = x.masked_fill(~causal, float("-inf")).softmax(-1)
    probs[:, : offset // stride] = 0  # groups without a query
    blocks, per = -(-kv_len // block), block // stride
    pad = blocks * per - groups
    probs = torch.nn.functional.pad(probs, (0, pad, 0, pad)).view(heads, blocks, per, blocks, per)
    return probs.sum((2, 4))[:, offset // block :]


@pytest.mark.parametrize("stride", [4, 16])
@pytest.mark.parametrize(("n", "offset"), [(256, 0), (301, 0), (301, 64), (301, 37), (256, 250)])
def test_scores_are_the_formula(n, offset, stride):
    q, k, _ = generated(n)
    q = q[:, offset:]
    got = plain.antidiagonal_scores(q, k, 0.125, block=32, stride=stride)
    want = naive_scores(q, k, 0.125, offset, 32, stride)
    torch.testing.assert_close(got.exp(), want, atol=1e-5, rtol=1e-5)
    assert got.dtype == torch.float32


def test_scores_work_in_tiles_of_bounded_size(monkeypatch):
    q, k, _ = generated(700)
    whole = plain.antidiagonal_scores(q, k, 0.125, block=64, stride=8)
    monkeypatch.setattr(plain, "TILE_ELEMENTS", 1)
    tiled = plain.antidiagonal_scores(q, k, 0.125, block=64, stride=8)
    torch.testing.assert_close(tiled, whole)


def test_the_best_blocks_are_added_until_the_mass_is_there():
    q, k, _ = generated()
    gamma = 0.8
    method = get_method("xattention", block_size=64, gamma=gamma)
    mass = method.block_scores(q, k, scale=0.125, q_offset=0).exp().double()
    kept = plan_of(q, k, gamma=gamma).to_dense_mask()[:, 63::64, ::64]
    assert bool(kept[:, :, 0].all())
    assert bool(kept.diagonal(dim1=1, dim2=2).all())
    for head in range(4):
        for row in range(16):
            need = gamma * mass[head, row].sum()
            have = mass[head, row][kept[head, row]].sum()
            assert have >= need - 1e-5
            chosen = [c for c in range(1, row) if kept[head, row, c]]
            if chosen:  # without the last one taken, too little
                assert have - min(mass[head, row, c] for c in chosen) < need + 1e-5
            left = [c for c in range(1, row) if not kept[head, row, c]]
            if chosen and left:
                worst = min(mass[head, row, c] for c in chosen)
                assert worst >= max(mass[head, row, c] for c in left) - 1e-6


def test_the_released_rule_keeps_more_in_its_first_chunk_only():
    q, k, _ = generated(2048)
    meant = plan_of(q, k).to_dense_mask()
    slipped = plan_of(q, k, rule="released", chunk_size=1024).to_dense_mask()
    assert bool((slipped | ~meant).all())
    assert bool((slipped[:, :1024] & ~meant[:, :1024]).any())
    assert torch.equal(slipped[:, 1024:], meant[:, 1024:])
    # The authors' chunk for this length holds it all.
    assert _released_chunk(2048) == 2048
    whole = plan_of(q, k, rule="released").to_dense_mask()
    assert bool((whole[:, 1024:] & ~meant[:, 1024:]).any())


def test_a_call_over_a_filled_cache_has_no_first_chunk():
    q, k, _ = generated()
    later = [plan_of(q[:, 512:], k, 512, rule=rule) for rule in ("intended", "released")]
    assert torch.equal(later[0].to_dense_mask(), later[1].to_dense_mask())


@pytest.mark.parametrize(
    ("kv_len", "chunk"),
    [(700, 2048), (2048, 2048), (2049, 4096), (8192, 8192), (16384, 16384), (32768, 8192),
     (60000, 4096), (131072, 2048), (1 << 20, 2048)],
)  # fmt: skip
def test_the_released_chunk_follows_the_length(kv_len, chunk):
    assert _released_chunk(kv_len) == chunk


@pytest.mark.parametrize("rule", ["intended", "released"])
@pytest.mark.parametrize(("n", "offset"), [(1000, 0), (1000, 448), (1000, 345)])
def test_no_row_looks_ahead_and_every_row_sees_itself(rule, n, offset):
    q, k, _ = generated(n)
    plan = plan_of(q[:, offset:], k, offset, rule=rule, gamma=0.01)
    mask = plan.to_dense_mask()
    row = torch.arange(n - offset)
    assert not mask[:, row[:, None] + offset < torch.arange(n)].any()
    assert bool(mask[:, row, row + offset].all())
    assert bool(mask[:, :, 0].all())


def test_a_later_chunk_selects_what_the_whole_prompt_selects_there():
    q, k, _ = generated(1000)
    whole = plan_of(q, k).to_dense_mask()
    assert torch.equal(plan_of(q[:, 512:], k, 512).to_dense_mask(), whole[:, 512:])
    # Not on the grid: the block that the chunk begins in is scored by its own queries alone.
    unaligned = plan_of(q[:, 500:], k, 500).to_dense_mask()
    assert bool((unaligned[:, 12:] | ~whole[:, 512:]).all())


def test_more_gamma_keeps_more_and_none_only_what_is_forced():
    q, k, _ = generated()
    masks = [plan_of(q, k, gamma=g).to_dense_mask() for g in (0, 0.3, 0.6, 0.9, 0.99)]
    for less, more in pairwise(masks):
        assert bool((more | ~less).all())
        assert int(more.sum()) > int(less.sum())
    forced = torch.eye(16, dtype=torch.bool)
    forced[:, 0] = True
    assert bool((masks[0][:, 63::64, ::64] == forced).all())
    for rule in ("intended", "released"):
        assert plan_of(q, k, gamma=0, rule=rule).to_dense_mask().equal(masks[0])


@pytest.mark.parametrize("rule", ["intended", "released"])
def test_every_head_has_its_own_gamma(rule):
    q, k, _ = generated()
    gammas = (0.5, 0.95, 0.8, 0.0)
    mixed = plan_of(q, k, gamma=gammas, rule=rule).to_dense_mask()
    for head, gamma in enumerate(gammas):
        own = plan_of(q[head : head + 1], k[head // 2 : head // 2 + 1], gamma=gamma, rule=rule)
        assert torch.equal(mixed[head], own.to_dense_mask()[0])


def test_bf16_input_is_scored_in_float32():
    q, k, _ = (x.bfloat16() for x in generated())
    assert torch.equal(plan_of(q, k).to_dense_mask(), plan_of(q.float(), k.float()).to_dense_mask())


@pytest.mark.parametrize(
    "params",
    [{"select": "topk", "topk": 4}, {"select": "threshold"}, {"select": "per_head_budget"},
     {"select": "global"}, {"stride": 4}, {"preset": "s16"},
     {"dense_rows": 100}, {"sink_blocks": 2, "local_blocks": 3, "rule": "released"}],
)  # fmt: skip
def test_every_option_gives_a_plan_that_backends_agree_on(params):
    q, k, v = generated(700)
    plan = plan_of(q, k, **params)
    plan.check()
    assert plan.density < 1
    outs = [block_sparse_attention(q, k, v, plan, backend=b) for b in ("reference", "cpu")]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)


def test_rectified_output_is_nearer_to_exact_attention():
    q, k, v = generated(700)
    exact = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0), is_causal=True
    )
    errors = []
    for rectify in ("none", "lse"):
        plan = plan_of(q, k, gamma=0.3, rectify=rectify)
        out = block_sparse_attention(q, k, v, plan, scale=0.125, backend="reference")
        errors.append(float((out - exact).abs().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_exact_where_sparse_makes_no_sense():
    q, k, _ = generated()
    assert plan_of(q, k, gamma=1) is None
    assert plan_of(q[:, :64], k[:, :64]) is None
    assert plan_of(q[:, -32:], k, 1024 - 32) is None  # fewer queries than a block


@pytest.fixture
def table(tmp_path):
    """Writes a value as a file, and tells its path."""

    def write(value):
        path = tmp_path / "thresholds.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return str(path)

    return write


def test_a_table_gives_each_layer_its_thresholds(table):
    q, k, _ = generated()
    rows = [[0.5, 0.6, 0.7, 0.8], [0.9, 0.0, 1, 0.3]]
    method = get_method("xattention", thresholds=table(rows), block_size=64)
    for layer, row in enumerate(rows):
        got = method.for_layer(layer).plan(q, k, scale=0.125, q_offset=0).to_dense_mask()
        assert torch.equal(got, plan_of(q, k, gamma=tuple(row)).to_dense_mask())
    with pytest.raises(ValueError, match=r"differ by layer: plan with for_layer\(i\)"):
        method.plan(q, k, scale=0.125, q_offset=0)
    with pytest.raises(ValueError, match=r"4 values given per head, but .* for 2"):
        method.for_layer(0).plan(q[:2], k, scale=0.125, q_offset=0)
    plain = get_method("xattention")
    assert plain.for_layer(7) is plain


def test_a_table_too_short_for_the_model_is_an_error_at_patch_time(table):
    model = tiny_model("llama")
    path = table([[0.2] * 4] * 3)
    options = {"thresholds": path, "block_size": 16, "min_length": 0, "min_queries": 0}
    with pytest.raises(ValueError, match=r"thresholds.json' has layers 0 to 2, but .* layer 3"):
        sparse_patch.patch(model, "xattention", **options)
    ids = torch.arange(6, 86)[None]
    with torch.no_grad(), sparse_patch.patch(model, "xattention", layers=[0, 1, 2], **options) as p:
        model(ids)
    assert [layer.sparse_calls for layer in p.report().layers] == [1, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0.5", "is not JSON"),
        ({"0": [0.5]}, "must hold a JSON list with one entry per layer"),
        ([], "must hold a JSON list"),
        ([[0.5], 0.5], "layer 1: 0.5 must be a list of numbers from 0 to 1"),
        ([[0.5], []], "layer 1"),
        ([[1.5]], r"layer 0: \[1.5\]"),
        ([[True]], "layer 0"),
        (["0.5"], "layer 0"),
        ("[[NaN]]", "NaN is not a finite number"),
    ],
)
def test_a_bad_table_is_named(table, content, message):
    with pytest.raises(ValueError, match=rf"(?s)thresholds: .*thresholds\.json.*{message}"):
        get_method("xattention", thresholds=table(content))


def test_a_missing_table_is_named():
    with pytest.raises(ValueError, match=r"cannot read 'no/such.json' \(No such file"):
        get_method("xattention", thresholds="no/such.json")


def test_bad_parameters_are_named(table):
    path = table([[0.5]])
    for params, message in [
        ({"stride": 5}, "stride=5 must be one of 4, 8, 16"),
        ({"gamma": -0.1}, "gamma=-0.1"),
        ({"gamma": (0.5, 1.1)}, "gamma="),
        ({"rule": "paper"}, "rule='paper'"),
        ({"chunk_size": 2048}, "chunk_size=2048 needs rule='released'"),
        ({"rule": "released", "chunk_size": 100}, "must be a multiple of block_size=128"),
        ({"rule": "released", "select": "topk"}, "needs select='top_p', not 'topk'"),
        ({"thresholds": path, "gamma": 0.8}, "replaces gamma"),
        ({"thresholds": path, "select": "topk"}, "replaces gamma"),
    ]:
        with pytest.raises(ValueError, match=message):
            get_method("xattention", **params)
