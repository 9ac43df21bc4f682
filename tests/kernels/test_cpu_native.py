"""The compiled kernel of the CPU backend: how it is built, and that every build is right."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from sparse_patch_kernels import BlockPlan, RunList, block_sparse_attention
from sparse_patch_kernels.cpu import building, native

from tests.kernels.test_backends import SHAPES, assert_same, inputs, variants

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, building._COMPILERS)), reason="no C++ compiler on PATH"
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache folder of its own, and nothing loaded."""
    monkeypatch.setenv("SPARSE_PATCH_CACHE", str(tmp_path))
    for cached in (native._library, native._kernel):
        cached.cache_clear()
    yield tmp_path / "kernels"
    for cached in (native._library, native._kernel):
        cached.cache_clear()


@pytest.fixture
def unoptimized(monkeypatch):
    """For tests of when a library is built, and by whom: a third of the time to compile."""
    monkeypatch.setattr(building, "_FLAGS", (*building._FLAGS, "-O0"))


def attend(dtype=torch.float32):
    shape = SHAPES[1]
    q, k, v = inputs(shape, dtype)
    plan = variants(shape)["order+sink+window"]
    return native.attend(q, k, v, plan, 0.3)


# q_len, kv_len, block, width of a run, where runs begin: whole slices of 16 keys that many tasks
# read, which are packed once; an odd number of them in a tile; and what only looks like it.
SLICED = {
    "whole slices": (256, 256, 64, 64, 0),
    "single slices": (256, 256, 64, 16, 0),
    "a last one cut": (250, 250, 64, 16, 0),
    "a later chunk": (96, 256, 32, 16, 0),
    "a chunk off the grid": (100, 256, 32, 16, 0),
    "a block off the grid": (250, 250, 40, 16, 0),
    "runs off the grid": (256, 256, 64, 16, 8),
}


def sliced(name, heads=4):
    q_len, kv_len, block, width, begin = SLICED[name]
    first_row = torch.arange(0, q_len, block) + kv_len - q_len
    last_row = (first_row + block - 1).clamp(max=kv_len - 1)
    starts = torch.arange(begin, kv_len, width)
    dice = torch.Generator().manual_seed(len(name))
    mask = torch.rand(heads, len(first_row), len(starts), generator=dice) < 0.7
    mask &= starts <= last_row[:, None]
    mask[:, :, 0] = True  # so that with runs off the grid there are rows that see nothing
    count = mask.sum(-1)
    order = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    runs = RunList(starts[order].to(torch.int32), count.to(torch.int32), width)
    return BlockPlan(q_len, kv_len, block, (runs,))


def check_sliced():
    for name, (q_len, kv_len, *_) in SLICED.items():
        plan = sliced(name)
        for dtype, tolerance in ((torch.float32, 5e-6), (torch.bfloat16, 2e-2)):
            dice = torch.Generator().manual_seed(7)
            q, k, v = (
                torch.randn(n, length, 24, generator=dice).to(dtype)
                for n, length in ((4, q_len), (2, kv_len), (2, kv_len))
            )
            got = native.attend(q, k, v, plan, 0.3)
            want = block_sparse_attention(
                *(x.float() for x in (q, k, v)),
                plan, scale=0.3, backend="reference", return_lse=True,
            )  # fmt: skip
            assert_same((got[0].float(), got[1]), want, tolerance)


def check_all_variants():
    for shape in SHAPES:
        for name, plan in variants(shape).items():
            if any(run.pool > 1 for run in plan.runs):
                continue
            for softcap in (None, 0.7):
                for dtype, tolerance in ((torch.float32, 5e-6), (torch.bfloat16, 2e-2)):
                    q, k, v = inputs(shape, dtype)
                    scale = shape[4] ** -0.5
                    got = native.attend(q, k, v, plan, scale, softcap)
                    want = block_sparse_attention(
                        *(x.float() for x in (q, k, v)),
                        plan,
                        scale=scale,
                        softcap=softcap,
                        backend="reference",
                        return_lse=True,
                    )
                    assert got[0].dtype == dtype, name
                    assert_same((got[0].float(), got[1]), want, tolerance)


TILES = "-DEMULATED_TILES"  # the twin of matrix units


