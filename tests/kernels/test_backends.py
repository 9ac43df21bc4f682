"""Every backend equals the reference, and the reference equals a masked softmax."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_patch_kernels import (
    BackendUnavailable,
    BlockPlan,
    RunList,
    block_sparse_attention,
    choose_backend,
)
from sparse_patch_kernels.cpu import native

from tests.memory import largest_tensor

SHAPES = [
    # heads, kv_heads, q_len, kv_len, dim, v_dim, block_q, block_k
    (4, 2, 130, 130, 16, 16, 32, 32),
    (4, 2, 70, 200, 16, 24, 32, 16),
    (6, 3, 77, 77, 8, 8, 16, 64),
    (4, 1, 33, 100, 80, 40, 64, 64),
    (2, 2, 1, 50, 16, 16, 16, 16),
    (3, 3, 128, 128, 192, 128, 128, 128),
    (4, 2, 100, 100, 16, 16, 16, 16),  # from here on the grids agree: the fused path of the CPU
    (6, 3, 75, 107, 8, 24, 16, 16),
    (2, 1, 30, 62, 24, 8, 32, 32),
]


@pytest.fixture(autouse=True, params=["compiled kernel", "PyTorch"])
def way_of_the_cpu(request, monkeypatch):
    """Both ways through the CPU backend."""
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "_kernel", lambda: None)
    elif native._kernel() is None:
        pytest.skip("no compiler")


def inputs(shape, dtype=torch.float32, seed=0):
    heads, kv_heads, q_len, kv_len, dim, v_dim, _, _ = shape
    torch.manual_seed(seed)
    q, k = torch.randn(heads, q_len, dim), torch.randn(kv_heads, kv_len, dim)
    return q.to(dtype), k.to(dtype), torch.randn(kv_heads, kv_len, v_dim).to(dtype)


def variants(shape, lists=None):
    """A block mask, and what else a plan may hold."""
    heads, kv_heads, q_len, kv_len, _, _, block_q, block_k = shape
    n_q, n_k = -(-q_len // block_q), -(-kv_len // block_k)
    mask = torch.rand(lists or heads, n_q, n_k) < 0.5
    base = BlockPlan.from_block_mask(
        mask, block_q=block_q, block_k=block_k, q_len=q_len, kv_len=kv_len
    )
    order = torch.stack([torch.randperm(kv_len) for _ in range(kv_heads)])
    # Shuffled within each two blocks: later keys stay behind earlier ones, as in PBS.
    segments = torch.stack([
        (torch.arange(kv_len) // (2 * block_k) + torch.rand(kv_len) * 0.9).argsort()
        for _ in range(kv_heads)
    ])  # fmt: skip
    change = dataclasses.replace
    return {
        "blocks": base,
        "diagonal kept": BlockPlan.from_block_mask(
            mask | torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q).triu(n_k - n_q),
            block_q=block_q,
            block_k=block_k,
            q_len=q_len,
            kv_len=kv_len,
        ),
        "blocks+sink+window": change(base, sink=3, window=5),
        "sink": change(base, runs=(), sink=7),
        "window": change(base, runs=(), window=11),
        "nothing": change(base, runs=()),
        "two lists": change(base, runs=(*base.runs, *base.runs)),
        "order": change(base, key_order=order),
        "order+sink+window": change(base, key_order=order, sink=2, window=9),
        "segments": change(base, key_order=segments),
        "segments+window": change(base, key_order=segments, window=9),
        **pooled_variants(base, block_k, order),
        **ranked_variants(base, heads, block_k),
    }


def pooled_variants(base, block_k, order):
    """One pooled list; three levels and a token list; either read through an order."""
    n_k = -(-base.kv_len // block_k)
    first_key = torch.arange(n_k) * block_k
    level = torch.randint(0, 9, (base.heads, base.n_q_blocks, n_k))
    level.masked_fill_(first_key > base.last_rows()[:, None], 8)
    before = first_key + block_k <= base.last_rows()[:, None] + 1 - base.block_q
    pools = [pool for pool in (2, 4, 8) if block_k % pool == 0]
    levels = (RunList.from_mask(level == i, block_k, pool) for i, pool in enumerate(pools, 3))
    (tokens,) = base.runs
    sparse = RunList.from_mask((level == 3) & before, block_k, pools[-1])
    rest = RunList.from_mask(~tokens_mask(tokens, n_k) & before, block_k, block_k)
    change = dataclasses.replace
    plans = {
        "rectified": change(base, runs=(tokens, rest)),
        "pooled alone": change(base, runs=(rest,)),
        "pooled blocks of the past": change(base, runs=(sparse,)),
        "pyramid": change(base, runs=(RunList.from_mask(level < 3, block_k), *levels)),
    }
    ordered = {f"{name}+order": change(plan, key_order=order) for name, plan in plans.items()}
    return {**plans, **ordered}


def tokens_mask(run, n_blocks):
    """bool `[lists, n_q_blocks, n_blocks]`: which blocks of its own width a list names."""
    mask = torch.zeros(run.heads, run.count.shape[1], n_blocks, dtype=torch.bool)
    head, row, slot = run.valid(run.heads).nonzero(as_tuple=True)
    mask[head, row, (run.expand(run.heads)[0][head, row, slot] // run.width).long()] = True
    return mask


def ranked_variants(base, heads, block_k):
    """Lists in any order that heads share, each as far as it likes; unpooled and pooled."""
    n_seen = base.last_rows() // block_k + 1
    ranking = torch.full((1, base.n_q_blocks, int(n_seen[-1])), -1)  # padding that would be refused
    for row, n in enumerate(n_seen.tolist()):
        ranking[0, row, :n] = torch.randperm(n) if heads > 1 else torch.arange(n)
    count = (torch.rand(heads, base.n_q_blocks) * (n_seen + 1)).int()
    runs = RunList((ranking * block_k).int(), count, block_k)
    pooled = dataclasses.replace(runs, pool=2)
    return {
        "ranked": dataclasses.replace(base, runs=(runs,)),
        "ranked+sink+window": dataclasses.replace(base, runs=(runs,), sink=3, window=5),
        "ranked, pooled": dataclasses.replace(base, runs=(pooled,)),
    }


def assert_same(got, want, tolerance):
    (out, lse), (want_out, want_lse) = got, want
    assert out.dtype == want_out.dtype
    assert torch.equal(lse.isinf(), want_lse.isinf())
    finite = ~lse.isinf()
    torch.testing.assert_close(lse[finite], want_lse[finite], atol=tolerance, rtol=0)
    torch.testing.assert_close(out.float(), want_out.float(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("lists", [None, "kv_heads", 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_equals_reference(shape, lists):
    q, k, v = inputs(shape)
    for name, plan in variants(shape, shape[1] if lists == "kv_heads" else lists).items():
        want = block_sparse_attention(q, k, v, plan, backend="reference", return_lse=True)
        got = block_sparse_attention(q, k, v, plan, backend="cpu", return_lse=True)
        assert not torch.isnan(got[0]).any(), name
        assert_same(got, want, 3e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keeping_everything_is_plain_causal_attention(shape, backend):
    q, k, v = inputs(shape)
    heads, kv_heads, q_len, kv_len, dim, *_ = shape
    plan = BlockPlan(q_len, kv_len, shape[6], window=kv_len)
    out, lse = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    group = heads // kv_heads
    scores = q @ k.repeat_interleave(group, 0).mT / dim**0.5
    causal = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    scores = scores.masked_fill(~causal, float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=3e-6, rtol=0)
    want = scores.softmax(-1) @ v.repeat_interleave(group, 0)
    torch.testing.assert_close(out, want, atol=3e-6, rtol=0)


def more_logits(heads):
    """Every use of a soft cap and of sinks; scores here are of magnitude 1."""
    sinks = torch.linspace(-2, 3, heads)
    return [{"softcap": 0.7}, {"sinks": sinks}, {"softcap": 2.0, "sinks": sinks}]


def test_softcap_and_sinks_are_those_of_the_formula():
    shape = SHAPES[1]
    q, k, v = inputs(shape)
    heads, kv_heads, q_len, kv_len, dim, *_ = shape
    plan = variants(shape)["order+sink+window"]
    group = heads // kv_heads
    raw = q @ k.repeat_interleave(group, 0).mT / dim**0.5
    seen = plan.to_dense_mask().repeat_interleave(heads // plan.heads, 0)
    for more in more_logits(heads):
        scores = raw
        if "softcap" in more:
            scores = torch.tanh(raw / more["softcap"]) * more["softcap"]
        scores = scores.masked_fill(~seen, float("-inf"))
        if "sinks" in more:
            scores = torch.cat([scores, more["sinks"][:, None, None].expand(-1, q_len, 1)], 2)
        out, lse = block_sparse_attention(
            q, k, v, plan, backend="reference", return_lse=True, **more
        )
        torch.testing.assert_close(lse, scores.logsumexp(-1), atol=3e-6, rtol=0)
        probs = scores.softmax(-1)[..., :kv_len]
        want = probs @ v.repeat_interleave(group, 0)
        torch.testing.assert_close(out, want, atol=3e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES[::3], ids=str)
def test_cpu_equals_reference_with_softcap_and_sinks(shape):
    q, k, v = inputs(shape)
    for plan in variants(shape).values():
        for more in more_logits(shape[0]):
            want = block_sparse_attention(
                q, k, v, plan, backend="reference", return_lse=True, **more
            )
            got = block_sparse_attention(q, k, v, plan, backend="cpu", return_lse=True, **more)
            assert_same(got, want, 3e-6)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_a_scale_need_not_be_positive(scale):
    """PyTorch's kernel hides keys by -inf, then scales."""
    for shape in (SHAPES[0], SHAPES[6]):
        q, k, v = inputs(shape)
        for name, plan in variants(shape).items():
            want = block_sparse_attention(
                q, k, v, plan, scale=scale, backend="reference", return_lse=True
            )
            got = block_sparse_attention(q, k, v, plan, scale=scale, backend="cpu", return_lse=True)
            assert not got[0].isnan().any(), name
            assert_same(got, want, 3e-6)


