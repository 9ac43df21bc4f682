"""Mean-pool against its authors' answers, and against loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sparse_patch_kernels import block_sparse_attention

from sparse_patch import get_method
from tests.golden.gen_inputs_pbs import load_inputs
from tests.methods import scorer_checks as checks

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("meanpool_*.npz"))
BLOCK = 32


def plan_of(q, k, offset=0, **params):
    method = get_method("mean_pool", **{"block_size": BLOCK, **params})
    return method.plan(q, k, scale=checks.SCALE, q_offset=offset)


def test_all_golden_files_are_here():
    assert len(FILES) == 2


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path, backend):
    config, *arrays = load_inputs(str(path))
    golden, (q, k, v) = np.load(path), map(torch.tensor, arrays)
    block = config["block_size"]
    method = get_method("mean_pool", block_size=block, variant="released")
    assert method.gamma == config["threshold"]
    plan = method.plan(q, k, scale=q.shape[2] ** -0.5, q_offset=0)
    want = torch.tensor(golden["block_mask"])
    keys = want.repeat_interleave(block, 2)[..., : k.shape[1]]
    causal = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
    tokens = keys.repeat_interleave(block, 1)[:, : q.shape[1]] & causal
    assert torch.equal(plan.to_dense_mask(), tokens)
    rows = torch.tensor(golden["out_rows"]).long()
    out = block_sparse_attention(q, k, v, plan, backend=backend)[:, rows]
    torch.testing.assert_close(out, torch.tensor(golden["out"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["corrected", "released"])
@pytest.mark.parametrize("call", checks.CALLS, ids=str)
def test_equals_loops(call, variant):
    q, k, v = checks.inputs(*call)
    _, n, offset = call

    def keeps(head, m):
        rows, group = checks.rows_in(m, n, offset, BLOCK), head * checks.KV_HEADS // checks.HEADS
        mean_q, means = checks.mean(q[head], rows), checks.block_means(k[group], n, BLOCK)
        if variant == "released" and n % BLOCK:
            means[-1] = means[-1] * (n % BLOCK) / BLOCK
            if m == n // BLOCK:
                mean_q = mean_q * len(rows) / BLOCK
        logits = [float(mean_q @ means[j]) * checks.SCALE for j in range(m + 1)]
        chosen = checks.top_p(dict(enumerate(checks.softmax(logits))), 0.9)
        return chosen | checks.forced(m, n, BLOCK, BLOCK, sink=1, local=1)

    plan = plan_of(q, k, offset, variant=variant)
    checks.assert_keeps(plan, keeps, BLOCK, BLOCK)
    checks.assert_lawful(plan, q, k, v)


def test_the_variants_differ_only_at_a_ragged_end():
    q, k, _ = checks.inputs("structured", 490, 0)
    masks = [plan_of(q, k, variant=v).to_dense_mask() for v in ("corrected", "released")]
    end = 490 // BLOCK * BLOCK
    assert torch.equal(masks[0][:, :end], masks[1][:, :end])
    assert not torch.equal(masks[0], masks[1])


def test_forced_blocks_come_on_top_of_the_mass():
    """Mass 1/2 on a middle block is enough for gamma 0.4, and the forced two do not count."""
    q, k = torch.zeros(1, 8 * BLOCK, 4), torch.zeros(1, 8 * BLOCK, 4)
    q[0, -BLOCK:, 0], k[0, 3 * BLOCK : 4 * BLOCK, 0] = 1.0, 2.0 / checks.SCALE
    (run,) = plan_of(q, k, gamma=0.4).runs
    assert run.start[0, -1, : int(run.count[0, -1])].tolist() == [0, 3 * BLOCK, 7 * BLOCK]


@pytest.mark.parametrize(
    "params",
    [
        {"select": "topk", "topk": 3},
        {"select": "threshold"},
        {"select": "per_head_budget"},
        {"select": "held_out"},
        {"select": "global"},
        {"gamma": (0.2, 0.5, 0.7, 0.9), "dense_rows": 40},
        {"rectify": "lse", "gamma": 0.5},
    ],
    ids=str,
)
def test_every_policy_gives_a_lawful_plan(params):
    q, k, v = checks.inputs("structured", 500, 77)
    plan = plan_of(q, k, 77, **params)
    assert plan.density < 1
    checks.assert_lawful(plan, q, k, v)


def test_a_later_chunk_selects_what_the_whole_prompt_selects_there():
    q, k, _ = checks.inputs("structured", 512, 0)
    whole, chunk = plan_of(q, k), plan_of(q[:, 256:], k, 256)
    assert torch.equal(chunk.to_dense_mask(), whole.to_dense_mask()[:, 256:])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"variant": "paper"}, "variant='paper' must be one of 'corrected', 'released'"),
        ({"gamma": 0.0}, r"gamma=0\.0 must be"),
        ({"topk": 3}, "topk=3 does nothing with select='top_p'"),
        ({"block_size": 100}, "block_size=100 must be one of"),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        get_method("mean_pool", **params)