@needs_compiler
@pytest.mark.parametrize("flags", ["x86-64", "x86-64-v3", "native", f"native {TILES}"])
def test_builds_for_other_cpus_are_right_too(fresh, monkeypatch, flags):
    """SSE2, AVX2, whatever is here, and a twin of matrix units."""
    cpu, *others = flags.split()
    if cpu != "native" and building.platform.machine() != "x86_64":
        pytest.skip("flags of another architecture")
    monkeypatch.setattr(building, "_FLAGS", (*building._FLAGS, *others))
    monkeypatch.setattr(building, "_NATIVE", (f"-march={cpu}",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native._kernel() is not None
    assert (native.products() == "emulated tiles") == (TILES in others)
    check_all_variants()
    check_sliced()


@needs_compiler
@pytest.mark.parametrize("source", ["attention", "selection"])
def test_a_build_for_a_cpu_with_matrix_units_uses_them(source, tmp_path):
    if building.platform.machine() != "x86_64":
        pytest.skip("flags of another architecture")
    compiler = next(filter(None, map(shutil.which, building._COMPILERS)))
    flags = [flag for flag in building._FLAGS if flag not in ("-fPIC", "-shared")]
    assembly = tmp_path / "assembly.s"
    code = building.SOURCES / f"{source}.cpp"
    call = [compiler, *flags, "-march=sapphirerapids", "-S", "-o", assembly, code]
    subprocess.run(call, check=True)
    lines = assembly.read_text()
    for instruction in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert instruction in lines


@needs_compiler
@pytest.mark.parametrize("tiles", ["", TILES], ids=["vectors", "tiles"])
def test_nothing_is_read_that_was_not_written(fresh, monkeypatch, tiles):
    flags = (*building._FLAGS, "-DPOISON", *tiles.split())
    monkeypatch.setattr(building, "_FLAGS", flags)
    check_all_variants()
    check_sliced()


@needs_compiler
def test_it_is_compiled_once(fresh, unoptimized, monkeypatch):
    want = attend()
    (library,) = fresh.glob("attention-*.so")
    native._library.cache_clear()
    native._kernel.cache_clear()
    monkeypatch.setattr(building, "_compile", lambda *_: pytest.fail("compiled again"))
    assert building.build("attention") == library
    assert_same(attend(), want, 0)


@needs_compiler
def test_other_source_flags_or_compiler_make_another_library(
    fresh, unoptimized, monkeypatch, tmp_path
):
    names = {building.build("attention").name}
    monkeypatch.setattr(building, "_FLAGS", (*building._FLAGS, "-DNDEBUG"))
    names.add(building.build("attention").name)
    for changed in ("attention.cpp", "common.h", "tiles.h"):
        copy = shutil.copytree(building.SOURCES, tmp_path / changed)
        with (copy / changed).open("a") as source:
            source.write("\n// changed\n")
        monkeypatch.setattr(building, "SOURCES", copy)
        names.add(building.build("attention").name)
    assert len(names) == 5


@needs_compiler
@pytest.mark.skipif(os.name == "nt", reason="the compiler here is a shell script")
def test_processes_that_compile_at_the_same_time_do_it_once(fresh, tmp_path):
    """And say so on standard error; later ones find all they need."""
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    real = next(filter(None, map(shutil.which, building._COMPILERS)))
    compiler.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\nexec "{real}" "$@" -O0\n')
    compiler.chmod(0o700)
    code = "from sparse_patch_kernels.cpu import building as b; b.prepare(); print(b.load('lists'))"
    path = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CXX": str(compiler)}

    def start():
        call, pipe = [sys.executable, "-c", code], subprocess.PIPE
        return subprocess.Popen(call, stdout=pipe, stderr=pipe, text=True, env=environment)

    def compiled():
        return [line for line in log.read_text().splitlines() if "--version" not in line]

    both = [process.communicate() for process in (start(), start())]
    assert all("CDLL" in out for out, _ in both)
    assert "".join(error for _, error in both).count("compiling") == len(building.NAMES)
    assert len(compiled()) == len(building.NAMES) == len(list(fresh.glob("*.so")))
    _, error = start().communicate()
    assert not error
    assert len(compiled()) == len(building.NAMES)


def is_root():
    return os.getuid() == 0


def give_away(path, monkeypatch):
    """Make a path another user's: for real, or by being another user."""
    if is_root():
        os.chown(path, 12345, 12345)
    else:
        own = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: own + 1)


@needs_compiler
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such bits")
def test_the_cache_is_private_whatever_the_umask(fresh, unoptimized):
    before = os.umask(0)
    try:
        library = building.build("attention")
    finally:
        os.umask(before)
    assert library.parent.stat().st_mode & 0o777 == 0o700
    assert library.stat().st_mode & 0o777 == 0o700


@needs_compiler
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such bits")
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_library_that_others_can_write_is_not_loaded_but_built_anew(fresh, unoptimized, mode):
    library = building.build("attention")
    library.write_bytes(b"planted")
    library.chmod(mode)
    fresh.chmod(0o777)
    assert attend() is not None
    assert library.read_bytes()[:7] != b"planted"
    assert library.stat().st_mode & 0o777 == 0o700
    assert fresh.stat().st_mode & 0o777 == 0o700


@needs_compiler
@pytest.mark.skipif(os.name == "nt" or not is_root(), reason="only root can give a file away")
def test_a_library_of_another_user_is_not_loaded_but_built_anew(fresh, unoptimized):
    library = building.build("attention")
    library.write_bytes(b"planted")
    os.chown(library, 12345, 12345)
    assert attend() is not None
    assert library.read_bytes()[:7] != b"planted"
    assert library.stat().st_uid == 0


@needs_compiler
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such bits")
def test_a_cache_folder_of_another_user_is_not_used(fresh, unoptimized, monkeypatch):
    building.build("attention")
    give_away(fresh, monkeypatch)
    with pytest.raises(PermissionError, match=r"kernels is another user's.*SPARSE_PATCH_CACHE"):
        building.build("attention")
    with pytest.warns(UserWarning, match="another user's"):
        assert attend() is None


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("no-such-compiler", "does not run"), ("false", "fails"), (None, "no c\\+\\+, g\\+\\+")],
)
def test_without_a_compiler_pytorch_does_the_work_and_says_so_once(
    fresh, monkeypatch, compiler, message
):
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    else:
        monkeypatch.setattr(building.shutil, "which", lambda _: None)
        monkeypatch.delenv("CXX", raising=False)
    q, k, v = inputs(SHAPES[0])
    plan = variants(SHAPES[0])["blocks"]
    with pytest.warns(UserWarning, match=f"{message}.*Install a C"):
        got = block_sparse_attention(q, k, v, plan, backend="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block_sparse_attention(q, k, v, plan, backend="cpu")
    want = block_sparse_attention(q, k, v, plan, backend="reference")
    torch.testing.assert_close(got, want, atol=3e-6, rtol=0)


def test_it_can_be_switched_off(fresh, monkeypatch):
    monkeypatch.setenv("SPARSE_PATCH_COMPILE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attend() is None
    assert not fresh.exists()


@needs_compiler
def test_threads_change_nothing(monkeypatch):
    shape = (4, 2, 300, 300, 32, 32, 32, 32)
    q, k, v = inputs(shape)
    plan = variants(shape)["blocks+sink+window"]
    found = []
    for n in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n: n)
        found.append(native.attend(q, k, v, plan, 0.3))
    for other in found[1:]:
        assert_same(other, found[0], 0)


@needs_compiler
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive_is_pytorch_s(scale):
    shape = SHAPES[0]
    q, k, v = inputs(shape)
    plan = variants(shape)["blocks+sink+window"]
    assert native.attend(q, k, v, plan, scale) is None
    got = block_sparse_attention(q, k, v, plan, scale=scale, backend="cpu")
    want = block_sparse_attention(q, k, v, plan, scale=scale, backend="reference")
    torch.testing.assert_close(got, want, atol=3e-6, rtol=0)


@needs_compiler
@pytest.mark.parametrize("dtype", building.DTYPES)
@pytest.mark.parametrize(("dim", "v_dim"), [(17, 15), (1, 3), (15, 33), (31, 31)])
def test_odd_head_dimensions(dim, v_dim, dtype):
    shape = (4, 2, 50, 70, dim, v_dim, 16, 16)
    q, k, v = inputs(shape, dtype)
    plan = variants(shape)["blocks+sink+window"]
    got = native.attend(q, k, v, plan, dim**-0.5)
    want = block_sparse_attention(
        *(x.float() for x in (q, k, v)), plan, backend="reference", return_lse=True
    )
    assert_same((got[0].float(), got[1]), want, 3e-6 if dtype == torch.float32 else 2e-2)


@needs_compiler
def test_the_default_dtype_does_not_matter():
    want = attend()
    torch.set_default_dtype(torch.float16)
    try:
        shape = SHAPES[1]
        with torch.random.fork_rng():
            q, k, v = (x.float() for x in inputs(shape))
        out, lse = native.attend(q, k, v, variants(shape)["sink"], 0.3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.dtype == lse.dtype == want[1].dtype == torch.float32
    assert bool(lse.isfinite().all())


@needs_compiler
def test_lists_changed_behind_the_plan_s_back_reach_no_other_memory():
    """Plans check their lists when they are made; tensors can be written to after that."""
    q, k, v = inputs((2, 1, 64, 64, 16, 16, 16, 16))
    mask = torch.tensor([True, False, False, True]).expand(2, 4, 4)
    tame = BlockPlan.from_block_mask(mask, block_q=16, block_k=16)
    start = torch.tensor([0, 16, 32, 48], dtype=torch.int32).expand(2, 4, 4).contiguous()
    count = torch.arange(1, 5, dtype=torch.int32).expand(2, 4).contiguous()
    wild = BlockPlan(64, 64, 16, (RunList(start, count, 16),))
    start[:] = torch.tensor([-40, 0, 48, 4000], dtype=torch.int32)
    count[:] = 9
    assert_same(native.attend(q, k, v, wild, 0.3), native.attend(q, k, v, tame, 0.3), 1e-6)


@needs_compiler
def test_the_kernel_in_use_has_a_name(monkeypatch):
    native.compiled.cache_clear()
    assert native.compiled() == building.build("attention").name
    monkeypatch.setattr(native, "_kernel", lambda: None)
    assert native.compiled() is not None  # asked once a process
    native.compiled.cache_clear()
    assert native.compiled() is None
    native.compiled.cache_clear()