def test_a_compiled_graph_holds_the_op_whole():
    q, k, v = inputs(SHAPES[0])
    plans = variants(SHAPES[0])
    for name in ("diagonal kept", "order+sink+window", "rectified"):
        sinks = torch.arange(4.0)

        @torch.compile(fullgraph=True, backend="aot_eager")
        def attend(q, k, v, plan=plans[name], sinks=sinks):
            return block_sparse_attention(q * 2, k, v, plan, sinks=sinks, return_lse=True)

        want = block_sparse_attention(q * 2, k, v, plans[name], sinks=sinks, return_lse=True)
        with torch.no_grad():
            assert_same(attend(q, k, v), want, 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1.6e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_low_precision_accumulates_in_float32(dtype, tolerance, backend):
    shape = SHAPES[0]
    q, k, v = inputs(shape, dtype)
    for plan in variants(shape).values():
        wide = (x.double() for x in (q, k, v))
        want, want_lse = block_sparse_attention(*wide, plan, backend="reference", return_lse=True)
        out, lse = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
        assert out.dtype == dtype
        assert lse.dtype == torch.float32
        # The log-sum-exp never passes through the low precision, so it shows the accumulation.
        torch.testing.assert_close(lse, want_lse.float(), atol=2e-5, rtol=0)
        # The output is rounded once: half a step of its dtype at magnitude up to 4.
        torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=0)


