"""What must hold of any method, whatever it chooses."""

import pytest
import torch
from bench.peak import peak_is_known, resident_bytes, with_peak
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_patch_kernels import block_sparse_attention

from sparse_patch import get_method, list_methods
from tests.methods.examples import KEEP_ALL, LONG, SPARSE

METHODS = list_methods()
DIM = 16

shapes = st.fixed_dictionaries(
    {
        "heads": st.sampled_from([(2, 2), (4, 2), (3, 1)]),
        "q_len": st.integers(40, 260),
        "offset": st.sampled_from([0, 0, 16, 37, 200]),
        "seed": st.integers(0, 10_000),
    }
)


def sequence(heads, q_len, offset, seed):
    """q and k with a sink, a drift that makes neighbours alike, and noise."""
    generator = torch.Generator().manual_seed(seed)
    n_heads, kv_heads = heads

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    kv_len = q_len + offset
    drift = draw(1, kv_len, DIM).cumsum(1) / kv_len**0.5
    k = draw(kv_heads, kv_len, DIM) + 3 * drift
    k[:, 0] *= 3
    q = draw(n_heads, q_len, DIM) + 3 * drift[:, offset:] + k[:, :1].mean(0)
    return q, k


def sparse_method(name):
    return get_method(name, **SPARSE[name])


def plan_of(name, q, k):
    return sparse_method(name).plan(q, k, scale=DIM**-0.5, q_offset=k.shape[1] - q.shape[1])


def token_mask(plan, q, k):
    """bool `[heads, q_len, kv_len]`; exact where there is no plan."""
    q_len, kv_len = q.shape[1], k.shape[1]
    if plan is None:
        causal = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
        return causal.expand(q.shape[0], -1, -1)
    return plan.to_dense_mask(q_len, kv_len).repeat_interleave(q.shape[0] // plan.heads, 0)


def same_plan(one, other):
    """Equal in every list, not only in what the rows see."""
    if one is None or other is None:
        return one is other
    alike = (one.sink, one.window, one.block_q) == (other.sink, other.window, other.block_q)
    return alike and all(
        torch.equal(a.start, b.start) and torch.equal(a.count, b.count)
        for a, b in zip(one.runs, other.runs, strict=True)
    )


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


def test_every_method_has_its_examples():
    assert sorted(SPARSE) == sorted(KEEP_ALL) == METHODS


@given(shape=shapes)
@settings(max_examples=12, deadline=None)
@pytest.mark.parametrize("name", METHODS)
def test_a_plan_is_lawful_and_every_row_sees_itself(name, shape):
    q, k = sequence(**shape)
    plan = plan_of(name, q, k)
    if plan is not None:
        plan.check()
        assert (plan.q_len, plan.kv_len) == (q.shape[1], k.shape[1])
        assert 0 < plan.density <= 1
    mask = token_mask(plan, q, k)
    row = torch.arange(q.shape[1])
    assert bool(mask[:, row, row + shape["offset"]].all())
    future = torch.ones(mask.shape[1:], dtype=torch.bool).triu(1 + shape["offset"])
    assert not bool((mask & future).any())


@given(shape=shapes)
@settings(max_examples=6, deadline=None)
@pytest.mark.parametrize("name", METHODS)
def test_the_op_runs_the_plan(name, shape):
    q, k = sequence(**shape)
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(0))
    plan = plan_of(name, q, k)
    if plan is not None:
        # In float64: logits reach 100 here, and float32 is then off by more than 1e-5 itself.
        wide = [x.double() for x in (q, k, v)]
        want = block_sparse_attention(*wide, plan, backend="reference")
        got = block_sparse_attention(*wide, plan, backend="cpu")
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)


@given(shape=shapes)
@settings(max_examples=6, deadline=None)
@pytest.mark.parametrize("name", METHODS)
def test_the_same_input_gives_the_same_plan(name, shape):
    q, k = sequence(**shape)
    assert same_plan(plan_of(name, q, k), plan_of(name, q.clone(), k.clone()))


