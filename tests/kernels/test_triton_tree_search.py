"""The kernels of HiP's tree search, in Triton's interpreter, against the plain search."""

import itertools
from pathlib import Path

import pytest
import torch
from sparse_patch_kernels import dispatch
from sparse_patch_kernels.estimators.tree_search import plain, search_leaves

from sparse_patch import get_method
from tests.kernels.interpreted import in_both_types, poison_empty, require_interpreter
from tests.methods.hip_cases import lists, load

tree_search = require_interpreter("estimators.tree_search.kernel")

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"block_q": 16, "block_k": 4, "mask_k": 32, "sink": 4, "window": 16}


def inputs(heads, kv_heads, q_len, kv_len, dim=16, seed=0, dtype=torch.float32):
    """q and k with a sink, local mass and a few strong keys.

    Numbers are multiples of 1/16 below 4: in any order of sums, and in half precision, scores are
    exact, so that both searches have the same ties.
    """
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randn(kv_heads, 1, dim, generator=generator)
    drift = torch.randn(kv_heads, kv_len, dim, generator=generator).cumsum(1) / 8
    k = drift + torch.randn(kv_heads, kv_len, dim, generator=generator) / 2
    strong = torch.randint(kv_len, (5,), generator=generator)
    k[:, strong] += topic
    k[:, :2] += topic
    q = (drift + topic)[:, kv_len - q_len :].repeat_interleave(heads // kv_heads, 0)
    q = q + torch.randn(heads, q_len, dim, generator=generator)
    return tuple((x.clamp(-3.9, 3.9) * 16).round().div(16).to(dtype) for x in (q, k))


def tree_of(**params):
    return get_method("hip", **params).tree


def same_lists(q, k, tree):
    """Assert that the kernels' lists are the plain ones, and end in zeros."""
    want, want_count = search_leaves.plain(q, k, 0.25, tree)
    leaves, count = tree_search.search_leaves(q, k, 0.25, tree)
    assert (leaves.dtype, count.dtype) == (torch.int32, torch.int32)
    assert torch.equal(count, want_count)
    holds = torch.arange(want.shape[2]) < count[..., None]
    assert torch.equal(leaves, want.where(holds, 0))


@pytest.mark.parametrize(
    ("q_len", "kv_len", "params"),
    [
        (60, 300, {}),  # the last block is short
        (77, 77, {}),  # blocks that keep all, or none
        (60, 300, {"rep": "first"}),
        (60, 300, {"row_causal": False}),
        (39, 263, {"stride_q": 3}),  # the last block's rows are no multiple of the stride
        (33, 257, {"stride_q": 4}),  # and here fewer than one
        (40, 300, {"stride_k": 3, "mask_k": 30}),
        (40, 301, {"sink": 3, "window": 13}),
        (40, 300, {"sink": 0, "window": 4}),
        (40, 300, {"block_k": 1, "mask_k": 11}),
        (40, 700, {"block_q": 40, "stride_q": 1, "block_k": 16, "mask_k": 48}),
        (1, 300, {}),
        (40, 150, {"beam_factor": 2}),  # one round: more chunks than leaves
        (40, 600, {"beam_factor": 3}),
        (90, 600, {"init": "aligned"}),
        (40, 600, {"init": "aligned", "rep": "first", "beam_factor": 3}),
    ],
)
def test_lists_are_those_of_the_plain_search(q_len, kv_len, params, monkeypatch):
    q, k = inputs(2, 1, q_len, kv_len, seed=kv_len)
    poison_empty(monkeypatch)
    same_lists(q, k, tree_of(**{**SMALL, **params}))


@pytest.mark.parametrize(("dim", "dtype"), in_both_types([64, 8, 24, 80, 128, 192]), ids=str)
def test_any_head_dim(dim, dtype, monkeypatch):
    q, k = inputs(2, 1, 20, 200, dim, dtype=dtype)
    poison_empty(monkeypatch)
    same_lists(q, k, tree_of(**SMALL))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (6, 2)])
