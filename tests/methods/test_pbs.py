"""PBS-Attn against the authors' own answers, a plain restatement, and what must always hold."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from sparse_patch_kernels import block_sparse_attention

from sparse_patch import get_method
from tests.golden.gen_inputs_pbs import load_inputs, make_qkv

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("pbs_*.npz"))
# Two key scores are near-tied when float32 sums in another order may swap them. A score is a mean
# of exp(logit - lse): logits of up to about 16 carry roundings of 16 * 2**-24 = 1e-6 each, and that
# is the relative error of their exponential. Two such scores may be off in opposite directions.
NEAR_TIE = 2e-6


def tensors(*arrays):
    return [torch.tensor(np.asarray(a, dtype=np.float32)) for a in arrays]


def block_mask(plan):
    """bool `[heads, q_blocks, blocks]`: which blocks of slots a plan lists."""
    (run,) = plan.runs
    mask = torch.zeros(run.heads, plan.n_q_blocks, -(-plan.kv_len // run.width), dtype=torch.bool)
    head, row, slot = run.valid(run.heads).nonzero(as_tuple=True)
    mask[head, row, (run.start[head, row, slot] // run.width).long()] = True
    return mask


def in_sight(order, block):
    """bool `[heads, blocks, blocks]`: can a query block see a key in a block of slots?"""
    heads, n = order.shape
    n_blocks = -(-n // block)
    sight = torch.zeros(heads, n_blocks, n_blocks, dtype=torch.bool)
    for j in range(n_blocks):
        earliest = order[:, j * block : (j + 1) * block].amin(-1)
        for i in range(n_blocks):
            sight[:, i, j] = earliest <= min((i + 1) * block, n) - 1
    return sight


def test_all_golden_files_are_here():
    assert len(FILES) == 16


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem.removeprefix("pbs_"))
def test_golden(path):
    golden = np.load(path)
    config, *arrays = load_inputs(str(path))
    q, k, v = tensors(*arrays)
    plan = get_method(
        "pbs",
        variant="released",
        block_size=config["block_size"],
        segment=config["segment_size"],
        tau=config["threshold"],
        force_first=config["force_select_first_block"],
        selector={"mean": "mean_pool", "max": "max_pool"}[config.get("key_pool_mode", "mean")],
    ).plan(q, k, scale=q.shape[2] ** -0.5, q_offset=0)
    if "fallback" in path.name:
        assert plan is None  # the authors' code falls back to dense
        return
    order, want_order = plan.key_order.long(), torch.tensor(golden["perm"]).long()
    score = torch.tensor(golden["key_score"])
    n = score.shape[1]
    assert torch.equal(order.sort(-1).values, torch.arange(q.shape[1]).expand(q.shape[0], -1))
    assert torch.equal(order[:, n:], want_order[:, n:])
    got, want = score.gather(1, order[:, :n]), score.gather(1, want_order[:, :n])
    torch.testing.assert_close(got, want, rtol=NEAR_TIE, atol=0)
    assert (order != want_order).sum() <= 8  # near-ties are rare
    # Theirs lists the whole segment of a query block; blocks that no row can see are left out here.
    want_mask = torch.tensor(golden["block_mask"]) & in_sight(want_order, config["block_size"])
    assert torch.equal(block_mask(plan), want_mask)
    if "out" in golden:
        rows = torch.tensor(golden["out_rows"] if "out_rows" in golden else range(q.shape[1]))
        for backend in ("reference", "cpu"):
            out = block_sparse_attention(q, k, v, plan, backend=backend)[:, rows.long()]
            torch.testing.assert_close(out, torch.tensor(golden["out"]), atol=1e-5, rtol=0)


def generated(n=1024, heads=4, kv_heads=2, seed=3, dim=64):
    return tensors(*make_qkv(seed, n, heads, kv_heads, dim))


def plan_of(q, k, offset=0, **params):
    params = {"block_size": 64, **params}
    return get_method("pbs", **params).plan(q, k, scale=q.shape[2] ** -0.5, q_offset=offset)


def plain_antidiagonal(q, k, scale, offset, block, stride):
    """Mass `[rows, blocks]` of one head, group by group."""
    n = -(-len(k) // stride) * stride
    queries, keys = torch.zeros(n, q.shape[1]), torch.zeros(n, q.shape[1])
    queries[offset : len(k)], keys[: len(k)] = q, k
    first = offset // stride
    mass = torch.zeros(-(-len(k) // block) - offset // block, -(-len(k) // block))
    for a in range(first, n // stride):
        seen = a + 1
        backwards = queries[a * stride : (a + 1) * stride].flip(0)
        groups = keys[: seen * stride].view(seen, stride, -1)
        probs = ((groups * backwards).sum((1, 2)) * scale / stride).softmax(0)
        for c in range(seen):
            mass[a * stride // block - offset // block, c * stride // block] += probs[c]
    return mass


def plain_mask(q, k, offset, *, block_size, segment, tau, share, selector, force_first=True):
    """Token mask of `variant="corrected"`, written down straight from the definition."""
    heads, q_len, _ = q.shape
    group, n, scale = heads // k.shape[0], k.shape[1], q.shape[2] ** -0.5
    whole, blocks = n // segment * segment, -(-n // block_size)
    visible = torch.zeros(heads, q_len, n, dtype=torch.bool)
    for h in range(heads):
        keys, probe = k[h // group], q[h, -block_size:]
        if share == "group":
            probe = q[h // group * group : (h // group + 1) * group, -block_size:].mean(0)
        score = (probe @ keys[:whole].T * scale).softmax(-1).mean(0)
        order = torch.arange(n)
        for s in range(0, whole, segment):
            order[s : s + segment] = s + score[s : s + segment].argsort(descending=True)
        slots = [range(j * block_size, min((j + 1) * block_size, n)) for j in range(blocks)]
        past_mass = None
        if selector == "antidiagonal":
            past_mass = plain_antidiagonal(q[h], keys[order], scale, offset, block_size, 8).log()
        kept = []
        for i in range(offset // block_size, blocks):
            own = i * block_size // segment
            past = [j for j in range(blocks) if j * block_size // segment < own]
            chosen = [j for j in range(blocks) if j * block_size // segment == own]
            mine = q[h, max(0, slots[i].start - offset) : slots[i].stop - offset].mean(0)
            pool = {"mean_pool": lambda x: x.mean(0), "max_pool": lambda x: x.amax(0)}.get(selector)
            if past:
                if pool:
                    scores = [mine @ pool(keys[order[slots[j]]]) * scale for j in past]
                else:
                    scores = [past_mass[i - offset // block_size, j] for j in past]
                mass, total = torch.stack(scores).softmax(0), 0.0
                for j in mass.argsort(descending=True).tolist():
                    if total < tau:
                        chosen.append(past[j])
                    total += float(mass[j])
            if force_first:
                chosen += [j for j in range(blocks) if 0 in order[slots[j]]]
            kept.append(torch.cat([order[slots[j]] for j in chosen]))
        # A query block begins at the first query; it keeps what any block it overlaps keeps.
        for first in range(0, q_len, block_size):
            end = min(first + block_size, q_len)
            for i in {(first + offset) // block_size, (end - 1 + offset) // block_size}:
                visible[h, first:end, kept[i - offset // block_size]] = True
    return visible & torch.ones(q_len, n, dtype=torch.bool).tril(offset)


@pytest.mark.parametrize("selector", ["mean_pool", "max_pool", "antidiagonal"])
@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize(
    ("n", "offset", "segment", "tau"),
    [(700, 0, 128, 0.8), (640, 320, 64, 0.5), (715, 301, 128, 0.9), (600, 199, 256, 0.6)],
)
def test_corrected_equals_a_plain_restatement(selector, share, n, offset, segment, tau):
    q, k, _ = generated(n, 4, 2, seed=5, dim=16)
    params = {"block_size": 32, "segment": segment, "tau": tau}
    params |= {"share": share, "selector": selector, "force_first": tau != 0.5}
    plan = plan_of(q[:, offset:], k, offset=offset, **params)
    assert torch.equal(plan.to_dense_mask(), plain_mask(q[:, offset:], k, offset, **params))


@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize(("n", "offset"), [(1000, 0), (1024, 300), (640, 512)])
def test_keys_move_inside_complete_segments_only(n, offset, share):
    q, k, _ = generated(n)
    order = plan_of(q[:, offset:], k, offset=offset, share=share).key_order
    assert order.shape == ({"head": 4, "group": 2}[share], n)
    whole = n // 256 * 256
    for first in range(0, whole, 256):
        inside = order[:, first : first + 256]
        assert torch.equal(
            inside.sort(-1).values, torch.arange(first, first + 256).expand_as(inside)
        )
        assert not torch.equal(inside, inside.sort(-1).values)
    assert torch.equal(order[:, whole:], torch.arange(whole, n).expand_as(order[:, whole:]))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_row_is_blind_to_the_future(backend):
    """Of the values, that is: the choice of keys looks at the last queries, as the method does."""
    q, k, v = generated(700)
    plan = plan_of(q, k, tau=0.7)
    out = block_sparse_attention(q, k, v, plan, backend=backend)
    for row in (0, 100, 255, 256, 611):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[:, row + 1 :], changed_v[:, row + 1 :] = 5.0, 100.0
        again = block_sparse_attention(q, changed_k, changed_v, plan, backend=backend)
        torch.testing.assert_close(again[:, : row + 1], out[:, : row + 1], atol=1e-5, rtol=0)
        assert not torch.allclose(again[:, row + 1 :], out[:, row + 1 :])


@pytest.mark.parametrize("selector", ["mean_pool", "max_pool", "antidiagonal"])
@pytest.mark.parametrize(("n", "offset"), [(1000, 0), (1001, 420), (640, 576), (513, 0)])
def test_a_row_sees_all_of_its_segment_up_to_itself(n, offset, selector):
    q, k, _ = generated(n)
    plan = plan_of(q[:, offset:], k, offset=offset, tau=1e-6, selector=selector)
    mask = plan.to_dense_mask()
    for row in range(n - offset):
        position = row + offset
        assert bool(mask[:, row, position // 256 * 256 : position + 1].all())
    assert not bool((mask & torch.ones_like(mask[0]).triu(offset + 1)).any())


def test_more_tau_keeps_more():
    q, k, _ = generated(1100)
    for selector in ("mean_pool", "max_pool", "antidiagonal"):
        taus = (0.1, 0.3, 0.6, 0.9, 0.99)
        masks = [plan_of(q, k, tau=tau, selector=selector).to_dense_mask() for tau in taus]
        for less, more in pairwise(masks):
            assert bool((more | ~less).all())
        assert masks[0].sum() < 0.7 * masks[-1].sum()


@pytest.mark.parametrize("variant", ["released", "corrected"])
def test_tau_may_differ_by_head(variant):
    q, k, _ = generated(1000)
    q *= 4  # so sharp that the best blocks alone add up to 1 in float32
    mixed = plan_of(q, k, tau=(0.2, 1, 0.9, 3.0), variant=variant).to_dense_mask()
    for head, tau in ((0, 0.2), (2, 0.9)):
        alone = plan_of(q, k, tau=tau, variant=variant).to_dense_mask()
        assert torch.equal(mixed[head], alone[head])
    causal = torch.ones(1000, 1000, dtype=torch.bool).tril()
    assert torch.equal(mixed[1], causal)
    assert torch.equal(mixed[3], causal)
    assert plan_of(q, k, tau=[1.0, 1.0, 2.0, 1], variant=variant) is None
    with pytest.raises(ValueError, match=r"3 values given per head, but this layer .* for 4"):
        plan_of(q, k, tau=(0.2, 0.5, 0.9))


def test_a_sum_that_ends_below_tau():
    """Float32 sums end at 1 or a little beside it; this tau lies between 1 - 2**-24 and 1."""
    q, k, _ = generated(2048)
    released, corrected = (
        block_mask(plan_of(q, k, tau=1 - 2**-30, variant=v, force_first=False))
        for v in ("released", "corrected")
    )
    block = torch.arange(32)
    past = block[None] // 4 < block[:, None] // 4
    nothing = ~(released & past).any(-1)
    assert bool(nothing[:, 4:].any())
    assert not bool(nothing[:, 4:].all())
    every = (corrected & past).sum(-1) == past.sum(-1)
    assert bool(every[nothing].all())
    assert torch.equal(released[~nothing], corrected[~nothing])


def test_only_a_partial_query_block_tells_the_variants_apart():
    q, k, _ = generated(1000, seed=16)
    released, corrected = (
        block_mask(plan_of(q, k, segment=128, variant=v)) for v in ("released", "corrected")
    )
    assert torch.equal(released[:, :-1], corrected[:, :-1])
    # With zeros among its rows the mean is smaller and the softmax flatter.
    assert released[:, -1].sum() > corrected[:, -1].sum()


def test_released_pools_the_rows_that_a_query_block_lacks_as_zeros():
    q = torch.ones(1, 40, 1)
    for variant, want in (("released", [6 / 16, 1, 1, 2 / 16]), ("corrected", [1, 1, 1, 1])):
        method = get_method("pbs", variant=variant, block_size=16)
        assert method.pool_queries(q, 50)[0, :, 0].tolist() == want


@pytest.mark.parametrize("share", ["head", "group"])
def test_the_block_that_token_0_was_moved_to_is_kept(share):
    q, k, _ = generated(1024)
    # The second KV head does not like it at all: there it goes to the end of its segment.
    k[1, 0] = -q[2:, -64:].mean((0, 1))
    plan, free = (plan_of(q, k, tau=0.01, force_first=f, share=share) for f in (True, False))
    order = plan.key_order.repeat_interleave(4 // len(plan.key_order), 0)
    slot = (order == 0).float().argmax(-1)
    assert (slot < 64).tolist() == [True, True, False, False]
    assert bool((slot[2:] >= 192).all())
    assert bool(plan.to_dense_mask()[:, :, 0].all())
    assert not bool(free.to_dense_mask()[2:, 256:, 0].all(1).any())
    forced = (torch.arange(16) == slot[:, None] // 64)[:, None]
    assert torch.equal(block_mask(plan), (block_mask(free) | forced) & in_sight(order, 64))


def test_a_shared_order_is_that_of_the_mean_queries():
    q, k, _ = generated(1000)
    shared = plan_of(q, k, share="group")
    mean = plan_of(q.view(2, 2, 1000, 64).mean(1), k)
    assert torch.equal(shared.key_order, mean.key_order)
    assert shared.runs[0].heads == 4  # blocks are still chosen per head
    alone = plan_of(q[:1], k[:1])
    assert not torch.equal(alone.key_order[0], shared.key_order[0])


def test_heads_do_not_influence_each_other():
    q, k, _ = generated(1000)
    for selector in ("mean_pool", "antidiagonal"):
        whole = plan_of(q, k, selector=selector)
        for head in range(4):
            alone = plan_of(q[head : head + 1], k[head // 2 : head // 2 + 1], selector=selector)
            assert torch.equal(alone.key_order[0], whole.key_order[head])
            assert torch.equal(block_mask(alone)[0], block_mask(whole)[head])


def test_a_later_chunk_selects_what_the_whole_prompt_selects_there():
    q, k, _ = generated(1024)
    for params in ({}, {"share": "group"}, {"selector": "antidiagonal"}, {"variant": "released"}):
        whole, chunk = plan_of(q, k, **params), plan_of(q[:, 448:], k, offset=448, **params)
        assert torch.equal(chunk.key_order, whole.key_order)
        assert torch.equal(block_mask(chunk), block_mask(whole)[:, 7:])


@pytest.mark.parametrize("offset", [1, 100, 511])
def test_an_unaligned_chunk_keeps_all_that_the_whole_prompt_keeps(offset):
    """From its first whole block on: what comes before is pooled over fewer queries."""
    q, k, _ = generated(1024)
    chunk = plan_of(q[:, offset:], k, offset=offset, tau=0.7).to_dense_mask()
    whole = plan_of(q, k, tau=0.7).to_dense_mask()
    first = -(-offset // 64) * 64
    assert bool((chunk[:, first - offset :] | ~whole[:, first:]).all())


def test_exact_where_sparse_makes_no_sense():
    q, k, _ = generated(1024)
    assert plan_of(q, k, tau=1.0) is None  # asks for everything
    assert plan_of(q[:, :256], k[:, :256]) is None  # one segment
    assert plan_of(q[:, :257], k[:, :257]) is not None
    assert plan_of(q[:, -63:], k, offset=1024 - 63) is None  # fewer queries than a probe
    assert plan_of(q[:, -64:], k, offset=1024 - 64) is not None


@pytest.mark.parametrize(
    "params", [{"tau": (0.2, 0.5, 0.7, 0.9)}, {"share": "group"}, {"selector": "antidiagonal"}]
)
def test_work_goes_in_pieces_of_bounded_size(monkeypatch, params):
    q, k, _ = generated(1000)
    whole = plan_of(q, k, **params)
    monkeypatch.setattr("sparse_patch.methods.pbs._SORTED_ELEMENTS", 1)
    monkeypatch.setattr("sparse_patch_kernels.estimators.token_scores.plain.TILE_ELEMENTS", 1)
    pieces = plan_of(q, k, **params)
    assert torch.equal(block_mask(pieces), block_mask(whole))
    assert torch.equal(pieces.key_order, whole.key_order)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_in_float32(dtype):
    q, k, v = (x.to(dtype) for x in generated(600))
    plan, wide = plan_of(q, k), plan_of(q.float(), k.float())
    assert torch.equal(plan.key_order, wide.key_order)
    assert torch.equal(block_mask(plan), block_mask(wide))
    got = block_sparse_attention(q, k, v, plan, backend="cpu").float()
    want = block_sparse_attention(q.float(), k.float(), v.float(), plan, backend="reference")
    torch.testing.assert_close(got, want, atol=0.04, rtol=0)


def test_the_cpu_backend_equals_the_reference_on_chunks():
    q, k, v = generated(1001)
    for offset in (64, 333):
        for share in ("head", "group"):
            plan = plan_of(q[:, offset:], k, offset=offset, tau=0.6, share=share)
            got, want = (
                block_sparse_attention(q[:, offset:], k, v, plan, backend=b, return_lse=True)
                for b in ("cpu", "reference")
            )
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_a_broken_input_still_gives_a_lawful_plan():
    q, k, _ = generated(1000)
    q[0, -1], k[1, 10] = float("nan"), float("inf")
    for selector in ("mean_pool", "max_pool", "antidiagonal"):
        plan = plan_of(q, k, selector=selector)
        plan.check()
        assert torch.equal(plan.key_order.sort(-1).values, torch.arange(1000).expand(4, -1).int())
        mask = plan.to_dense_mask()
        assert bool(mask.diagonal(dim1=1, dim2=2).all())


def test_the_plus_preset_scores_antidiagonals():
    q, k, _ = generated(1024)
    plus = get_method("pbs", preset="plus", block_size=64).plan(q, k, scale=0.125, q_offset=0)
    assert torch.equal(block_mask(plus), block_mask(plan_of(q, k, selector="antidiagonal")))
    assert not torch.equal(block_mask(plus), block_mask(plan_of(q, k)))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"tau": 0}, r"tau=0 must be a number > 0, or a tuple of one per query head"),
        ({"tau": float("nan")}, "tau=nan"),
        ({"tau": (0.5, -1)}, r"tau=\(0.5, -1\)"),
        ({"tau": ()}, r"tau=\(\)"),
        ({"block_size": 100}, "block_size=100 must be one of 16, 32, 64, 128, 256"),
        ({"segment": 200}, "segment=200 must be a multiple of block_size=128"),
        ({"segment": 64}, "segment=64 must be a multiple of block_size=128"),
        ({"segment": 256.0}, "segment=256.0"),
        ({"selector": "mean"}, "selector='mean' must be one of 'mean_pool', 'max_pool', 'antidiag"),
        ({"stride": 4}, "stride=4 does nothing with selector='mean_pool'"),
        ({"stride": 3, "selector": "antidiagonal"}, "stride=3 must be one of 4, 8, 16"),
        ({"share": "layer"}, "share='layer' must be one of 'head', 'group'"),
        ({"force_first": 1}, "force_first=1 must be true or false"),
        ({"variant": "paper"}, "variant='paper' must be one of 'released', 'corrected'"),
        ({"threshold": 0.9}, "pbs has no parameter 'threshold'"),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        get_method("pbs", **params)
