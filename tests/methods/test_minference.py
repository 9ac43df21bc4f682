"""MInference against the authors' own answers, and what must hold beyond them."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from sparse_patch_kernels import BlockPlan, block_sparse_attention

import sparse_patch
from sparse_patch import get_method
from sparse_patch.lines import line_runs, top_lines
from tests.golden.gen_inputs_pbs import load_inputs, make_qkv
from tests.zoo import tiny_model

GOLDEN = Path(__file__).parents[1] / "golden"
LINES = sorted(GOLDEN.glob("minf_vs_*.npz"))
TIED = "minf_vs_s1024_v30_s50_h2x1_d128"
"""Asks for 50 of the 100 distances that are forced: which ones theirs keeps is chance."""


def load(path):
    config, *arrays = load_inputs(path)
    return np.load(path), config, *map(torch.tensor, arrays)


def mask_from(indices, n):
    """Index lists `[heads, m]` -> bool `[heads, n]`."""
    index = torch.tensor(indices).long()
    return torch.zeros(len(index), n, dtype=torch.bool).scatter_(1, index, True)


def listed(run, head, block):
    return run.start[head, block, : int(run.count[head, block])].tolist()


def test_all_golden_files_are_here():
    assert len(LINES) == 3


@pytest.mark.parametrize("path", LINES, ids=lambda p: p.stem.removeprefix("minf_vs_"))
def test_golden_line_search(path):
    golden, config, q, k, _ = load(path)
    n = q.shape[1]
    sizes = [torch.tensor([config[f"{line}_size"]] * len(q)) for line in ("vertical", "slash")]
    columns, slashes = top_lines(q[:, -64:], k, q.shape[2] ** -0.5, *sizes)
    assert torch.equal(columns, mask_from(golden["vertical_idx"], n))
    theirs = mask_from(golden["slash_off"], n)
    if path.stem == TIED:
        assert not theirs[:, 100:].any()
        assert torch.equal(slashes, (torch.arange(n) < 50).expand_as(slashes))
    else:
        assert torch.equal(slashes, theirs)


@pytest.mark.parametrize("path", LINES, ids=lambda p: p.stem.removeprefix("minf_vs_"))
def test_golden_index_build_and_output(path):
    golden, _, q, k, v = load(path)
    n = q.shape[1]
    lines = [mask_from(golden[name], n) for name in ("vertical_idx", "slash_off")]
    tiles, singles = line_runs(*lines, n, 64)
    for head in range(len(q)):
        for block in range(-(-n // 64)):
            want = golden["block_offset"][head, block, : golden["block_count"][head, block]]
            # Their last tile may lie past the end of the sequence, where it shows nothing.
            assert listed(tiles, head, block) == want[want < n].tolist()
            want = golden["column_index"][head, block, : golden["column_count"][head, block]]
            assert listed(singles, head, block) == want.tolist()
    plan = BlockPlan(n, n, 64, (tiles, singles))
    rows = torch.tensor(golden["out_rows"]).long()
    for backend in ("reference", "cpu"):
        out = block_sparse_attention(q, k, v, plan, backend=backend)
        torch.testing.assert_close(out[:, rows], torch.tensor(golden["out"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", [p for p in LINES if p.stem != TIED], ids=lambda p: p.stem[8:])
def test_golden_plan(path):
    golden, config, q, k, v = load(path)
    n, scale = q.shape[1], q.shape[2] ** -0.5
    method = get_method("minference", vertical=config["vertical_size"], slash=config["slash_size"])
    plan = method.plan(q, k, scale=scale, q_offset=0)
    mask = plan.to_dense_mask()
    kept = float(mask.sum()) / (len(q) * n * (n + 1) / 2)
    # Theirs was averaged in float32; a single pair of tokens would be 1e-7.
    assert kept == pytest.approx(config["token_density"], abs=2e-8)
    out = block_sparse_attention(q, k, v, plan, scale=scale, backend="reference")
    rows = torch.tensor(golden["out_rows"]).long()
    torch.testing.assert_close(out[:, rows], torch.tensor(golden["out"]), atol=1e-5, rtol=0)


def test_golden_block_sparse():
    golden, config, q, k, v = load(GOLDEN / "minf_bs_s1024_top4_h2x1_d64.npz")
    params = {"pattern": "block_sparse", "topk": config["top_k"]}
    make = get_method("minference", variant="released", **params).plan
    plan = make(q, k, scale=0.125, q_offset=0)
    theirs = torch.tensor(golden["block_mask"])
    want = BlockPlan.from_block_mask(theirs, block_q=64, block_k=64)
    assert torch.equal(plan.to_dense_mask(), want.to_dense_mask())
    rows = torch.tensor(golden["out_rows"]).long()
    for backend in ("reference", "cpu"):
        out = block_sparse_attention(q, k, v, plan, backend=backend)
        torch.testing.assert_close(out[:, rows], torch.tensor(golden["out"]), atol=1e-5, rtol=0)
    # The reason for our default: theirs hides some queries from themselves.
    assert not theirs.diagonal(dim1=1, dim2=2).all()
    ours = get_method("minference", **params).plan(q, k, scale=0.125, q_offset=0)
    assert torch.equal(ours.runs[0].count, plan.runs[0].count)
    assert bool(ours.to_dense_mask().diagonal(dim1=1, dim2=2).all())


def test_released_blocks_are_averaged_over_their_padding():
    """Zeros to whole blocks, their means, unscaled products, the best of each row's past."""
    q, k, _ = generated(970)
    q[:, 960:], k[:, 960:] = 3 * q[:, 960:], 3 * k[:, 960:]
    mean_q, mean_k = (
        torch.nn.functional.pad(x, (0, 0, 0, 54)).view(len(x), 16, 64, 64).mean(2) for x in (q, k)
    )
    scores = mean_q @ mean_k.repeat_interleave(2, 0).mT
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    best = scores.masked_fill(~causal, float("-inf")).topk(5).indices
    want = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, best, True) & causal
    plan = plan_of(q, k, pattern="block_sparse", topk=5, variant="released")
    got = plan.to_dense_mask()[:, [*range(63, 960, 64), 969], ::64]
    assert torch.equal(got, want)