def test_any_group_of_heads(heads, kv_heads, monkeypatch):
    """In half precision, heads of a group share a program in the first round."""
    q, k = inputs(heads, kv_heads, 20, 200, dtype=torch.float16)
    poison_empty(monkeypatch)
    same_lists(q, k, tree_of(**SMALL))
    same_lists(q, k, tree_of(**{**SMALL, "block_q": 20, "stride_q": 20}))


def test_any_strides():
    q, k = inputs(2, 1, 20, 200)
    tree = tree_of(**SMALL)
    want = tree_search.search_leaves(q, k, 0.25, tree)
    rows_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k)]
    dims_first = [x.mT.contiguous().mT for x in (q, k)]
    for apart in (rows_first, dims_first):
        got = tree_search.search_leaves(*apart, 0.25, tree)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("programs", [1, 10000])
@pytest.mark.parametrize("rep", ["center", "first"])
def test_a_program_may_score_all_chunks_or_a_part(programs, rep, monkeypatch):
    monkeypatch.setattr(tree_search, "_PROGRAMS", programs)
    q, k = inputs(2, 1, 32, 900)
    poison_empty(monkeypatch)
    same_lists(q, k, tree_of(**{**SMALL, "mask_k": 256, "rep": rep}))


def test_heads_may_be_searched_in_parts(monkeypatch):
    monkeypatch.setattr(tree_search, "_SCRATCH_BYTES", 1)
    q, k = inputs(6, 3, 20, 200)
    poison_empty(monkeypatch)
    same_lists(q, k, tree_of(**SMALL))


