"""The kernel that averages blocks of rows, in Triton's interpreter, against the plain function."""

import pytest
import torch
from sparse_patch_kernels import dispatch
from sparse_patch_kernels.estimators.pooling import plain

from sparse_patch import get_method
from tests.kernels.interpreted import poison_empty, require_interpreter
from tests.kernels.structured import laid_out, scattered, sequence

pooling = require_interpreter("estimators.pooling.kernel")
launch = require_interpreter("triton.launch")


def rows(heads, n, dim):
    return torch.randn(heads, n, dim, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize(
    ("n", "block", "offset", "dim"),
    [(29, 8, 0, 16), (29, 8, 13, 24), (100, 8, 5, 80), (400, 128, 300, 192), (300, 100, 0, 24),
     (200, 500, 7, 80), (40, 1, 3, 16), (5, 16, 30, 24), (1, 64, 0, 16)],
)  # fmt: skip
def test_averages_blocks(n, block, offset, dim, monkeypatch):
    x = rows(3, n, dim)
    want = plain.pool_mean.plain(x, block, offset)
    poison_empty(monkeypatch)
    got = pooling.pool_mean(x, block, offset)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_summed_in_float32(dtype, monkeypatch):
    x = (rows(2, 3000, 16) + 3).to(dtype)
    want = plain.pool_mean.plain(x.float(), 2048, 100)
    poison_empty(monkeypatch)
    torch.testing.assert_close(pooling.pool_mean(x, 2048, 100), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("view", [laid_out, scattered])
def test_views(view, monkeypatch):
    x = rows(3, 90, 24)
    poison_empty(monkeypatch)
    got = pooling.pool_mean(view(x), 32, 7)
    torch.testing.assert_close(got, plain.pool_mean.plain(x, 32, 7), atol=1e-6, rtol=1e-6)


def test_launches_are_recorded_from_shapes_alone():
    x = torch.empty(32, 32768, 128, dtype=torch.bfloat16, device="meta")
    with launch.recording() as launches:
        got = pooling.pool_mean(x, 128, 64)
    assert got.shape == (32, 257, 128)
    assert [one.kernel for one in launches] == [pooling._block_means]
    assert launches[0].grid == (257, 32, 1)


def test_a_method_plans_the_same(monkeypatch):
    method = get_method("mean_pool", block_size=32, gamma=0.8)
    q, k, scale = sequence(4, 2, 260, 300, 32)
    want = method.plan(q, k, scale=scale, q_offset=40).to_dense_mask()
    monkeypatch.setattr(dispatch, "uses_triton", lambda x: True)
    calls = []
    kernel = pooling.pool_mean
    monkeypatch.setattr(pooling, "pool_mean", lambda *a: calls.append(a) or kernel(*a))
    poison_empty(monkeypatch)
    got = method.plan(q, k, scale=scale, q_offset=40).to_dense_mask()
    assert len(calls) == 2
    assert not bool(want.all())
    assert torch.equal(got, want)