def walk(columns, slashes, end, kv_len):
    """Tiles and single columns of one query block `[end - 64, end)`, range by range."""
    ranges = []
    for o in sorted((o for o in slashes if o < end), reverse=True):
        stop = max(end - o, 64)
        if not ranges or stop > ranges[-1][1] + 64:
            ranges.append([stop - 64, stop])
        elif stop > ranges[-1][1]:
            ranges[-1][1] += 64
    tiles = [start for first, stop in ranges for start in range(first, stop, 64)]
    singles = [c for c in sorted(columns) if c < end and not any(a <= c < b for a, b in ranges)]
    return [t for t in tiles if t < kv_len], singles


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("kv_len", "offset"), [(448, 0), (333, 0), (500, 128), (421, 150)])
def test_the_vectorised_walk_is_the_walk(kv_len, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    share = torch.tensor([[0.004], [0.03], [0.3]])
    columns, slashes = torch.rand(2, 3, kv_len, generator=generator) < share
    slashes[:, 0] = True
    tiles, singles = line_runs(columns, slashes, kv_len - offset, 64)
    for head in range(3):
        chosen = [x[head].nonzero()[:, 0].tolist() for x in (columns, slashes)]
        for block in range(tiles.count.shape[1]):
            want = walk(*chosen, offset + (block + 1) * 64, kv_len)
            assert (listed(tiles, head, block), listed(singles, head, block)) == want
    plan = BlockPlan(kv_len - offset, kv_len, 64, (tiles, singles))
    plan.check()
    # Every chosen line is visible in full, wherever the chunk begins.
    row, key = torch.arange(offset, kv_len)[:, None], torch.arange(kv_len)
    wanted = (slashes[:, (row - key).clamp(min=0)] | columns[:, None]) & (key <= row)
    mask = plan.to_dense_mask()
    assert bool((mask | ~wanted).all())
    assert not (mask & (key > row)).any()
    both = tiles.start[..., None] + torch.arange(64)
    for head, block in [(0, 0), (2, tiles.count.shape[1] - 1)]:
        inside = both[head, block, : int(tiles.count[head, block])].flatten().tolist()
        assert not set(inside) & set(listed(singles, head, block))


def generated(n=1024, heads=4, kv_heads=2, seed=3):
    q, k, v = map(torch.tensor, make_qkv(seed, n, heads, kv_heads, 64))
    return q, k, v


SMALL = {"vertical": 40, "slash": 120}
KINDS = [
    SMALL,
    {"vertical": 1, "slash": 1},
    {"pattern": "block_sparse", "topk": 1},
    {"pattern": "block_sparse", "topk": 4},
    {"pattern": "stream_llm", "sink": 10, "window": 100},
]


def plan_of(q, k, offset=0, scale=0.125, **params):
    return get_method("minference", **params).plan(q, k, scale=scale, q_offset=offset)


@pytest.mark.parametrize("params", KINDS, ids=str)
@pytest.mark.parametrize(
    ("n", "offset"), [(1024, 0), (1000, 0), (1000, 448), (1000, 345), (1000, 980)]
)
def test_no_row_looks_ahead_and_every_row_sees_itself(params, n, offset):
    q, k, v = generated(n)
    q = q[:, offset:]
    plan = plan_of(q, k, offset, **params)
    plan.check()
    mask = plan.to_dense_mask()
    row, key = torch.arange(offset, n)[:, None], torch.arange(n)
    assert not (mask & (key > row)).any()
    assert bool(mask[:, torch.arange(n - offset), row[:, 0]].all())
    outs = [block_sparse_attention(q, k, v, plan, backend=b) for b in ("reference", "cpu")]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("params", KINDS, ids=str)
def test_a_later_chunk_selects_what_the_whole_prompt_selects_there(params):
    q, k, _ = generated(1000)
    whole = plan_of(q, k, **params).to_dense_mask()
    later = plan_of(q[:, 512:], k, 512, **params).to_dense_mask()
    assert torch.equal(later, whole[:, 512:])


def test_larger_sizes_keep_more():
    q, k, _ = generated(2048)
    for one in (
        [{"vertical": v, "slash": 60} for v in (30, 100, 300)],
        [{"vertical": 30, "slash": s} for s in (60, 150, 400, 900)],
        [{"pattern": "block_sparse", "topk": t} for t in (1, 3, 9)],
        [{"pattern": "stream_llm", "window": 64, "sink": s} for s in (0, 10, 200)],
    ):
        densities = [plan_of(q, k, **params).density for params in one]
        assert all(less < more for less, more in pairwise(densities))


def test_lines_cover_more_columns_of_one_head_as_columns_are_added():
    q, k, _ = generated()
    less, more = (plan_of(q, k, vertical=v, slash=60).to_dense_mask() for v in (30, 200))
    assert bool((more | ~less).all())


def test_the_probe_uses_the_scale_of_the_model():
    q, k, _ = generated()
    soft, sharp = (plan_of(q, k, scale=s, **SMALL).to_dense_mask() for s in (0.01, 0.5))
    assert not torch.equal(soft, sharp)


def test_a_broken_input_still_gives_a_lawful_plan():
    q, k, _ = generated()
    q[:, -1] = float("nan")
    for params in KINDS:
        plan = plan_of(q, k, **params)
        plan.check()
        assert bool(plan.to_dense_mask().diagonal(dim1=1, dim2=2).all())


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"slash": 1024},
        {"vertical": 1024},
        {"pattern": "block_sparse", "topk": 16},
        {"pattern": "stream_llm"},
        {"pattern": "stream_llm", "sink": 1024, "window": 1},
    ],
    ids=str,
)
def test_exact_where_the_sizes_cover_all_keys(params):
    q, k, _ = generated()
    assert plan_of(q, k, **params) is None
    short = plan_of(q[:, :1000], k[:, :1000], vertical=30, slash=999)
    assert short is not None


