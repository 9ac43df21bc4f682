"""The compiled parts of selection on a CPU against the plain functions that they stand in for."""

import shutil
import warnings

import pytest
import torch
from sparse_patch_kernels import dispatch
from sparse_patch_kernels.cpu import building, selection
from sparse_patch_kernels.estimators.chunk_scan import native as chunk_scan
from sparse_patch_kernels.estimators.chunk_scan import scan_chunks
from sparse_patch_kernels.estimators.token_scores import native as token_scores
from sparse_patch_kernels.estimators.token_scores import pooled_rows
from sparse_patch_kernels.estimators.tree_search import native as tree_search
from sparse_patch_kernels.estimators.tree_search import search_leaves

from sparse_patch import get_method
from sparse_patch.methods.hip import Hip
from tests.kernels.structured import laid_out, scattered, sequence
from tests.methods.examples import SPARSE

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, building._COMPILERS)), reason="no C++ compiler on PATH"
)
DTYPES = building.DTYPES
SMALL = {"block_q": 16, "block_k": 4, "mask_k": 32, "sink": 4, "window": 16}
TREES = [
    {},
    {"rep": "first"},
    {"init": "aligned"},
    {"beam_factor": 2},
    {"beam_factor": 100},
    {"row_causal": False},
    {"stride_k": 3},
    {"block_k": 16, "mask_k": 48},
    {"block_q": 96, "stride_q": 1},  # more rows than a panel has lanes
]


def masses(q, k, scale, rows, largest, width):
    """From C++, and from PyTorch."""
    seen = rows + k.shape[1] - q.shape[1] + 1
    call = (q, k, scale, rows, seen)
    got = token_scores.pooled_rows(*call, width=width, largest=largest)
    assert got is not NotImplemented
    return got, pooled_rows.plain(*call, width=width, largest=largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("width", [1, 5, 16, 128])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_len", "kv_len", "dim"),
    [(4, 2, 75, 75, 8), (6, 2, 300, 421, 64), (1, 1, 1, 40, 16), (3, 3, 64, 64, 130)],
)
def test_pooled_rows(heads, kv_heads, q_len, kv_len, dim, width, largest, dtype):
    q, k, scale = sequence(heads, kv_heads, q_len, kv_len, dim, dtype)
    for step in (1, 7):
        rows = torch.arange(0, q_len, step)
        got, want = masses(q, k, scale, rows, largest, width)
        seen = want.isfinite()
        assert torch.equal(got.isfinite(), seen)
        # Logits are of some hundreds: floats of that size lie 3e-5 apart.
        atol, rtol = (1e-4, 0) if largest else (1e-6, 1e-4)
        torch.testing.assert_close(got[seen], want[seen], atol=atol, rtol=rtol)


def test_pooled_rows_of_what_underflows():
    q, k = torch.full((1, 2, 4), 8.0), torch.zeros(1, 64, 4)
    k[:, 16:32], k[:, 40] = -8.0, 8.0  # logits of 0 and +-256
    rows = torch.arange(2)
    for largest in (False, True):
        got, want = masses(q, k, 1.0, rows, largest, 16)
        torch.testing.assert_close(got, want, atol=3e-5 if largest else 1e-6, rtol=1e-6)


