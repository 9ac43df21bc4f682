"""FlexPrefill against the authors' own answers, and what must hold beyond them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sparse_patch_kernels import block_sparse_attention

from sparse_patch import get_method
from tests.golden.gen_inputs import load_inputs, make_qkv

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(p for p in GOLDEN.glob("flexprefill_*.npz") if "inputs" not in p.name)


def tensors(arrays, dtype=torch.float32):
    """`[1, N, H, D]` arrays -> `[H, N, D]` tensors."""
    return [torch.tensor(a[0]).transpose(0, 1).to(dtype) for a in arrays]


def block_mask(plan, n_blocks, block):
    """bool `[heads, q_blocks, k_blocks]`: which blocks a plan lists."""
    (run,) = plan.runs
    mask = torch.zeros(run.heads, plan.n_q_blocks, n_blocks, dtype=torch.bool)
    head, row, slot = run.valid(run.heads).nonzero(as_tuple=True)
    mask[head, row, (run.start[head, row, slot] // block).long()] = True
    return mask


def test_all_golden_files_are_here():
    assert len(FILES) == 28


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem.removeprefix("flexprefill_"))
def test_golden(path):
    golden = np.load(path)
    config = json.loads(str(golden["config"]))
    q, k, v = tensors(load_inputs(config["inputs"], str(GOLDEN)))
    params = {"variant": "released", **config["params"]}
    scale = params.pop("softmax_scale", None) or q.shape[-1] ** -0.5
    params["min_budget"] = params.get("min_budget") or 1  # their None
    want, want_out = torch.tensor(golden["mask"]), torch.tensor(golden["out"])
    if params.pop("gqa_interleave", False):
        # Their query head h reads KV head h % kv_heads; sorted that way it is h // group.
        order = torch.arange(q.shape[0]).view(-1, k.shape[0]).T.flatten()
        q, want, want_out = q[order], want[order], want_out[:, order]
    plan = get_method("flexprefill", **params).plan(q, k, scale=scale, q_offset=0)
    if (golden["pattern"] == 2).all():
        assert plan is None  # the authors' code falls back to dense
        return
    assert torch.equal(block_mask(plan, want.shape[2], params["block_size"]), want)
    rows = torch.tensor(golden["out_rows"]).long()
    out = block_sparse_attention(q, k, v, plan, scale=scale, backend="reference")
    torch.testing.assert_close(out.transpose(0, 1)[rows], want_out, atol=1e-5, rtol=0)
    # Where logits reach hundreds (one file), float32 itself is off by more than 1e-5, theirs too.
    # Another order of sums may then be as far from the truth as theirs is, on the other side.
    wide = block_sparse_attention(
        q.double(), k.double(), v.double(), plan, scale=scale, backend="reference"
    )
    rounding = float((wide.transpose(0, 1)[rows] - want_out).abs().max())
    out = block_sparse_attention(q, k, v, plan, scale=scale, backend="cpu")
    torch.testing.assert_close(
        out.transpose(0, 1)[rows], want_out, atol=max(1e-5, 2 * rounding), rtol=0
    )


def generated(n=1024, heads=4, kv_heads=2, seed=3):
    q, k, _ = tensors(make_qkv(seed, n, heads, kv_heads, 64))
    return q, k


def plan_of(q, k, offset=0, **params):
    params = {"min_budget": 1, "block_size": 64, **params}
    return get_method("flexprefill", **params).plan(q, k, scale=0.125, q_offset=offset)


def test_first_column_and_diagonal_are_always_kept():
    q, k = generated()
    for gamma, tau in [(1e-6, 0.0), (1e-6, 1.0), (0.5, 0.1)]:
        mask = block_mask(plan_of(q, k, gamma=gamma, tau=tau), 16, 64)
        assert bool(mask[:, :, 0].all())
        assert bool(mask.diagonal(dim1=1, dim2=2).all())


def test_more_gamma_keeps_more():
    q, k = generated()
    densities = [plan_of(q, k, gamma=g, tau=0.0).density for g in (0.3, 0.6, 0.9, 0.99)]
    assert densities == sorted(densities)
    assert densities[0] < densities[-1]


def test_exact_where_sparse_makes_no_sense():
    q, k = generated()
    assert plan_of(q, k, gamma=1.0) is None  # asks for everything
    assert plan_of(q, k, min_budget=1024) is None  # not longer than the budget
    assert plan_of(q[:, :128], k[:, :128]) is None  # two blocks
    assert plan_of(q[:, -32:], k, offset=1024 - 32) is None  # fewer queries than a probe


def test_corrected_budget_counts_blocks_of_its_own_size():
    q, k = generated()
    released = plan_of(q, k, tau=0.0, variant="released")
    corrected = plan_of(q, k, tau=0.0, variant="corrected")
    assert corrected.density > released.density
    same = [plan_of(q, k, tau=0.0, block_size=128, variant=v) for v in ("released", "corrected")]
    assert torch.equal(block_mask(same[0], 8, 128), block_mask(same[1], 8, 128))


def test_corrected_probe_uses_the_scale_of_the_model():
    q, k = generated()
    make = get_method("flexprefill", min_budget=1, block_size=64, variant="corrected").plan
    soft, sharp = (make(q, k, scale=s, q_offset=0).density for s in (0.01, 0.5))
    assert soft > sharp


def test_heads_do_not_influence_each_other():
    q, k = generated()
    whole = block_mask(plan_of(q, k, tau=0.3), 16, 64)
    for head in range(4):
        alone = plan_of(q[head : head + 1], k[head // 2 : head // 2 + 1], tau=0.3)
        assert torch.equal(block_mask(alone, 16, 64)[0], whole[head])


def test_a_later_chunk_selects_what_the_whole_prompt_selects_there():
    """With the same last queries, lines do not depend on where the chunk began."""
    q, k = generated()
    whole = block_mask(plan_of(q, k, tau=0.0), 16, 64)
    chunk = plan_of(q[:, 512:], k, offset=512, tau=0.0)
    assert torch.equal(block_mask(chunk, 16, 64), whole[:, 8:])
    assert (chunk.q_len, chunk.kv_len) == (512, 1024)


@pytest.mark.parametrize("offset", [1, 37, 100, 511])
def test_an_unaligned_chunk_keeps_all_that_an_aligned_one_keeps(offset):
    q, k = generated()
    chunk = plan_of(q[:, offset:], k, offset=offset, tau=0.0).to_dense_mask()
    whole = plan_of(q, k, tau=0.0).to_dense_mask()[:, offset:]
    assert bool((chunk | ~whole).all())
    aware = plan_of(q[:, offset:], k, offset=offset, tau=1.0).to_dense_mask()
    assert bool(aware[:, :, 0].all())
    own = torch.arange(1024 - offset)
    assert bool(aware[:, own, own + offset].all())


def test_a_broken_input_still_gives_a_lawful_plan():
    q, k = generated()
    q[:, -1] = float("nan")
    plan = plan_of(q, k)
    plan.check()
    assert bool(block_mask(plan, 16, 64)[:, :, 0].all())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"gamma": 0}, r"gamma=0 must be a number > 0 and <= 1"),
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"gamma": "0.9"}, "gamma='0.9'"),
        ({"gamma": True}, "gamma=True"),
        ({"tau": -0.1}, "tau=-0.1"),
        ({"block_size": 100}, "block_size=100 must be one of 16, 32, 64, 128"),
        ({"block_size": 128.0}, "block_size=128.0"),
        ({"min_budget": 0}, "min_budget=0"),
        ({"max_budget": 0}, "max_budget=0"),
        ({"max_budget": 1.5}, "max_budget=1.5"),
        ({"variant": "paper"}, "variant='paper' must be one of 'released', 'corrected'"),
        ({"gama": 0.9}, "did you mean 'gamma'"),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        get_method("flexprefill", **params)