def test_among_equal_scores_the_earlier_half_is_kept():
    """One round of scores that are few numbers, with chunks of none to three leaves."""
    q, k = torch.zeros(3, 96, 16), torch.zeros(1, 300, 16)
    search = tree_search._Search(tree_of(**SMALL), q, k)
    (kept, scores), generator = search.scratch(q), torch.Generator().manual_seed(0)
    size = torch.randint(4, (1, 6, 8), generator=generator)
    start = size.cumsum(-1) - size
    values = torch.tensor([-3.4e38, -2.5, -2.0, -0.0, -0.0, 0.0, 0.0, float("inf")])
    scores.copy_(values[torch.randint(8, scores.shape, generator=generator)])
    given, out = scores.tolist(), torch.empty(3, 6, 8, dtype=torch.int32)
    extent = torch.full((6, 2), 2, dtype=torch.int32)
    search.keep_best(start << 32 | size, kept, scores, extent, (out, out[..., 0].clone()), 0)

    counts = set()
    for head, block in itertools.product(range(3), range(6)):
        halves = []
        for a, z in zip(start[0, block].tolist(), size[0, block].tolist(), strict=True):
            halves += [(a, z // 2), (a + z // 2, z - z // 2)]
        score = given[head][block]
        best = sorted((i for i in range(16) if halves[i][1]), key=lambda i: -score[i])[:8]
        counts.add(len(best))
        want = [halves[i][0] << 32 | halves[i][1] for i in sorted(best)]
        assert kept[head, block].tolist() == want + [0] * (8 - len(want))
        want = [score[i] for i in sorted(best) for _ in range(2)]
        assert scores[head, block, : len(want)].tolist() == want
    assert len(counts) > 1  # some had to choose, and some had not enough


def test_a_list_of_equal_scores_is_no_longer_than_others():
    q, k = torch.ones(1, 32, 16), torch.ones(1, 300, 16)
    leaves, count = tree_search.search_leaves(q, k, 1.0, tree_of(**SMALL))
    assert leaves.tolist() == [[list(range(8))] * 2]
    assert count.tolist() == [[8, 8]]


@pytest.mark.parametrize(
    ("name", "rep", "init"),
    [("hip11_0_T512_center", "center", "aligned"), ("hip11draft_0_T512", "first", "floor")],
)
def test_golden_lists(name, rep, init, monkeypatch):
    """One head of the authors' own lists."""
    golden, config, (q, k, _) = load(GOLDEN / f"{name}.npz")
    method = get_method(
        "hip",
        **{"block_q": config["bq"], "stride_q": config["sq"], "block_k": config["bk"]},
        **{"mask_k": config["mask_k"], "sink": config["sink"], "window": config["window"]},
        **{"rep": rep, "init": init, "row_causal": init == "aligned"},
    )
    monkeypatch.setattr(dispatch, "uses_triton", lambda x: True)
    poison_empty(monkeypatch)
    plan = method.plan(q[:1], k[:1], scale=config["q_scale"], q_offset=0)
    assert torch.equal(lists(plan, 1), torch.tensor(golden["blocks"][:1]))
    assert torch.equal(plan.runs[0].count, torch.tensor(golden["ks"][:1]))


def test_the_method_plans_the_same(monkeypatch):
    q, k = inputs(4, 2, 20, 200)
    method = get_method("hip", **SMALL)

    def plans():
        yield method.plan(q, k, scale=0.25, q_offset=180)
        yield method.decode(q[:, -1:], k, scale=0.25, memory=None)[0]

    want = [lists(plan, 4) for plan in plans()]
    monkeypatch.setattr(dispatch, "uses_triton", lambda x: True)
    monkeypatch.setattr(plain, "dot", None)  # the plain search would call it
    for plan, same in zip(plans(), want, strict=True):
        plan.check()
        assert torch.equal(lists(plan, 4), same)


def test_a_broken_input_still_gives_lawful_lists(monkeypatch):
    q, k = inputs(2, 1, 40, 300)
    q[0, 3], k[0, 100], k[0, 120] = float("nan"), float("inf"), float("-inf")
    poison_empty(monkeypatch)
    monkeypatch.setattr(dispatch, "uses_triton", lambda x: True)
    plan = get_method("hip", **SMALL).plan(q, k, scale=1.0, q_offset=260)
    plan.check()
    assert bool((plan.runs[0].count == 8).all())


@pytest.mark.parametrize(
    "params",
    [
        {"block_q": 256, "stride_q": 1},
        {"block_k": 129, "window": 256},
        {"block_k": 1, "mask_k": 4097},
    ],
)
def test_what_the_kernels_decline_is_searched_plainly(params, monkeypatch):
    q, k = inputs(2, 1, 300, 5000)
    tree = tree_of(**params)
    assert tree_search.search_leaves(q, k, 0.25, tree) is NotImplemented
    want = search_leaves.plain(q, k, 0.25, tree)
    monkeypatch.setattr(dispatch, "uses_triton", lambda x: True)
    got = search_leaves(q, k, 0.25, tree)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("init", ["floor", "aligned"])
def test_rounds_are_known_before_any_launch(init):
    q, k = torch.zeros(1, 700, 16), torch.zeros(1, 760, 16)
    for beam in (1, 3):
        tree = tree_of(**{**SMALL, "block_q": 50, "init": init, "beam_factor": beam})
        search = tree_search._Search(tree, q, k)
        known = torch.tensor([search.rounds(block) for block in range(search.blocks)])
        needed = search.cut_leaves(q)[1][:, 0]
        assert bool((needed == known).all() if init == "floor" else (needed <= known).all())
        assert bool((known.diff() >= 0).all())
        assert known[-1] > 2


def test_recorded_launches_read_nothing():
    launch = require_interpreter("triton.launch")
    shapes = ((32, 32768, 128), (8, 32768, 128))
    q, k = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    with launch.recording() as launches:
        leaves, count = tree_search.search_leaves(q, k, 0.1, tree_of())
    assert (leaves.shape, count.shape) == ((32, 512, 128), (32, 512))
    # 4062 leaves in 128 chunks: five rounds.
    names = ["_cut_leaves", *["_score_halves", "_keep_best"] * 5]
    assert [one.kernel.__name__ for one in launches] == names
    # The first round takes four heads a program; the last scores one half of each chunk.
    assert [one.grid[1] for one in launches[1::2]] == [8, 32, 32, 32, 32]
    assert launches[-2].arguments["span"] == launches[1].arguments["span"] // 2