@given(
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    q_len=st.integers(1, 70),
    offset=st.integers(0, 70),
    blocks=st.sampled_from([(8, 8), (16, 32), (32, 4)]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=25, deadline=None)
def test_any_shape_agrees(heads, q_len, offset, blocks, seed):
    shape = (*heads, q_len, q_len + offset, 8, 8, *blocks)
    q, k, v = inputs(shape, seed=seed)
    for plan in variants(shape).values():
        want = block_sparse_attention(q, k, v, plan, backend="reference", return_lse=True)
        assert_same(
            block_sparse_attention(q, k, v, plan, backend="cpu", return_lse=True), want, 3e-6
        )


def test_the_fused_path_is_taken_and_reads_any_layout(monkeypatch):
    def never(*_):
        raise AssertionError("the general path was taken")

    monkeypatch.setattr("sparse_patch_kernels.cpu.forward.attend_any", never)
    for shape in SHAPES[6:]:
        q, k, v = inputs(shape)
        plan = variants(shape)["diagonal kept"]
        want = block_sparse_attention(q, k, v, plan, backend="reference", return_lse=True)
        for layout in (
            lambda x: x,
            lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),  # as Transformers has it
            lambda x: x.mT.contiguous().mT,
        ):
            got = block_sparse_attention(
                *map(layout, (q, k, v)), plan, backend="cpu", return_lse=True
            )
            assert_same(got, want, 3e-6)


