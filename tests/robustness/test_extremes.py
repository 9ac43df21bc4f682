"""Numbers and lengths at the edge of what there is, for the op and for every method.

Elsewhere: NaN and infinity in q or k (tests/methods/test_every_method.py, tests/test_patching.py),
rows that see no key (tests/kernels/test_backends.py).
"""

import contextlib
from unittest import mock

import pytest
import torch
from sparse_patch_kernels import BlockPlan, block_sparse_attention
from sparse_patch_kernels.cpu import native

import sparse_patch
from sparse_patch.exact import Exact
from tests.fuzz_cases import Draw, assert_equals_reference, assert_lawful, draw_sequence
from tests.methods.examples import SPARSE

METHODS = sparse_patch.list_methods()
EXTREMES = ["large", "tiny", "constant keys", "zeros", "outliers"]


@pytest.fixture(params=["compiled kernel", "PyTorch"])
def way(request):
    """Both ways through the CPU backend."""
    if request.param == "PyTorch":
        return mock.patch.object(native, "_kernel", return_value=None)
    if native._kernel() is None:
        pytest.skip("no compiler")
    return contextlib.nullcontext()


def plans(q_len, kv_len):
    """One for each way through the backend: on the grid, off it, one list over another."""
    n_q, n_k = -(-q_len // 16), -(-kv_len // 16)
    mask = torch.ones(1, n_q, n_k, dtype=torch.bool).tril(n_k - n_q)
    grid = BlockPlan.from_block_mask(mask, block_q=16, block_k=16, q_len=q_len, kv_len=kv_len)
    return [grid, BlockPlan(q_len, kv_len, 24, window=kv_len), BlockPlan(q_len, kv_len, 7, sink=9)]


# --- the op --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_key_with_a_logit_of_10000_takes_all(way, dtype):
    n = 100
    target = torch.arange(n) // 3  # the key that each row looks for; sink and window hide some
    k = torch.eye(128)[:n][None] * 100
    q, v = k[:, target], torch.randn(1, n, 24)
    for plan in plans(n, n):
        seen = plan.to_dense_mask()[0][torch.arange(n), target]
        with way:
            out = block_sparse_attention(*(x.to(dtype) for x in (q, k, v)), plan, scale=1.0)
        want = v[0, target[seen]].to(dtype)
        torch.testing.assert_close(out[0, seen], want, atol=0, rtol=2 * torch.finfo(dtype).eps)
        assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("kind", ["constant keys", "zeros", "tiny"])
def test_equal_scores_give_the_mean(way, kind):
    q, k = draw_sequence(Draw(0), (4, 2), (60, 60), 16, kind)
    v = torch.randn(2, 60, 24, generator=torch.Generator().manual_seed(0))
    want = v.cumsum(1) / torch.arange(1, 61)[:, None]
    for plan in plans(60, 60)[:2]:
        with way:
            out = block_sparse_attention(q, k, v, plan)
        torch.testing.assert_close(out, want.repeat_interleave(2, 0), atol=2e-6, rtol=0)


@pytest.mark.parametrize("what", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_value_shows_where_it_is_seen(way, what):
    q, k, v = (torch.randn(1, 90, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    v[0, 40, 3] = what
    for plan in plans(90, 90):
        seen = plan.to_dense_mask()[0, :, 40]
        with way:
            out = block_sparse_attention(q, k, v, plan)
        assert not bool(torch.isfinite(out[0, seen, 3]).any())


@pytest.mark.parametrize("q_len", [1, 2, 5])
@pytest.mark.parametrize("offset", [0, 1, 40])
@pytest.mark.parametrize("block", [1, 8, 4096])
def test_blocks_longer_than_the_sequence_and_single_rows(way, q_len, offset, block):
    kv_len = q_len + offset
    q, k, v = (torch.randn(2, n, 8) for n in (q_len, kv_len, kv_len))
    n_q, n_k = -(-q_len // block), -(-kv_len // block)
    keep = torch.ones(2, n_q, n_k, dtype=torch.bool)
    plan = BlockPlan.from_block_mask(keep, block_q=block, block_k=block, q_len=q_len, kv_len=kv_len)
    with way:
        out = block_sparse_attention(q, k, v, plan)
    torch.testing.assert_close(out, Exact().attend(q[None], k[None], v[None])[0], atol=3e-6, rtol=0)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("heads", [2, 4])
def test_rows_that_a_mask_hides_from_everything_are_zero(softcap, heads):
    """As scores of -inf, added; a softmax of those would be NaN."""
    q, k, v = torch.randn(1, heads, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    mask = torch.zeros(1, 1, 20, 20)
    mask[:, :, [0, 7]] = float("-inf")
    out = Exact(softcap=softcap).attend(q, k, v, mask)
    assert not bool(out[:, :, [0, 7]].any())
    assert bool(out[:, :, 1:7].any(-1).all())


# --- methods -------------------------------------------------------------------------------------


def planned(name, params, q, k):
    """Plan, look at it, run it; True where there was a plan."""
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(1)).to(k.dtype)
    offset = k.shape[1] - q.shape[1]
    plan = sparse_patch.get_method(name, **params).plan(q, k, scale=0.25, q_offset=offset)
    if plan is not None:
        assert_lawful(plan, q.shape[1], k.shape[1])
        assert_equals_reference(q, k, v, plan, scale=0.25)
    return plan is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_extreme_numbers(name, kind, dtype):
    for offset in (0, 37):
        q, k = draw_sequence(Draw(1), (4, 2), (150, 150 + offset), 16, kind)
        assert planned(name, SPARSE[name], q.to(dtype), k.to(dtype)) or kind != "large"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_sequences_shorter_than_its_blocks(name):
    for params in ({}, SPARSE[name]):
        for q_len in (1, 2, 3, 15, 16, 17):
            for offset in (0, 1, 40):
                q, k = draw_sequence(Draw(2), (4, 2), (q_len, q_len + offset), 16, "random")
                planned(name, params, q, k)
