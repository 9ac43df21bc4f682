"""InfiniteHiP against what the authors' code keeps and a plain scan, and what must hold beyond."""

import math
from pathlib import Path

import pytest
import torch
from sparse_patch_kernels import block_sparse_attention
from sparse_patch_kernels.estimators.chunk_scan import plain

from sparse_patch import get_method
from sparse_patch.diagnostics import recall
from sparse_patch.methods import infinite_hip
from tests.methods.hip_cases import decode_steps, fresh_mask, integers, lists, load

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("hip12*.npz"))


def method_of(config, **params):
    """There the stage that receives tokens carries their number, here the one that keeps them."""
    rows, strides, chunks, received = zip(*config["stages"], strict=True)
    (block_q,) = set(rows)
    return get_method(
        "infinite_hip",
        block_q=block_q,
        stride_q=strides,
        chunks=chunks,
        keep=(*received[1:], config["final_k"]),
        sink=config["sink"],
        window=config["window"],
        **{"refresh": (1,) * len(chunks), **params},
    )


def mask_of(blocks, config):
    """Visible keys from golden lists: bool `[heads, q_len, kv_len]`."""
    n_keys, n_rows = config["T"], config["Tq"]
    (block_q, _, chunk, _), first = config["stages"][-1], config["stages"][0][2]
    listed = torch.zeros(*blocks.shape[:2], n_keys + chunk, dtype=torch.bool)
    for head, block, slot in (blocks >= 0).nonzero().tolist():
        start = int(blocks[head, block, slot])
        listed[head, block, start : start + chunk] = True
    listed = listed[..., :n_keys].repeat_interleave(block_q, 1)[:, :n_rows]
    row, key = torch.arange(n_keys - n_rows, n_keys)[:, None], torch.arange(n_keys)
    window = max(config["window"], first)
    return (listed | (key < config["sink"]) | (row - key < window)) & (key <= row)