def a_shape(n, sink, window, offset=0):
    row, key = torch.arange(offset, n)[:, None], torch.arange(n)
    return (key <= row) & ((key < sink) | (row - key < window))


def test_a_layer_of_equal_a_shapes_is_token_exact():
    q, k, _ = generated()
    plan = plan_of(q, k, pattern="stream_llm", sink=10, window=100)
    assert torch.equal(plan.to_dense_mask()[0], a_shape(1024, 10, 100))


HEADS = (
    (0, "vertical_and_slash", 40, 120),
    (1, "block_sparse", 4, 0),
    (2, "stream_llm", 10, 100),
    (3, "vertical_and_slash", 100, 60),
)


@pytest.mark.parametrize("offset", [0, 345])
def test_heads_of_a_mixed_layer_keep_what_they_would_keep_alone(offset):
    q, k, v = generated(1000)
    q = q[:, offset:]
    plan = plan_of(q, k, offset, heads=HEADS)
    plan.check()
    mask = plan.to_dense_mask()
    for head, kind, size1, size2 in HEADS:
        heads = ((0, kind, size1, size2),)
        own = q[head : head + 1], k[head // 2 : head // 2 + 1]
        alone = plan_of(*own, offset, heads=heads).to_dense_mask()[0]
        if kind != "stream_llm":
            assert torch.equal(mask[head], alone)
            continue
        # Whole tiles: exact for the first row of a query block, up to 63 keys more for the others.
        assert bool((mask[head] | ~alone).all())
        assert torch.equal(mask[head, ::64], alone[::64])
        assert not (mask[head] & ~a_shape(1000, size1, size2 + 63, offset)).any()
    outs = [block_sparse_attention(q, k, v, plan, backend=b) for b in ("reference", "cpu")]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)


