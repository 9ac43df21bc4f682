"""The kernels that score block pairs by token, in Triton's interpreter, against the plain ones."""

import math

import pytest
import torch
from sparse_patch_kernels import dispatch
from sparse_patch_kernels.estimators.token_scores import plain

from sparse_patch import get_method
from tests.kernels.interpreted import in_both_types, poison_empty, require_interpreter
from tests.kernels.structured import laid_out, scattered, sequence

kernels = require_interpreter("estimators.token_scores.kernel")
launch = require_interpreter("triton.launch")

# heads, KV heads, queries, keys, dim
SHAPES = [
    (4, 2, 75, 75, 16),
    (3, 1, 48, 296, 24),
    (2, 2, 5, 243, 80),
    (2, 1, 50, 187, 128),
    (7, 1, 64, 70, 96),
    (1, 1, 40, 150, 192),
]
SAMPLES = [
    {"block": 16},
    {"block": 16, "stride_q": 16},
    {"block": 16, "stride_q": 4, "stride_k": 8},
    {"block": 16, "stride_q": 32, "stride_k": 16},  # blocks without a multiple, and one key each
    {"block": 16, "stride_q": 5},  # more in one block than in another
    {"block": 64, "block_k": 16, "stride_q": 16},
    {"block": 32, "block_k": 64, "stride_q": 8, "stride_k": 2},
    {"block": 256, "stride_q": 16},
]


def both(name, q, k, scale, monkeypatch, **params):
    """What the kernel gives, and the plain function of the same numbers."""
    want = getattr(plain, name).plain(q.float(), k.float(), scale, **params)
    poison_empty(monkeypatch)
    return getattr(kernels, name)(q, k, scale, **params), want


def tolerance(dtype):
    return {"atol": 5e-5 if dtype == torch.float32 else 2e-4, "rtol": 1e-6}


@pytest.mark.parametrize(
    "shape",
    [SHAPES[0], *(pytest.param(shape, marks=pytest.mark.wide) for shape in SHAPES[1:3])],
    ids=str,
)
@pytest.mark.parametrize("reduce", ["sum", "max", "rms"])
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_every_sample_and_worth(sample, reduce, shape, monkeypatch):
    got, want = both("token_scores", *sequence(*shape), monkeypatch, reduce=reduce, **sample)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, **tolerance(torch.float32))


@pytest.mark.parametrize(("shape", "dtype"), in_both_types(SHAPES), ids=str)
def test_every_dim(shape, dtype, monkeypatch):
    inputs = sequence(*shape, dtype=dtype)
    for params in ({"block": 32, "stride_q": 8}, {"block": 16, "stride_q": 16, "reduce": "max"}):
        with monkeypatch.context() as patch:
            got, want = both("token_scores", *inputs, patch, **params)
        torch.testing.assert_close(got, want, **tolerance(dtype))


ANTIDIAGONALS = [
    *((shape, 16, 4) for shape in SHAPES),
    *((shape, *sizes) for shape in SHAPES[:3] for sizes in ((32, 8), (64, 16), (16, 16))),
]


@pytest.mark.parametrize(("case", "dtype"), in_both_types(ANTIDIAGONALS), ids=str)
def test_antidiagonals(case, dtype, monkeypatch):
    shape, block, stride = case
    inputs = sequence(*shape, dtype=dtype)
    got, want = both("antidiagonal_scores", *inputs, monkeypatch, block=block, stride=stride)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, **tolerance(dtype))


def test_several_chunks_of_keys(monkeypatch):
    inputs = sequence(2, 1, 70, 2300, 16)
    for reduce in ("sum", "max"):
        with monkeypatch.context() as patch:
            got, want = both("token_scores", *inputs, patch, block=64, stride_q=16, reduce=reduce)
        torch.testing.assert_close(got, want, **tolerance(torch.float32))


@pytest.mark.parametrize("elements", [1, 2 * 16 * 8 * 3])
def test_work_goes_in_pieces_of_bounded_size(elements, monkeypatch):
    monkeypatch.setattr(kernels, "_ELEMENTS", elements)  # a query block at a time, or a few
    inputs = sequence(2, 1, 75, 120, 16)
    for name, params in (
        ("token_scores", {"block": 16, "reduce": "max"}),
        ("token_scores", {"block": 16, "stride_q": 2}),
        ("antidiagonal_scores", {"block": 16, "stride": 4}),
    ):
        with monkeypatch.context() as patch:
            got, want = both(name, *inputs, patch, **params)
        torch.testing.assert_close(got, want, **tolerance(torch.float32))


@pytest.mark.parametrize("view", [laid_out, scattered])
def test_views(view, monkeypatch):
    q, k, scale = sequence(4, 2, 75, 90, 16)
    for name, params in (
        ("token_scores", {"block": 16, "stride_k": 2}),
        ("antidiagonal_scores", {"block": 16, "stride": 4}),
    ):
        with monkeypatch.context() as patch:
            got, want = both(name, view(q), view(k), scale, patch, **params)
        torch.testing.assert_close(got, want, **tolerance(torch.float32))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_the_wider_type_of_two(dtypes, monkeypatch):
    q, k, scale = sequence(2, 1, 75, 90, 16)
    q, k = (x.to(dtype) for x, dtype in zip((q, k), dtypes, strict=True))
    got, want = both("antidiagonal_scores", q, k, scale, monkeypatch, block=16, stride=4)
    torch.testing.assert_close(got, want, **tolerance(torch.float32))
    got, want = both("token_scores", q, k, scale, monkeypatch, block=16)
    torch.testing.assert_close(got, want, **tolerance(torch.float32))


