"""Our exact attention against the formula, for everything a model may ask of it."""

import dataclasses

import pytest
import torch

from sparse_patch.exact import Exact
from tests.memory import largest_tensor

B, H, KV, D, DV = 2, 4, 2, 16, 12


def inputs(q_len, kv_len, dtype=torch.float32):
    torch.manual_seed(0)
    q = torch.randn(B, H, q_len, D, dtype=dtype)
    return (
        q,
        torch.randn(B, KV, kv_len, D, dtype=dtype),
        torch.randn(B, KV, kv_len, DV, dtype=dtype),
    )


def formula(q, k, v, exact: Exact, mask=None, first=None):
    """One dense softmax in float64."""
    q, k, v = q.double(), *(x.double().repeat_interleave(H // KV, 1) for x in (k, v))
    q_len, kv_len = q.shape[2], k.shape[2]
    scores = q @ k.mT * (D**-0.5 if exact.scale is None else exact.scale)
    if exact.softcap is not None:
        scores = exact.softcap * torch.tanh(scores / exact.softcap)
    if exact.bias is not None:
        scores = scores + exact.bias
    if mask is None:
        row, key = torch.arange(q_len)[:, None] + kv_len - q_len, torch.arange(kv_len)
        mask = torch.ones(q_len, kv_len, dtype=torch.bool)
        if exact.causal:
            mask = mask & (key <= row)
        if first is not None:
            mask = mask & (key >= first[:, None])
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    top = scores.amax(-1, keepdim=True).clamp(min=-1e30)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    if exact.sinks is not None:
        sinks = exact.sinks if exact.sinks.ndim > 1 else exact.sinks.view(1, -1, 1)
        total = total + (sinks.double()[..., None] - top).exp()
    return (weights / total.clamp(min=1e-300)) @ v


SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0])
CASES = [
    Exact(),
    Exact(scale=0.7),
    Exact(causal=False),
    Exact(softcap=2.0),
    Exact(sinks=SINKS),
    Exact(softcap=2.0, sinks=SINKS, scale=0.5),
    Exact(bias=torch.randn(1, H, 40, 40, generator=torch.Generator().manual_seed(1))),
    Exact(sinks=torch.randn(B, H, 40, generator=torch.Generator().manual_seed(3))),
]


@pytest.mark.parametrize("q_len", [1, 23, 40])
@pytest.mark.parametrize("exact", CASES, ids=lambda e: str(e)[:60])
@pytest.mark.parametrize("chunked", [False, True])
def test_equals_the_formula(exact, q_len, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr("sparse_patch.exact._CHUNK_ELEMENTS", 7 * 40 * B * H)
    exact, (q, k, v) = cut(exact, q_len), inputs(q_len, 40)
    want = formula(q, k, v, exact).float()
    torch.testing.assert_close(exact.attend(q, k, v), want, atol=2e-6, rtol=0)


def cut(exact, q_len):
    """What is by query, for the first `q_len` of them."""
    bias, sinks = exact.bias, exact.sinks
    if bias is not None:
        bias = bias[:, :, :q_len]
    if sinks is not None and sinks.ndim > 1:
        sinks = sinks[:, :, :q_len]
    return dataclasses.replace(exact, bias=bias, sinks=sinks)


FIRST = {
    "a window": lambda row: (row - 4).clamp(min=0),
    "a window of one": lambda row: row,
    "a window that hides nothing": lambda row: row * 0,
    "chunks": lambda row: row // 7 * 7,
    "packed": lambda row: torch.where(row < 23, row * 0 + 3, row * 0 + 23).minimum(row),
}


@pytest.mark.parametrize("q_len", [1, 23, 40])
@pytest.mark.parametrize("kind", FIRST)
@pytest.mark.parametrize("exact", [e for e in CASES if e.causal], ids=lambda e: str(e)[:60])
def test_a_first_key_hides_those_before_it(exact, kind, q_len, monkeypatch):
    monkeypatch.setattr("sparse_patch.exact._LEAST_ROWS", 3)
    first = FIRST[kind](torch.arange(40 - q_len, 40))
    exact, (q, k, v) = cut(exact, q_len), inputs(q_len, 40)
    want = formula(q, k, v, exact, first=first).float()
    torch.testing.assert_close(exact.attend(q, k, v, first=first), want, atol=2e-6, rtol=0)


def test_a_window_takes_memory_by_its_width():
    n, window = 1 << 14, 64
    q, k, v = (torch.randn(1, 1, n, 8) for _ in range(3))
    first = (torch.arange(n) - window + 1).clamp(min=0)
    for exact in (Exact(), Exact(softcap=5.0)):
        assert largest_tensor(lambda e=exact: e.attend(q, k, v, first=first)) <= n * 8


@pytest.mark.parametrize("exact", [Exact(), Exact(softcap=2.0), Exact(sinks=SINKS)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_replaces_causality(exact, kind):
    q, k, v = inputs(23, 40)
    mask = torch.rand(B, 1, 23, 48, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, :, 3] = False  # a row that sees nothing
    if kind == "float":
        mask[:, :, 3, 0] = True
        mask = torch.where(mask, torch.randn(mask.shape), float("-inf"))
    got = exact.attend(q, k, v, mask)  # the mask of a static cache may be longer than the keys
    want = formula(q, k, v, exact, mask[..., :40]).float()
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


def test_low_precision_runs_explicit_softmax_in_float32():
    q, k, v = inputs(23, 40, torch.bfloat16)
    exact = Exact(softcap=5.0, sinks=SINKS)
    got = exact.attend(q, k, v)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), formula(q, k, v, exact), atol=1e-2, rtol=0)


@pytest.mark.parametrize("exact", CASES[:6], ids=lambda e: str(e)[:60])
def test_gradients_flow(exact):
    q, k, v = (x.double().requires_grad_() for x in inputs(6, 9))
    weights = torch.randn(B, H, 6, DV).double()
    got = torch.autograd.grad((exact.attend(q, k, v) * weights).sum(), (q, k, v))
    want = torch.autograd.grad((formula(q, k, v, exact) * weights).sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_dropout_drops_and_rescales():
    torch.manual_seed(0)
    q, k, v = inputs(23, 40)
    ones = torch.ones_like(v)
    out = Exact(softcap=5.0, dropout=0.5).attend(q, k, ones)
    assert out.std() > 0.05
    assert abs(float(out.mean()) - 1) < 0.1


def test_more_causal_queries_than_keys_is_an_error():
    q, k, v = inputs(23, 10)
    with pytest.raises(ValueError, match="23 queries over 10 keys"):
        Exact().attend(q, k, v)