def test_a_head_that_keeps_everything_among_others_that_do_not():
    q, k, _ = generated()
    plan = plan_of(q, k, heads=((0, "vertical_and_slash", 2000, 50),), **SMALL)
    assert plan.head_density()[0] == 1
    assert float(plan.head_density()[1:].max()) < 1
    assert len(plan.runs) == 2
    assert plan.runs[1].start.shape[2] <= 40  # all of it in tiles


def test_heads_do_not_influence_each_other():
    q, k, _ = generated()
    whole = plan_of(q, k, **SMALL).to_dense_mask()
    for head in range(4):
        alone = plan_of(q[head : head + 1], k[head // 2 : head // 2 + 1], **SMALL)
        assert torch.equal(alone.to_dense_mask()[0], whole[head])


@pytest.fixture
def table(tmp_path):
    """Writes a value as a file, and tells its path."""

    def write(value):
        path = tmp_path / "patterns.json"
        path.write_text(json.dumps(value))
        return str(path)

    return write


def test_a_table_gives_each_layer_its_patterns(table):
    q, k, _ = generated()
    first = {str(head): [kind, a, b, 0.9] for head, kind, a, b in HEADS}
    path = table([first, {"2": ["stream_llm", 10, 100, 1]}, {}])
    method = get_method("minference", patterns=path, **SMALL)
    wanted = [{"heads": HEADS}, {"heads": HEADS[2:3], **SMALL}, SMALL]
    for layer, params in enumerate(wanted):
        got = method.for_layer(layer).plan(q, k, scale=0.125, q_offset=0)
        assert torch.equal(got.to_dense_mask(), plan_of(q, k, **params).to_dense_mask())
    with pytest.raises(ValueError, match=r"differ by layer: plan with for_layer\(i\)"):
        method.plan(q, k, scale=0.125, q_offset=0)
    with pytest.raises(ValueError, match="lists head 2; this layer has 2 heads"):
        method.for_layer(1).plan(q[:2], k, scale=0.125, q_offset=0)
    # A head without an entry and a method without sizes: MInference's own default.
    default = get_method("minference", patterns=path).for_layer(2)
    assert default == get_method("minference")
    assert (default.pattern, default.vertical, default.slash) == ("vertical_and_slash", 1000, 6096)
    assert hash(get_method("minference", heads=[list(entry) for entry in HEADS]))


def test_a_table_too_short_for_the_model_is_an_error_at_patch_time(table):
    model = tiny_model("llama")
    options = {
        "patterns": table([{"1": ["block_sparse", 1, 0, 1.0]}] * 3),
        "pattern": "stream_llm", "sink": 1, "window": 20, "min_length": 0, "min_queries": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"patterns.json' has layers 0 to 2, but .* layer 3"):
        sparse_patch.patch(model, "minference", **options)
    ids = torch.randint(6, 128, (1, 200))
    with torch.no_grad(), sparse_patch.patch(model, "minference", dense_layers=[3], **options) as p:
        model(ids)
    assert [layer.sparse_calls for layer in p.report().layers] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"0": {}}, "must hold a JSON list with one entry per layer"),
        ([["stream_llm", 1, 2, 3]], "layer 0: must be an object"),
        ([{}, {"one": ["stream_llm", 1, 2, 3]}], r"layer 1: \('one', .* must be a head index"),
        ([{"0": ["slash", 1, 2, 3]}], "one of vertical_and_slash, block_sparse, stream_llm"),
        ([{"0": ["stream_llm", 1]}], "two sizes"),
        ([{"0": ["stream_llm", 1, 2, 3, 4]}], "two sizes"),
        ([{"0": ["stream_llm", 1.5, 2, 3]}], "whole numbers"),
        ([{"0": ["stream_llm", -1, 2, 3]}], "whole numbers"),
        ([{"0": ["stream_llm", True, 2, 3]}], "whole numbers"),
        ([{"0": ["stream_llm", 100, 0, 3]}], "topk and window from 1"),
        ([{"0": ["block_sparse", 0, 1, 3]}], "topk and window from 1"),
        ([{"0": "stream_llm"}], "must be a head index"),
        ([{"0": [["stream_llm"], 1, 2, 3]}], "must be a head index"),
        ([{"1": ["block_sparse", 1, 1], "01": ["block_sparse", 1, 1]}], "head 1 is listed twice"),
    ],
)
def test_a_bad_table_is_named(table, content, message):
    with pytest.raises(ValueError, match=rf"MInference: patterns: .*patterns\.json'.*{message}"):
        get_method("minference", patterns=table(content))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"pattern": "vertical_slash"}, "pattern='vertical_slash' must be one of"),
        ({"topk": 4}, "topk=4 does nothing with pattern='vertical_and_slash', which reads vert"),
        ({"pattern": "block_sparse", "slash": 100}, "slash=100 does nothing"),
        ({"slash": 0}, "slash=0"),
        ({"pattern": "block_sparse", "topk": 0}, "topk=0"),
        ({"heads": ((0, "slash", 1, 2),)}, "MInference: heads: .* must be a head index"),
        ({"heads": (HEADS[0], HEADS[0])}, "head 0 is listed twice"),
        ({"heads": ("stream_llm",)}, "MInference: heads: stream_llm must be"),
        ({"patterns": "no.json", "heads": HEADS}, "not both"),
        ({"patterns": "no/such.json"}, r"cannot read 'no/such.json' \(No such file"),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        get_method("minference", **params)
