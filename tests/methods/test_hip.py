"""HiP against the authors' own lists and a plain search, and what must hold beyond them."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from sparse_patch_kernels import block_sparse_attention
from sparse_patch_kernels.cpu import selection
from sparse_patch_kernels.estimators.tree_search import plain

from sparse_patch import get_method
from sparse_patch.diagnostics import recall
from sparse_patch.methods import hip
from tests.golden.gen_inputs_hip import make_inputs
from tests.methods.hip_cases import decode_steps, fresh_mask, integers, lists, load

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("hip11*.npz"))


def test_all_golden_files_are_here():
    assert len(FILES) == 8


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path):
    golden, config, (q, k, v) = load(path)
    draft = "draft" in path.stem
    method = get_method(
        "hip",
        block_q=config["bq"],
        stride_q=config["sq"],
        block_k=config["bk"],
        mask_k=config["mask_k"],
        sink=config["sink"],
        window=config["window"],
        rep=config["rep"],
        init="floor" if draft else "aligned",
        row_causal=not draft,
    )
    scale = config["q_scale"]
    plan = method.plan(q, k, scale=scale, q_offset=config["T"] - config["Tq"])
    assert torch.equal(lists(plan, config["H"]), torch.tensor(golden["blocks"]))
    assert torch.equal(plan.runs[0].count, torch.tensor(golden["ks"]))
    if draft:  # lists only
        return
    rows = torch.tensor(golden["out_rows"]).long()
    for backend in ("reference", "cpu"):
        out = block_sparse_attention(q, k, v, plan, scale=scale, backend=backend)
        torch.testing.assert_close(out[:, rows], torch.tensor(golden["out"]), atol=1e-5, rtol=0)


# --- a plain search, one block of one head at a time ---------------------------------------------


def plain_list(scores, method, block):
    """Leaves of one query block, from all scores `[q_len][kv_len]` of one head."""
    q_len, kv_len = len(scores), len(scores[0])
    offset = kv_len - q_len
    end = min((block + 1) * method.block_q, q_len)
    far = max(0, end + offset - method.window - method.sink)
    n_leaves, keep = math.ceil(far / method.block_k), math.ceil(method.mask_k / method.block_k)
    if n_leaves <= keep:
        return list(range(n_leaves))
    block_rows = list(range(block * method.block_q, end))
    rows = block_rows[method.stride_q - 1 :: method.stride_q]
    if len(block_rows) % method.stride_q:  # a stride that the end cuts short has its last row
        rows.append(block_rows[-1])

    def score_of(leaf):
        best = torch.finfo(torch.float32).min
        for token in range(0, method.block_k, method.stride_k):
            key = method.sink + leaf * method.block_k + token
            for row in rows:
                if not method.row_causal or key <= row + offset - method.window:
                    best = max(best, scores[row][key])
        return best

    chunks = keep * method.beam_factor
    edges = [j * n_leaves // chunks for j in range(chunks + 1)]
    nodes = [(a, b - a) for a, b in itertools.pairwise(edges) if b > a]
    while True:
        halves = [(s, z // 2) for s, z in nodes] + [(s + z // 2, z - z // 2) for s, z in nodes]
        halves = sorted(half for half in halves if half[1])
        last = max(z for _, z in halves) == 1
        score = [score_of(s + z // 2 if method.rep == "center" else s) for s, z in halves]
        order = sorted(range(len(halves)), key=lambda i: (-score[i], i))
        nodes = sorted(halves[i] for i in order[: keep if last else chunks])
        if last:
            return [s for s, _ in nodes]


SMALL = {"block_q": 16, "block_k": 4, "mask_k": 32, "sink": 4, "window": 16}


@pytest.mark.parametrize(
    ("kv_len", "offset", "params"),
    [
        (300, 0, {}),
        (300, 0, {"rep": "first"}),
        (300, 0, {"row_causal": False}),
        (263, 0, {"stride_q": 3}),  # the last block's rows are no multiple of the stride
        (257, 0, {"stride_q": 4}),  # and here fewer than one
        (300, 0, {"stride_k": 3, "mask_k": 30}),
        (301, 0, {"sink": 3, "window": 13}),  # off any grid
        (300, 0, {"sink": 0, "window": 4}),
        (300, 160, {}),
        (300, 171, {}),
        (300, 299, {}),
        (300, 0, {"beam_factor": 2}),
        (600, 500, {"beam_factor": 3}),
    ],
)
def test_the_search_equals_a_plain_one(kv_len, offset, params):
    method = get_method("hip", **{**SMALL, **params})
    q, k = integers(4, kv_len, seed=1)[:, offset:], integers(2, kv_len, seed=2)
    plan = method.plan(q, k, scale=1.0, q_offset=offset)
    got = lists(plan, 4)
    for head in range(4):
        scores = (q[head] @ k[head // 2].T).tolist()
        for block in range(plan.n_q_blocks):
            leaves = plain_list(scores, method, block)
            want = [method.sink + leaf * method.block_k for leaf in leaves]
            assert [s for s in got[head, block].tolist() if s >= 0] == want


# --- what it costs -------------------------------------------------------------------------------


def keys_scored(monkeypatch, kv_len, method):
    """Keys that one head's search multiplies with queries, counted where that happens."""
    counted = 0
    dot = plain.dot

    def counting(queries, keys):
        nonlocal counted
        counted += keys.shape[0] * keys.shape[1] * keys.shape[2]
        return dot(queries, keys)

    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, kv_len, 4, generator=generator)
    with monkeypatch.context() as patched:
        patched.setattr(selection, "_library", lambda source: None)
        patched.setattr(plain, "dot", counting)
        method.plan(q, k, scale=1.0, q_offset=0)
    return counted