def test_tiles_wider_than_the_limit_agree(monkeypatch):
    monkeypatch.setattr("sparse_patch_kernels.cpu.general._MAX_TILE", 500)
    shape = SHAPES[0]
    q, k, v = inputs(shape)
    for plan in variants(shape, lists=1).values():
        want = block_sparse_attention(q, k, v, plan, backend="reference", return_lse=True)
        assert_same(
            block_sparse_attention(q, k, v, plan, backend="cpu", return_lse=True), want, 3e-6
        )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_row_that_sees_no_key_gives_zero(backend):
    q, k, v = inputs((1, 1, 32, 32, 8, 8, 16, 16))
    mask = torch.tensor([[[True, False], [False, True]]])
    plan = BlockPlan.from_block_mask(mask, block_q=16, block_k=16)
    plan = dataclasses.replace(
        plan, runs=(dataclasses.replace(plan.runs[0], count=torch.zeros(1, 2).int()),)
    )
    out, lse = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert bool(lse.isneginf().all())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("shape", "name"), [(SHAPES[0], "blocks+sink+window"), (SHAPES[6], "diagonal kept")]
)
def test_large_logits_stay_finite_and_nan_stays_visible(backend, shape, name):
    q, k, v = inputs(shape)
    plan = variants(shape)[name]
    out = block_sparse_attention(q * 1e4, k, v, plan, backend=backend)
    assert bool(torch.isfinite(out).all())
    q[:, 5] = float("nan")
    out = block_sparse_attention(q, k, v, plan, backend=backend)
    assert bool(out[:, 5].isnan().all())
    assert not bool(out[:, 6:].isnan().any())


def test_cpu_never_builds_a_square():
    """No tensor of q_len x kv_len elements is allocated on the way."""
    n = 2048
    q, k, v = inputs((2, 1, n, n, 8, 8, 64, 64))
    mask = torch.eye(n // 64, dtype=torch.bool)[None].repeat(2, 1, 1)
    plan = BlockPlan.from_block_mask(mask, block_q=64, block_k=64)
    largest = largest_tensor(lambda: block_sparse_attention(q, k, v, plan, backend="cpu"))
    assert 0 < largest <= q.numel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[None], k, v), "without batch axis"),
        (lambda q, k, v: (q[:, :0], k, v), "must not be empty"),
        (lambda q, k, v: (q[:0], k, v), "must not be empty"),
        (lambda q, k, v: (q, k[:, :-1], v), "agree in heads and length"),
        (lambda q, k, v: (q[..., :-1], k, v), "head_dim"),
        (lambda q, k, v: (q[:3], k, v), "multiple of KV heads"),
        (lambda q, k, v: (q.half(), k, v), "one floating dtype"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "one floating dtype"),
        (lambda q, k, v: (q[:, :-40], k, v), "the plan is for"),
        (lambda q, k, v: (q[:2], k, v), "do not divide"),
        (lambda q, k, v: (q.requires_grad_(), k, v), "no backward"),
        (lambda q, k, v: (q, k.to("meta"), v), "one device"),
    ],
)
def test_bad_inputs_are_named(change, message):
    shape = SHAPES[0]
    plan = variants(shape)["blocks"]
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*change(*inputs(shape)), plan)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"softcap": 0.0}, "softcap=0.0 must be above 0"),
        ({"sinks": torch.zeros(3)}, "one logit per query head"),
    ],
)
def test_bad_extra_logits_are_named(more, message):
    plan = variants(SHAPES[0])["blocks"]
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*inputs(SHAPES[0]), plan, **more)


def test_a_named_backend_works_or_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu, cuda, mps = map(torch.device, ("cpu", "cuda", "mps"))
    assert choose_backend("auto", cpu) == choose_backend(None, cpu) == "cpu"
    assert choose_backend("reference", cuda) == "reference"
    with pytest.raises(BackendUnavailable, match="CPU tensors"):
        choose_backend("cpu", cuda)
    monkeypatch.setattr("sparse_patch_kernels.triton_installed", lambda: True)
    assert choose_backend("auto", cuda) == choose_backend("triton", cuda) == "triton"
    with pytest.raises(BackendUnavailable, match="backend='triton' needs tensors on a GPU"):
        choose_backend("triton", cpu)
    with pytest.raises(BackendUnavailable, match="backend='reference'"):
        choose_backend("auto", mps)
    monkeypatch.setattr("sparse_patch_kernels.triton_installed", lambda: False)
    for name in ("auto", "triton"):
        with pytest.raises(BackendUnavailable, match=r"pip install 'sparse-patch\[triton\]'"):
            choose_backend(name, cuda)
    with pytest.raises(ValueError, match="choose one of"):
        choose_backend("cuda", cpu)
