"""MoBA's gate against its authors' reference, and against loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sparse_patch_kernels import block_sparse_attention

from sparse_patch import get_method
from tests.golden.gen_inputs_pbs import load_inputs
from tests.methods import scorer_checks as checks

GOLDEN = Path(__file__).parents[1] / "golden"
CHUNK, TOPK, BLOCK = 48, 3, 32


def plan_of(q, k, offset=0, **params):
    params = {"chunk_size": CHUNK, "topk": TOPK, **params}
    if params.get("gate") != "token":
        params["block_size"] = BLOCK
    return get_method("moba", **params).plan(q, k, scale=checks.SCALE, q_offset=offset)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_golden(backend):
    path = GOLDEN / "moba_s1024_c64_k4_h2x1_d64.npz"
    config, *arrays = load_inputs(str(path))
    golden, (q, k, v) = np.load(path), map(torch.tensor, arrays)
    chunk, n = config["chunk"], config["seqlen"]
    method = get_method("moba", chunk_size=chunk, topk=config["topk"], gate="token")
    plan = method.plan(q, k, scale=q.shape[2] ** -0.5, q_offset=0)
    gate = torch.tensor(golden["token_gate"]).repeat_interleave(chunk, 2)
    assert torch.equal(plan.to_dense_mask(), gate & torch.ones(n, n, dtype=torch.bool).tril())
    rows = torch.tensor(golden["out_rows"]).long()
    out = block_sparse_attention(q, k, v, plan, backend=backend)[:, rows]
    torch.testing.assert_close(out, torch.tensor(golden["out"]), atol=1e-5, rtol=0)


def gate(q, k, n, head, position, offset):
    """Chunks that one query picks."""
    keys = k[head * checks.KV_HEADS // checks.HEADS]
    own = position // CHUNK
    means = checks.block_means(keys, n, CHUNK)
    query = q[head, position - offset].double()
    return checks.best({c: float(query @ means[c]) for c in range(own)}, TOPK - 1) | {own}


@pytest.mark.parametrize("call", checks.CALLS[1::2], ids=str)
def test_both_gates_equal_loops(call):
    q, k, v = checks.inputs(*call)
    n = k.shape[1]
    q, offset = q[:, -90:], n - 90  # the loops are slow: the last rows will do
    tokens = plan_of(q, k, offset, gate="token")
    want = torch.zeros(checks.HEADS, 90, -(-n // CHUNK), dtype=torch.bool)
    for head in range(checks.HEADS):
        for row in range(90):
            for chunk in gate(q, k, n, head, row + offset, offset):
                want[head, row, chunk] = True
    assert tokens.block_q == 1
    assert torch.equal(checks.listed(tokens, want.shape[2], CHUNK), want)
    checks.assert_lawful(tokens, q, k, v)
    blocks = plan_of(q, k, offset, gate="block")
    union = torch.stack([part.any(1) for part in want.split(BLOCK, 1)], 1)
    assert blocks.block_q == BLOCK
    assert torch.equal(checks.listed(blocks, want.shape[2], CHUNK), union)
    checks.assert_lawful(blocks, q, k, v)


def test_a_query_keeps_topk_chunks_its_own_included():
    q, k, _ = checks.inputs("noise", 500, 0)
    (run,) = plan_of(q, k, gate="token").runs
    own = torch.arange(500) // CHUNK
    assert torch.equal(run.count.long(), (own + 1).clamp(max=TOPK).expand(4, -1))
    last = run.start.gather(2, run.count.long()[..., None] - 1)[..., 0]
    assert torch.equal(last.long(), (own * CHUNK).expand(4, -1))


def test_equal_chunks_are_taken_from_the_first_on():
    q, k = torch.zeros(4, 500, 8), torch.zeros(2, 500, 8)
    (run,) = plan_of(q, k, gate="token").runs
    assert run.start[0, -1].tolist() == [0, CHUNK, 10 * CHUNK]


def test_the_future_has_no_say():
    """Unlike methods that pool queries: a gate per token selects the same in any chunk."""
    q, k, _ = checks.inputs("structured", 500, 0)
    whole = plan_of(q, k, gate="token").to_dense_mask()
    first = plan_of(q[:, :300], k[:, :300], gate="token").to_dense_mask()
    later = plan_of(q[:, 300:], k, 300, gate="token").to_dense_mask()
    assert torch.equal(first, whole[:, :300, :300])
    assert torch.equal(later, whole[:, 300:])


@pytest.mark.parametrize("gate", ["token", "block"])
def test_works_in_tiles_of_rows(gate, monkeypatch):
    q, k, _ = checks.inputs("structured", 500, 77)
    whole = plan_of(q, k, 77, gate=gate)
    monkeypatch.setattr("sparse_patch.methods.moba.TILE_ELEMENTS", 1)
    tiled = plan_of(q, k, 77, gate=gate)
    assert torch.equal(tiled.runs[0].count, whole.runs[0].count)
    valid = whole.runs[0].valid(4)
    assert torch.equal(tiled.runs[0].start[valid], whole.runs[0].start[valid])


def test_exact_where_every_chunk_would_be_kept():
    q, k, _ = checks.inputs("noise", CHUNK * TOPK + 1, 0)
    assert plan_of(q, k) is not None
    assert plan_of(q[:, 1:], k[:, 1:]) is None


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"gate": "row"}, "gate='row' must be one of 'token', 'block'"),
        ({"topk": 0}, "topk=0 must be a whole number >= 1"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": 64, "gate": "token"}, "block_size=64 does nothing with gate='token'"),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        get_method("moba", **params)