@pytest.mark.parametrize(
    ("reduce", "rows"), [("max", 0.0), ("sum", math.log(16)), ("rms", math.log(16) / 2)]
)
def test_nothing_underflows(reduce, rows, monkeypatch):
    """Probabilities of e^-220 are 0 in float32; as logs they still rank."""
    poison_empty(monkeypatch)
    levels = torch.tensor([200.0, -20, -10, 0])
    k = levels.repeat_interleave(16)[None, :, None]
    got = kernels.token_scores(torch.ones(1, 64, 1), k, 1.0, block=16, reduce=reduce)
    width = 0.0 if reduce == "max" else math.log(16)
    want = levels - 200 - math.log(16) + width + rows
    torch.testing.assert_close(got[0, 3, :3], want[:3])


@pytest.mark.parametrize("params", [{"block": 24}, {"block": 512}, {"block": 20, "stride_k": 8}])
def test_other_blocks_are_left_to_the_plain_function(params, monkeypatch):
    q, k, scale = sequence(2, 1, 75, 90, 16)
    assert kernels.token_scores(q, k, scale, **params) is NotImplemented
    want = plain.token_scores.plain(q, k, scale, block=24)
    monkeypatch.setattr(dispatch, "uses_triton", lambda x: True)
    torch.testing.assert_close(plain.token_scores(q, k, scale, block=24), want)
    assert kernels.antidiagonal_scores(q, k, scale, block=24, stride=8) is NotImplemented


def test_launches_are_recorded_from_shapes_alone():
    q = torch.empty(32, 32768, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(8, 32768, 128, dtype=torch.bfloat16, device="meta")
    with launch.recording() as launches:
        scores = [
            kernels.token_scores(q, k, 0.1, block=128, stride_q=16),
            kernels.antidiagonal_scores(q, k, 0.1, block=128, stride=8),
        ]
    assert [x.shape for x in scores] == [(32, 256, 256)] * 2
    parts = [kernels._token_parts, kernels._group_parts]
    assert [one.kernel for one in launches[::2]] == parts
    assert [one.kernel for one in launches[1::2]] == [kernels._block_scores] * 2
    # 8 rows a block and head of 4: 8192 rows in tiles of 128; 16 groups a block: 16384.
    assert [one.grid for one in launches[::2]] == [(32, 64, 8), (16, 128, 8)]


@pytest.mark.parametrize(
    ("name", "params", "kernel"),
    [
        ("proxyattn", {"min_budget": 32, "stride_q": 8}, "token_scores"),
        ("strided", {"gamma": 0.8, "weigh": "rms"}, "token_scores"),
        ("strided", {"gamma": 0.8, "rank": "group", "key_block": 8}, "token_scores"),
        ("psa", {"thresholds": (0.3, 0.5, 0.6, 0.8)}, "token_scores"),
        ("xattention", {"gamma": 0.7}, "antidiagonal_scores"),
    ],
)
def test_a_method_plans_the_same(name, params, kernel, monkeypatch):
    method = get_method(name, block_size=32, **params)
    q, k, scale = sequence(4, 2, 400, 430, 32)
    want = method.plan(q, k, scale=scale, q_offset=30)
    monkeypatch.setattr(dispatch, "uses_triton", lambda x: True)
    calls = []
    run = getattr(kernels, kernel)
    monkeypatch.setattr(kernels, kernel, lambda *a, **b: calls.append(a) or run(*a, **b))
    poison_empty(monkeypatch)
    got = method.plan(q, k, scale=scale, q_offset=30)
    assert calls
    mask = want.to_dense_mask()
    assert not bool(mask.all())
    assert torch.equal(got.to_dense_mask(), mask)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_rows_of_a_list_give_each_block_what_they_give(shape, monkeypatch):
    heads, _, q_len, kv_len, _ = shape
    q, k, scale = sequence(*shape)
    rows = torch.arange(q_len)[1::3]
    seen = rows + kv_len - q_len + 1
    want = plain.pooled_rows.plain(q, k, scale, rows, seen, width=16)
    poison_empty(monkeypatch)
    got = kernels.pooled_rows(q, k, scale, rows, seen, width=16)
    assert got.shape == (heads, len(rows), -(-kv_len // 16))
    torch.testing.assert_close(got[..., : want.shape[2]], want, atol=1e-5, rtol=1e-5)
    assert not got[..., want.shape[2] :].any()


def test_what_the_kernel_of_listed_rows_does_not_do():
    q, k, scale = sequence(*SHAPES[0])
    rows = torch.arange(3)
    call = q, k, scale, rows, rows + 1
    assert kernels.pooled_rows(*call, width=16, largest=True) is NotImplemented
    assert kernels.pooled_rows(*call, width=24) is NotImplemented