def test_all_golden_files_are_here():
    assert len(FILES) == 4


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path):
    golden, config, (q, k, v) = load(path)
    method, scale = method_of(config, variant="released"), config["q_scale"]
    plan = method.plan(q, k, scale=scale, q_offset=config["T"] - config["Tq"])
    want = mask_of(torch.tensor(golden["blocks"]), config)
    assert torch.equal(plan.to_dense_mask().expand_as(want), want)
    rows = torch.tensor(golden["out_rows"]).long()
    for backend in ("reference", "cpu"):
        out = block_sparse_attention(q, k, v, plan, scale=scale, backend=backend)
        torch.testing.assert_close(out[:, rows], torch.tensor(golden["out"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_correction_keeps_more_mass_of_the_same_inputs(path):
    """With the same lists, none of which is spent on keys that the window shows."""
    _, config, (q, k, _) = load(path)
    scale, mass = config["q_scale"], {}
    for variant in ("released", "corrected"):
        plan = method_of(config, variant=variant).plan(q, k, scale=scale, q_offset=0)
        mass[variant] = float(recall(q, k, plan, scale=scale).mean())
        assert int(plan.runs[0].count.max()) <= -(-config["final_k"] // config["stages"][-1][2])
    assert mass["corrected"] > mass["released"]


# --- a plain scan, one chunk of one query block at a time ----------------------------------------


def plain_lists(q, k, method, block):
    """Starts that one query block keeps: q `[heads, q_len, dim]`, k `[heads, kv_len, dim]`."""
    heads, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]
    rows = q[:, block * method.block_q : (block + 1) * method.block_q]
    first = kv_len - q_len + block * method.block_q
    last = first + rows.shape[1] - 1
    window = max(method.window, method.chunks[0])
    limit, end = last - window, last + 1
    if method.variant == "released":
        window = method.window
        limit, end = max(0, first - max(0, window - method.chunks[0])), kv_len
    starts = [list(range(method.sink, kv_len - window, method.chunks[0]))] * heads
    for stage, chunk in enumerate(method.chunks):
        groups = rows.split(method.stride_q[stage], 1)
        means = torch.stack([group.mean(1) for group in groups], 1)
        scores = (means @ k.mT).amax(1).tolist()
        found = [
            [plain_scan(scores[h], s, chunk, limit, end) for s in starts[h]] for h in range(heads)
        ]
        if method.lists == "shared":
            found = [[max(of_chunk) for of_chunk in zip(*found, strict=True)]] * heads
        pieces = range(0, chunk, method.chunks[min(stage + 1, len(method.chunks) - 1)])
        for head in range(heads):
            order = sorted(range(len(found[head])), key=lambda i: (-found[head][i], i))
            order = [i for i in order if found[head][i] > -math.inf]
            kept = sorted(starts[head][i] for i in order[: -(-method.keep[stage] // chunk)])
            starts = [*starts[:head], [s + i for s in kept for i in pieces], *starts[head + 1 :]]
    return starts


def plain_scan(scores, left, chunk, limit, end):
    """Best score on the way down one chunk."""
    right, best = min(left + chunk, end), -math.inf
    while left < right and left <= limit:
        middle = (left + right) // 2
        a, b = scores[(left + middle) // 2], scores[(middle + right) // 2]
        best = max(best, a, b)
        if right - left == 1:
            break
        left, right = (left, middle) if a > b else (middle, right)
    return best


SMALL = {
    "block_q": 16,
    "chunks": (16, 8, 4),
    "keep": (96, 64, 32),
    "stride_q": (4, 2, 1),
    "sink": 4,
    "window": 32,
}


@pytest.mark.parametrize("variant", ["corrected", "released"])
@pytest.mark.parametrize(
    ("kv_len", "offset", "params"),
    [
        (300, 0, {}),
        (300, 0, {"lists": "each"}),
        (301, 0, {"sink": 3, "window": 41, "lists": "each"}),  # off any grid, ragged
        (300, 0, {"window": 20}),  # shorter than two chunks
        (300, 0, {"window": 5}),  # shorter than one
        (300, 128, {}),
        (300, 133, {"lists": "each"}),
        (300, 299, {"lists": "each"}),
        (300, 0, {"chunks": (32,), "keep": (64,), "stride_q": (1,), "refresh": (4,)}),
        (300, 0, {"chunks": (12, 6, 3), "keep": (90, 60, 31)}),
    ],
)
def test_the_stages_equal_plain_ones(kv_len, offset, params, variant):
    method = get_method("infinite_hip", **{**SMALL, "variant": variant, **params})
    q, k = integers(4, kv_len, seed=1)[:, offset:], integers(2, kv_len, seed=2)
    plan = method.plan(q, k, scale=1.0, q_offset=offset)
    got = lists(plan, 4)
    for block in range(plan.n_q_blocks):
        want = plain_lists(q, k.repeat_interleave(2, 0), method, block)
        assert [[s for s in row if s >= 0] for row in got[:, block].tolist()] == want


# --- what must hold on any input -----------------------------------------------------------------


def plan_of(q, k, offset=0, **params):
    method = get_method("infinite_hip", **{**SMALL, **params})
    return method.plan(q, k, scale=1.0, q_offset=offset)


def test_all_heads_share_a_list_or_have_one_each():
    q, k = integers(4, 300, seed=1), integers(2, 300, seed=2)
    assert plan_of(q, k).heads == 1
    each = plan_of(q, k, lists="each")
    assert each.heads == 4
    for head in range(4):
        alone = plan_of(q[head][None], k[head // 2][None], lists="each")
        assert torch.equal(lists(alone, 1)[0], lists(each, 4)[head])


@pytest.mark.parametrize("end", [160, 288, 300])
@pytest.mark.parametrize("window", [32, 17])
def test_a_chunk_selects_what_the_whole_prompt_selects_there(end, window):
    """Nor does anything after a block of queries change its list, however short the window."""
    q, k = integers(4, 300, seed=1), integers(2, 300, seed=2)
    whole = lists(plan_of(q, k, window=window), 1)
    chunk = plan_of(q[:, 96:end], k[:, :end], offset=96, window=window)
    assert torch.equal(lists(chunk, 1), whole[:, 6 : 6 + chunk.n_q_blocks])


def test_plans_of_any_length_are_lawful_and_use_the_budget():
    for kv_len in (*range(69, 100), 131, 255, 513):
        for offset in (0, 7, kv_len - 1):
            q, k = integers(2, kv_len, seed=kv_len)[:, offset:], integers(1, kv_len, seed=1)
            plan = plan_of(q, k, offset=offset)
            plan.check()  # ascending, disjoint, begun in sight
            assert bool((plan.runs[0].count[:, -1] == 8).all())
            assert bool(plan.to_dense_mask().diagonal(offset, 1, 2).all())


def test_query_blocks_are_scanned_a_few_at_a_time(monkeypatch):
    q, k = integers(4, 300, seed=1), integers(2, 300, seed=2)
    whole = lists(plan_of(q, k), 1)
    for module in (infinite_hip, plain):
        monkeypatch.setattr(module, "TILE_ELEMENTS", 1)
    assert torch.equal(lists(plan_of(q, k), 1), whole)


def test_half_precision_selects_what_its_float32_copy_selects():
    q, k = integers(4, 300, seed=1).bfloat16(), integers(2, 300, seed=2).bfloat16()
    assert torch.equal(lists(plan_of(q, k), 1), lists(plan_of(q.float(), k.float()), 1))


def test_a_broken_input_still_gives_a_lawful_plan():
    q, k = integers(2, 300, seed=1), integers(2, 300, seed=2)
    q[0, 250], k[1, 100] = float("nan"), float("inf")
    plan_of(q, k).check()


def test_exact_where_all_would_be_kept():
    q, k = integers(2, 69, seed=1), integers(2, 69, seed=2)
    assert plan_of(q[:, :68], k[:, :68]) is None  # 4 + 32 + 32
    plan = plan_of(q, k)
    hidden = ~plan.to_dense_mask() & torch.ones(69, 69, dtype=torch.bool).tril()
    assert int(hidden.sum()) > 0


def test_defaults_and_presets_are_those_of_the_documents():
    method = get_method("infinite_hip", preset="3k")
    assert method == get_method("infinite_hip")
    assert (method.chunks, method.keep) == ((256, 32, 8), (32768, 8192, 2048))
    assert (method.sink, method.window, method.block_q) == (256, 1024, 64)
    assert (method.stride_q, method.refresh, method.dense_layers) == ((4, 4, 1), (16, 8, 4), 0)
    more = get_method("infinite_hip", preset="5k")
    assert (more.chunks, more.keep) == ((64, 32, 16), (32768, 16384, 4096))
    fast = [get_method("infinite_hip", preset=p).refresh for p in ("3k-fast", "3k-flash")]
    assert fast == [(32, 16, 8), (96, 24, 8)]


def test_the_first_layers_keep_more():
    method = get_method("infinite_hip")
    kept = [method.for_layer(layer).keep[-1] for layer in range(5)]
    assert kept == [4096, 4096, 4096, 2048, 2048]
    large = get_method("infinite_hip", keep=(32768, 16384, 8192))
    assert large.for_layer(0) == large
    assert get_method("infinite_hip", early_layers=0).for_layer(0).keep[-1] == 2048


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"chunks": (256, 100, 8)}, "each must divide the one before"),
        ({"chunks": (256, 32)}, "must have one number for each of the 2 stages"),
        ({"keep": (1024, 0, 64)}, r"keep=\(1024, 0, 64\) must be whole numbers >= 1"),
        ({"keep": (1024, 512.5, 64)}, "keep="),
        ({"keep": 1024}, "keep=1024 must be a tuple"),
        ({"chunks": ()}, "chunks="),
        ({"stride_q": (3, 4, 1)}, "must divide block_q=64"),
        ({"refresh": (16, 8, 0)}, "must be all 0 or all above 0"),
        ({"window": 0}, "window=0"),
        ({"lists": "group"}, "lists='group' must be one of 'shared', 'each'"),
        ({"variant": "paper"}, "variant='paper'"),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        get_method("infinite_hip", **params)


# --- decoding, step by step ----------------------------------------------------------------------


def test_each_stage_runs_at_its_own_interval_and_takes_the_later_ones_along(monkeypatch):
    q, k = integers(2, 400, seed=1), integers(2, 400, seed=2)
    ran, prune = [], infinite_hip.InfiniteHip._prune

    def counting(self, stage, starts, scores):
        ran[-1].append(stage)
        return prune(self, stage, starts, scores)

    monkeypatch.setattr(infinite_hip.InfiniteHip, "_prune", counting)
    method = get_method("infinite_hip", **SMALL, refresh=(8, 4, 2))
    decoding = decode_steps(method, q, k, 300, 17)
    for _ in range(17):
        ran.append([])
        next(decoding)
    once = [[0, 1, 2], [], [2], [], [1, 2], [], [2], []]
    assert ran == [*once, *once, [0, 1, 2]]


@pytest.mark.parametrize("share", ["shared", "each"])
def test_no_token_falls_between_a_list_that_is_reused_and_the_window(share):
    """Stages that run between see the candidates of the first one, so the edge stays as it was."""
    q, k = integers(4, 400, seed=1), integers(2, 400, seed=2)
    method = get_method("infinite_hip", **SMALL, refresh=(8, 4, 2), lists=share)
    edges, before = [], None
    for i, plan in enumerate(decode_steps(method, q, k, 300, 24)):
        mask = plan.to_dense_mask()[:, 0]
        if i % 8 == 0:
            assert torch.equal(mask, fresh_mask(method, q, k, 300 + i))
        elif i % 2:  # what was seen before, and the new token
            assert torch.equal(mask[:, :-1], before)
        before = mask
        edges.append(plan.kv_len - plan.window)
        assert bool(mask[:, edges[-1] :].all())
    assert edges == [268 + i // 8 * 8 for i in range(24)]


def test_the_last_stage_alone_chooses_among_what_the_others_left():
    q, k = integers(4, 400, seed=1), integers(2, 400, seed=2)
    method = get_method("infinite_hip", **SMALL, refresh=(64, 64, 1))
    changed, memory, before = 0, None, None
    for kv_len in range(300, 320):
        row = q[:, kv_len - 1 : kv_len]
        memory = method.decode(row, k[:, :kv_len], scale=1.0, memory=memory)[1]
        first, second, last = memory[2]
        assert set(last.flatten().tolist()) <= set(second.flatten().tolist())
        if before is not None:
            assert torch.equal(first, before[0])
            assert torch.equal(second, before[1])
            changed += not torch.equal(last, before[2])
        before = memory[2]
    assert changed > 10


def test_decode_is_exact_while_all_is_kept_and_then_begins():
    q, k = integers(2, 80, seed=1), integers(2, 80, seed=2)
    plans = list(decode_steps(get_method("infinite_hip", **SMALL), q, k, 64, 10))
    assert [plan is None for plan in plans] == [True] * 5 + [False] * 5
    assert get_method("infinite_hip").sparse_decode
    assert not get_method("infinite_hip", refresh=(0, 0, 0)).sparse_decode