def test_a_row_with_a_nan_is_all_nan():
    q, k, scale = sequence(2, 1, 40, 40, 8)
    q[0, 33] = float("nan")
    rows = torch.tensor([3, 33])
    got, want = masses(q, k, scale, rows, False, 16)
    assert bool(got[0, 1].isnan().all())
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("dim", [16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", TREES, ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), [(700, 700), (130, 515), (1, 400)])
def test_search_leaves(change, dtype, q_len, kv_len, dim):
    tree = Hip(**{**SMALL, **change}).tree
    q, k, scale = sequence(4, 2, q_len, kv_len, dim, dtype)
    got = tree_search.search_leaves(q, k, scale, tree)
    want = search_leaves.plain(q, k, scale, tree)
    assert torch.equal(got[1], want[1])
    valid = torch.arange(want[0].shape[2]) < want[1][..., None]
    assert torch.equal(got[0][valid], want[0][valid])
    assert got[0].shape == want[0].shape


def test_search_takes_the_first_of_equal_leaves_and_bears_nan():
    tree = Hip(**SMALL).tree
    for value in (0.0, float("nan")):
        q, k = torch.full((1, 300, 8), value), torch.ones(1, 300, 8)
        got = tree_search.search_leaves(q, k, 1.0, tree)
        assert torch.equal(got[1], search_leaves.plain(q, k, 1.0, tree)[1])
        assert bool((got[0].diff(dim=-1) > 0)[..., : int(got[1].min()) - 1].all())
        if value == 0:
            assert torch.equal(got[0], search_leaves.plain(q, k, 1.0, tree)[0])


@pytest.mark.parametrize("dim", [16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [3, 16, 40])
@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
@pytest.mark.parametrize("shared", [True, False])
def test_scan_chunks(chunk, groups, dtype, shared, dim):
    blocks, n = 5, 40
    q, k, _ = sequence(4, 2, blocks * groups, 700, dim, dtype)
    starts = torch.arange(n).repeat(1 if shared else 4, blocks, 1) * chunk + 3
    starts[..., -2:] = torch.iinfo(torch.int32).max
    end = torch.arange(1, blocks + 1) * 130
    call = (q.unflatten(1, (blocks, groups)), k, starts, end - 60, end, chunk)
    got, want = chunk_scan.scan_chunks(*call), scan_chunks.plain(*call)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_scans_with_averaged_queries_take_keys_in_half_precision():
    q, k, _ = sequence(2, 1, 32, 200, 16)
    call = torch.arange(0, 160, 8).repeat(1, 2, 1), torch.full((2,), 150), torch.full((2,), 190), 8
    queries, keys = q.unflatten(1, (2, 16)), k.bfloat16()
    got, want = (
        chunk_scan.scan_chunks(queries, keys, *call),
        scan_chunks.plain(queries, keys, *call),
    )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dim", [16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_in_memory(dtype, dim):
    q, k, scale = sequence(4, 2, 200, 200, dim, dtype)
    rows, tree = torch.arange(0, 200, 3), Hip(**SMALL).tree
    want, _ = masses(q, k, scale, rows, False, 16)
    torch.testing.assert_close(masses(laid_out(q), laid_out(k), scale, rows, False, 16)[0], want)
    leaves = tree_search.search_leaves(laid_out(q), laid_out(k), scale, tree)
    assert torch.equal(leaves[0], tree_search.search_leaves(q, k, scale, tree)[0])
    # Rows that are not in one piece are PyTorch's.
    assert tree_search.search_leaves(scattered(q), k, scale, tree) is NotImplemented
    assert torch.equal(search_leaves(scattered(q), k, scale, tree)[0], leaves[0])


def test_what_it_cannot_take_is_pytorch_s():
    q, k, scale = sequence(2, 1, 300, 300, 16)
    rows, tree = torch.arange(4), Hip(**SMALL).tree

    def both(q, k, scale, width=16):
        return (
            token_scores.pooled_rows(q, k, scale, rows, rows + 1, width=width),
            tree_search.search_leaves(q, k, scale, tree),
        )

    assert NotImplemented not in both(q, k, scale)
    for dtype in (torch.float16, torch.float64):
        assert both(q.to(dtype), k.to(dtype), scale) == (NotImplemented,) * 2
    assert both(q.bfloat16()[..., :15], k.bfloat16()[..., :15], scale) == (NotImplemented,) * 2
    assert both(q, k, -1.0) == (NotImplemented,) * 2
    assert both(q, k, scale, width=5000)[0] is NotImplemented


def test_threads_change_nothing(monkeypatch):
    q, k, scale = sequence(4, 2, 500, 500, 16)
    rows, tree = torch.arange(0, 500, 2), Hip(**SMALL).tree
    found = []
    for n in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n: n)
        found.append(
            (
                masses(q, k, scale, rows, False, 16)[0],
                *tree_search.search_leaves(q, k, scale, tree),
            )
        )
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


def use_build(monkeypatch, folder, flags):
    """Selection by a library of its own."""
    monkeypatch.setenv("SPARSE_PATCH_CACHE", str(folder))
    monkeypatch.setattr(building, "_FLAGS", (*building._FLAGS, *flags))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library = building.load("selection")
    assert library is not None
    monkeypatch.setattr(selection, "_library", {"selection": library, "lists": None}.get)


@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3"])
def test_builds_for_older_cpus_are_right_too(monkeypatch, tmp_path, cpu):
    """SSE2 and AVX2: other vectors, and bfloat16 widened."""
    if building.platform.machine() != "x86_64":
        pytest.skip("flags of another architecture")
    monkeypatch.setattr(building, "_NATIVE", (f"-march={cpu}",))
    use_build(monkeypatch, tmp_path, ())
    for dtype in DTYPES:
        for largest in (False, True):
            test_pooled_rows(6, 2, 300, 421, 64, 16, largest, dtype)
        for change in TREES:
            test_search_leaves(change, dtype, 130, 515, 16)
        test_scan_chunks(64, 16, dtype, True, 16)
        test_scan_chunks(7, 40, dtype, False, 16)


def test_matrix_units_choose_the_same(monkeypatch, tmp_path):
    """Their twin: bfloat16 only, and dimensions in whole tiles; others are as before."""
    use_build(monkeypatch, tmp_path, ["-DEMULATED_TILES"])
    dtype = torch.bfloat16
    for dim in (32, 64, 130):
        for width, largest in ((1, False), (5, True), (16, False), (128, True)):
            test_pooled_rows(6, 2, 300, 421, dim, width, largest, dtype)
            test_pooled_rows(4, 2, 1, 40, dim, width, largest, dtype)
    test_threads_change_nothing(monkeypatch)
    for dim in (16, 64):
        for change in TREES:
            test_search_leaves(change, dtype, 130, 515, dim)
        for groups in (3, 16, 40):
            test_scan_chunks(7, groups, dtype, False, dim)
        test_any_layout_in_memory(dtype, dim)


@pytest.mark.parametrize("name", sorted(SPARSE))
def test_without_a_compiler_methods_keep_the_same(name, monkeypatch):
    method = get_method(name, **SPARSE[name])
    q, k, scale = sequence(4, 2, 420, 420, 16)
    plan = method.plan(q, k, scale=scale, q_offset=0)
    with monkeypatch.context() as patched:
        patched.setattr(selection, "_library", lambda source: None)
        other = method.plan(q, k, scale=scale, q_offset=0)
    assert torch.equal(plan.to_dense_mask(), other.to_dense_mask())


def test_a_plain_function_stays_at_hand():
    # Under both marks, the one that scripts compare kernels with is the innermost.
    assert search_leaves.plain is dispatch.KERNELS["search_leaves"][1].plain
    q, k, scale = sequence(1, 1, 100, 100, 8)
    want = pooled_rows.plain(q, k, scale, torch.arange(5), torch.arange(5) + 1, width=8)
    got = pooled_rows(q, k, scale, torch.arange(5), torch.arange(5) + 1, width=8)
    torch.testing.assert_close(got, want)
