"""The kernels of the probes, in Triton's interpreter, against the plain functions."""

import pytest
import torch
from sparse_patch_kernels import dispatch
from sparse_patch_kernels.estimators.probe import plain

from sparse_patch import get_method
from tests.kernels.interpreted import in_both_types, poison_empty, require_interpreter
from tests.kernels.structured import laid_out, scattered, sequence

probe = require_interpreter("estimators.probe.kernel")
launch = require_interpreter("triton.launch")

# heads, KV heads, probing rows, keys, dim
SHAPES = [
    (4, 2, 16, 300, 16),
    (6, 2, 40, 333, 24),  # rows of several heads in one tile, and cut by tiles
    (3, 1, 5, 520, 96),
    (2, 1, 128, 700, 64),  # two tiles of rows
    (1, 1, 130, 200, 80),  # three, the first of two rows
    (2, 2, 64, 64, 128),  # the whole sequence
    (1, 1, 17, 600, 192),
    (1, 1, 3, 9, 20),
]


def both(name, q, k, scale, monkeypatch):
    """What the kernel gives, and the plain function of the same numbers."""
    want = getattr(plain, name).plain(q.float(), k.float(), scale)
    poison_empty(monkeypatch)
    got = getattr(probe, name)(q, k, scale)
    return (got, want) if name == "probe_lines" else ((got,), (want,))


@pytest.mark.parametrize("name", ["probe_lines", "key_scores"])
@pytest.mark.parametrize(("shape", "dtype"), in_both_types(SHAPES), ids=str)
def test_sums_of_probabilities(name, shape, dtype, monkeypatch):
    got, want = both(name, *sequence(*shape, dtype=dtype), monkeypatch)
    close = {"atol": 1e-7, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 1e-6, "rtol": 1e-4}
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, **close)
        torch.testing.assert_close(ours.sum(-1), torch.ones(shape[0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("view", [laid_out, scattered])
@pytest.mark.parametrize("name", ["probe_lines", "key_scores"])
def test_views(name, view, monkeypatch):
    q, k, scale = sequence(4, 2, 20, 200, 16)
    got, want = both(name, view(q), view(k), scale, monkeypatch)
    torch.testing.assert_close(got, want, atol=1e-7, rtol=2e-5)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_the_wider_type_of_two(dtypes, monkeypatch):
    q, k, scale = sequence(2, 2, 20, 200, 24)
    q, k = (x.to(dtype) for x, dtype in zip((q, k), dtypes, strict=True))
    got, want = both("key_scores", q, k, scale, monkeypatch)
    torch.testing.assert_close(got, want, atol=1e-7, rtol=2e-5)


def test_large_logits_stay_finite(monkeypatch):
    q, k, scale = sequence(2, 1, 16, 300, 16)
    got, want = both("probe_lines", 30 * q, 30 * k, scale, monkeypatch)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


def test_launches_are_recorded_from_shapes_alone():
    q = torch.empty(32, 128, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(8, 32768, 128, dtype=torch.bfloat16, device="meta")
    with launch.recording() as launches:
        vertical, slash = probe.probe_lines(q, k, 0.1)
        scores = probe.key_scores(q, k, 0.1)
    assert vertical.shape == slash.shape == scores.shape == (32, 32768)
    kernels = [probe._row_sums, probe._line_sums] * 2
    assert [one.kernel for one in launches] == kernels
    # Four heads to a KV head: as many tiles of 128 rows, or twice as many of 64.
    assert [one.grid for one in launches] == [(4, 64, 8), (8, 64, 8), (4, 64, 8), (4, 64, 8)]


@pytest.mark.parametrize(
    ("name", "params", "kernel"),
    [
        ("flexprefill", {"block_size": 32, "min_budget": 64, "gamma": 0.7}, "probe_lines"),
        (
            "minference",
            {"pattern": "vertical_and_slash", "vertical": 40, "slash": 60},
            "probe_lines",
        ),
        ("pbs", {"block_size": 32, "segment": 64, "tau": 0.7}, "key_scores"),
        ("pbs", {"block_size": 32, "segment": 64, "tau": 0.7, "share": "group"}, "key_scores"),
    ],
)
def test_a_method_plans_the_same(name, params, kernel, monkeypatch):
    method = get_method(name, **params)
    q, k, scale = sequence(4, 2, 400, 430, 32)
    want = method.plan(q, k, scale=scale, q_offset=30)
    monkeypatch.setattr(dispatch, "uses_triton", lambda x: True)
    calls = []
    run = getattr(probe, kernel)
    monkeypatch.setattr(probe, kernel, lambda *a: calls.append(a) or run(*a))
    poison_empty(monkeypatch)
    got = method.plan(q, k, scale=scale, q_offset=30)
    assert len(calls) == 1
    mask = want.to_dense_mask()
    assert not bool(mask.all())
    assert torch.equal(got.to_dense_mask(), mask)