def test_work_grows_as_t_log_t(monkeypatch):
    method = get_method("hip", mask_k=128, stride_q=16)
    lengths = [1 << n for n in range(12, 17)]
    work = {n: keys_scored(monkeypatch, n, method) for n in lengths}
    assert lengths[0] == 4096
    assert lengths[-1] == 65536
    for shorter, longer in itertools.pairwise(lengths):
        # A doubling brings twice the blocks, and one round more for each.
        rounds = work[shorter] / (shorter / 64) / 256  # 64 rows a block, 2 x 128 keys a round
        assert work[longer] / work[shorter] == pytest.approx(2 * (1 + 1 / rounds), rel=0.05)
    assert work[65536] / work[4096] < 16 * 2.5  # quadratic work would grow by 256


def test_a_beam_as_wide_as_the_sequence_scores_every_leaf_once(monkeypatch):
    monkeypatch.setattr(plain, "TILE_ELEMENTS", 1)  # one block at a time: no padding to the longest
    method = get_method("hip", beam_factor=100, **SMALL)
    leaves = [max(0, end - 20) // 4 for end in range(16, 513, 16)]
    searched = sum(n + n % 2 for n in leaves if n > 8)  # chunks are of two
    assert keys_scored(monkeypatch, 512, method) == 4 * searched


def test_a_few_keys_are_gathered_at_a_time(monkeypatch):
    monkeypatch.setattr(selection, "_library", lambda source: None)
    method = get_method("hip", **SMALL)
    q, k = integers(4, 500, seed=1), integers(2, 500, seed=2)
    whole = lists(method.plan(q, k, scale=1.0, q_offset=0), 4)
    monkeypatch.setattr(plain, "TILE_ELEMENTS", 1)
    largest, dot = 0, plain.dot

    def watching(queries, keys):
        nonlocal largest
        largest = max(largest, keys.numel())
        return dot(queries, keys)

    monkeypatch.setattr(plain, "dot", watching)
    assert torch.equal(lists(method.plan(q, k, scale=1.0, q_offset=0), 4), whole)
    assert largest <= 2 * 8 * 4 * 8  # two halves of 8 chunks, 4 keys each, of 8 numbers: one block


# --- what must hold on any input -----------------------------------------------------------------


def structured(kv_len=2048, heads=4, kv_heads=2, seed=21):
    q, k, _ = make_inputs(seed, kv_len, heads, kv_heads)
    return torch.tensor(q), torch.tensor(k)


def test_a_wider_beam_keeps_more_mass_with_lists_of_one_size():
    q, k = structured()
    params = {"block_q": 64, "block_k": 8, "mask_k": 128, "sink": 16, "window": 128}
    mass, kept = [], []
    for beam in (1, 2, 4, 16):
        method = get_method("hip", beam_factor=beam, **params)
        plan = method.plan(q, k, scale=0.125, q_offset=0)
        mass.append(float(recall(q, k, plan, scale=0.125).mean()))
        kept.append(plan.runs[0].count)
    assert mass[0] + 0.03 < mass[1] < mass[2]
    assert mass[3] == pytest.approx(mass[2], abs=0.02)
    assert all(torch.equal(count, kept[0]) for count in kept)


def test_the_widest_beam_keeps_the_best_leaves_of_all():
    q, k = integers(2, 300, seed=1), integers(1, 300, seed=2)
    method = get_method("hip", beam_factor=100, **SMALL)
    got = lists(method.plan(q, k, scale=1.0, q_offset=0), 2)
    # The block of rows 240..255, of which the odd ones count; its leaves are keys 4..239.
    row, key = torch.arange(241, 256, 2)[:, None], torch.arange(4, 240)
    scores = (q[:, 241:256:2] @ k[0, 4:240].T).masked_fill(key > row - 16, -1000)
    best = scores.amax(1).view(2, -1, 4).amax(-1)
    order = best.argsort(dim=1, descending=True, stable=True)[:, :8].sort(dim=1).values
    assert torch.equal(got[:, 15], (4 + 4 * order).int())


def test_among_equal_scores_the_earlier_leaf_wins():
    q, k = torch.ones(1, 300, 8), torch.ones(1, 300, 8)
    got = lists(get_method("hip", **SMALL).plan(q, k, scale=1.0, q_offset=0), 1)
    assert got[0, -1].tolist() == list(range(4, 36, 4))


@pytest.mark.parametrize("init", ["floor", "aligned"])
def test_plans_of_any_length_are_lawful_and_use_the_budget(init):
    for kv_len in (*range(53, 90), 131, 255, 513):
        for offset in (0, 7, kv_len - 1):
            q, k = integers(2, kv_len, seed=kv_len)[:, offset:], integers(2, kv_len, seed=1)
            method = get_method("hip", init=init, beam_factor=1 + kv_len % 3, **SMALL)
            plan = method.plan(q, k, scale=1.0, q_offset=offset)
            plan.check()  # ascending, disjoint, begun in sight
            assert bool((plan.runs[0].count[:, -1] == 8).all())
            assert bool(plan.to_dense_mask().diagonal(offset, 1, 2).all())


def test_heads_do_not_influence_each_other():
    q, k = integers(4, 500, seed=1), integers(2, 500, seed=2)
    method = get_method("hip", **SMALL)
    whole = lists(method.plan(q, k, scale=1.0, q_offset=0), 4)
    for head in range(4):
        one = method.plan(q[head][None], k[head // 2][None], scale=1.0, q_offset=0)
        assert torch.equal(lists(one, 1)[0], whole[head])


@pytest.mark.parametrize("end", [160, 496, 500])
def test_a_chunk_selects_what_the_whole_prompt_selects_there(end):
    """Nor does anything after a block of queries change its list."""
    q, k = integers(4, 500, seed=1), integers(2, 500, seed=2)
    method = get_method("hip", **SMALL)
    whole = lists(method.plan(q, k, scale=1.0, q_offset=0), 4)
    chunk = method.plan(q[:, 96:end], k[:, :end], scale=1.0, q_offset=96)
    assert torch.equal(lists(chunk, 4), whole[:, 6 : 6 + chunk.n_q_blocks])


def test_with_a_row_causal_search_a_list_holds_keys_that_some_row_could_see():
    """Leaves that start in the window of every row are no use to any."""
    q, k = integers(1, 500, seed=1), integers(1, 500, seed=2)
    got = lists(get_method("hip", **SMALL).plan(q, k, scale=1.0, q_offset=0), 1)[0]
    last = torch.arange(1, 33) * 16 - 1
    assert bool((got <= last.clamp(max=499)[:, None] - 16).all())


def test_half_precision_selects_what_its_float32_copy_selects():
    q, k = integers(4, 500, seed=1).bfloat16(), integers(2, 500, seed=2).bfloat16()
    method = get_method("hip", **SMALL)
    got = method.plan(q, k, scale=1.0, q_offset=0)
    want = method.plan(q.float(), k.float(), scale=1.0, q_offset=0)
    assert torch.equal(lists(got, 4), lists(want, 4))


def test_a_broken_input_still_gives_a_lawful_plan():
    q, k = integers(2, 500, seed=1), integers(2, 500, seed=2)
    q[0, 300], k[1, 100] = float("nan"), float("inf")
    get_method("hip", **SMALL).plan(q, k, scale=1.0, q_offset=0).check()


def test_exact_where_all_would_be_kept():
    q, k = integers(2, 53, seed=1), integers(2, 53, seed=2)
    method = get_method("hip", **SMALL)  # 32 + 4 + 16 = 52
    assert method.plan(q[:, :52], k[:, :52], scale=1.0, q_offset=0) is None
    plan = method.plan(q, k, scale=1.0, q_offset=0)
    hidden = ~plan.to_dense_mask() & torch.ones(53, 53, dtype=torch.bool).tril()
    assert 0 < int(hidden.sum()) < 53


def test_defaults_and_preset_are_those_of_the_documents():
    method = get_method("hip")
    assert (method.block_q, method.block_k, method.mask_k) == (64, 8, 1024)
    assert (method.sink, method.window, method.refresh, method.dense_layers) == (16, 256, 8, 3)
    paper = get_method("hip", preset="paper")
    assert (paper.block_q, paper.block_k, paper.mask_k, paper.window) == (32, 2, 512, 256)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"mask_k": 0}, "mask_k=0"),
        ({"block_k": 1.5}, "block_k=1.5"),
        ({"window": 0}, "window=0"),
        ({"window": 7}, "window=7 must be at least block_k=8"),
        ({"rep": "last"}, "rep='last' must be one of 'center', 'first'"),
        ({"init": "even"}, "init='even'"),
        ({"beam_factor": 0}, "beam_factor=0"),
        ({"refresh": -1}, "refresh=-1"),
        ({"row_causal": 1}, "row_causal=1 must be true or false"),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        get_method("hip", **params)


# --- decoding, step by step ----------------------------------------------------------------------


def test_no_token_falls_between_a_list_that_is_reused_and_the_window():
    q, k = integers(4, 400, seed=1), integers(2, 400, seed=2)
    method = get_method("hip", refresh=5, **SMALL)
    edges, before = [], None
    for i, plan in enumerate(decode_steps(method, q, k, 300, 20)):
        mask = plan.to_dense_mask()[:, 0]
        if i % 5 == 0:
            assert torch.equal(mask, fresh_mask(method, q, k, 300 + i))
        else:  # what was seen before, and the new token
            assert torch.equal(mask, torch.cat([before, torch.ones(4, 1, dtype=torch.bool)], 1))
        before = mask
        edges.append(plan.kv_len - plan.window)
    assert edges == [284 + i // 5 * 5 for i in range(20)]


def test_a_list_is_made_anew_every_so_many_steps(monkeypatch):
    q, k = integers(2, 400, seed=1), integers(2, 400, seed=2)
    searched, search = [], hip.Hip._search
    monkeypatch.setattr(
        hip.Hip,
        "_search",
        lambda self, q, k, s: searched.append(k.shape[1]) or search(self, q, k, s),
    )
    list(decode_steps(get_method("hip", refresh=8, **SMALL), q, k, 300, 25))
    assert searched == [300, 308, 316, 324]


def test_a_decode_step_with_a_fresh_list_equals_the_last_row_of_a_prefill():
    """A block of one row, searched for alone."""
    q, k = integers(4, 400, seed=1), integers(2, 400, seed=2)
    method = get_method("hip", stride_q=1, **{**SMALL, "block_q": 1})
    whole = lists(method.plan(q, k, scale=1.0, q_offset=0), 4)
    (plan,) = decode_steps(get_method("hip", **SMALL), q, k, 400, 1)
    assert torch.equal(lists(plan, 4)[:, 0], whole[:, -1])


def test_decode_is_exact_while_all_is_kept_and_then_begins():
    q, k = integers(2, 60, seed=1), integers(2, 60, seed=2)
    plans = list(decode_steps(get_method("hip", **SMALL), q, k, 48, 10))
    assert [plan is None for plan in plans] == [True] * 5 + [False] * 5
    assert not get_method("hip", refresh=0).sparse_decode