@given(shape=shapes)
@settings(max_examples=6, deadline=None)
@pytest.mark.parametrize("name", METHODS)
def test_memory_layout_does_not_matter(name, shape):
    """Transformers hands over tensors laid out [seq, heads, dim]."""
    q, k = sequence(**shape)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k)]
    assert same_plan(plan_of(name, q, k), plan_of(name, *strided))


@given(seed=st.integers(0, 10_000), q_len=st.integers(100, 260))
@settings(max_examples=6, deadline=None)
@pytest.mark.parametrize("name", METHODS)
def test_swapping_kv_groups_swaps_the_plan(name, seed, q_len):
    # Two groups of one head: a mean over heads is then the same number in either order.
    q, k = sequence((2, 2), q_len, 0, seed)
    mask = token_mask(plan_of(name, q, k), q, k)
    swapped = token_mask(plan_of(name, q.flip(0), k.flip(0)), q, k)
    assert torch.equal(swapped.flip(0), mask)


@given(seed=st.integers(0, 10_000), q_len=st.integers(100, 260), offset=st.sampled_from([0, 37]))
@settings(max_examples=6, deadline=None)
@pytest.mark.parametrize("name", METHODS)
def test_grouped_heads_choose_as_if_their_keys_were_repeated(name, seed, q_len, offset):
    q, k = sequence((4, 2), q_len, offset, seed)
    # One proxy per KV head is the default: the number has to be said once there are more of them.
    params = SPARSE[name] | ({"n_proxy": 2} if name == "proxyattn" else {})
    method = get_method(name, **params)
    grouped, repeated = (
        method.plan(q, keys, scale=DIM**-0.5, q_offset=offset)
        for keys in (k, k.repeat_interleave(2, 0))
    )
    assert torch.equal(token_mask(grouped, q, k), token_mask(repeated, q, k))


@given(shape=shapes)
@settings(max_examples=6, deadline=None)
@pytest.mark.parametrize("name", METHODS)
def test_asking_for_everything_is_exact_attention(name, shape):
    q, k = sequence(**shape)
    method = get_method(name, **KEEP_ALL[name])
    plan = method.plan(q, k, scale=DIM**-0.5, q_offset=shape["offset"])
    assert torch.equal(token_mask(plan, q, k), token_mask(None, q, k))


@pytest.mark.parametrize("what", [float("nan"), float("inf"), float("-inf")])
def test_broken_numbers_never_lead_out_of_range(name, what):
    """On a GPU nobody looks at q and k before a method does, and nobody at its plan."""
    for place in (0, slice(None)):
        for broken in (0, 1):
            q, k = sequence((4, 2), 263, 37, 1)
            (q, k)[broken][:, -1 if place == 0 else place, place] = what
            plan = plan_of(name, q, k)
            if plan is not None:
                plan.check()
                assert 0 <= float(plan.head_density().min()) <= 1


def test_sparse_examples_drop_something(name):
    q, k = sequence((4, 2), 256, 0, 1)
    plan = plan_of(name, q, k)
    assert plan is not None
    assert name == "dense" or plan.density < 0.95


NEEDS_GLIBC = pytest.mark.skipif(
    not peak_is_known(torch.device("cpu")), reason="reads Linux's /proc and calls glibc"
)


def peak_growth(work):
    """Bytes by which the resident memory of this process grew at most while `work()` ran."""
    before, peak = with_peak(lambda: (resident_bytes(), work())[0], torch.device("cpu"))
    return peak - before


@NEEDS_GLIBC
def test_selecting_never_needs_a_matrix_of_all_queries_and_keys(name):
    n = 16_384
    q, k = sequence((2, 1), n, 0, 0)
    method = get_method(name, **LONG.get(name, {}))
    assert peak_growth(lambda: method.plan(q, k, scale=DIM**-0.5, q_offset=0)) < n * n


@NEEDS_GLIBC
def test_the_memory_test_would_see_one():
    n = 8192
    assert peak_growth(lambda: torch.ones(n, n, dtype=torch.bool)) > 0.9 * n * n
