"""The compiled kernel of the CPU backend: C++, built once per machine with the system's compiler.

The source ships with the package. The first call compiles it for this very CPU, which takes a few
seconds, into the cache folder (`$SPARSE_PATCH_CACHE`, else `~/.cache/sparse-patch`); later
processes load it from there. Where there is no compiler, PyTorch does the work and a warning says
so once; `SPARSE_PATCH_COMPILE=0` chooses that without a warning. `cpu_selection` loads its own in
the same way.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .plan import BlockPlan

NATIVE = Path(__file__).parent / "native"
DTYPES = (torch.float32, torch.bfloat16)
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-O3", "-ffp-contract=fast", "-std=c++17", "-fPIC", "-shared", "-pthread")
# What makes code for this very CPU; some compilers for ARM know the second only.
_NATIVE = ("-march=native", "-mcpu=native")


class NoCompiler(RuntimeError):
    """The kernel cannot be built here; the message says why."""


class _Runs(Structure):
    """As in attention.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("start", "count")),
        *((name, c_int64) for name in ("lists", "counts", "listed", "width")),
    )


class _Call(Structure):
    """As in attention.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "out", "lse")),
        *(
            (f"{name}_{what}", c_int64)
            for name in ("q", "k", "v", "out")
            for what in ("head", "row")
        ),
        *((name, c_int64) for name in ("heads", "kv_heads", "q_len", "kv_len", "dim", "v_dim")),
        *((name, c_int64) for name in ("block", "n_blocks", "sink", "window", "units")),
        ("order", c_void_p),
        ("orders", c_int64),
        ("runs", POINTER(_Runs)),
        ("n_runs", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("threads", c_int32),
        ("bfloat16", c_int32),
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor] | None:
    """Same contract as `reference.block_sparse_attention`; None where the kernel is not to be had.

    Args:
        q, k, v: float32 or bfloat16, the last dimension contiguous.
        plan: without pooled runs.
        scale: one that is not positive is not for the kernel, whose largest product is the largest
            score.
    """
    kernel = _kernel()
    if kernel is None or scale <= 0:
        return None
    (heads, q_len, dim), (kv_heads, kv_len, v_dim) = q.shape, v.shape
    out = q.new_empty(q_len, heads, v_dim).transpose(0, 1)
    lse = torch.empty(heads, q_len, dtype=torch.float32, device=q.device)
    lists = [(run.start.contiguous(), run.count.contiguous(), run.width) for run in plan.runs]
    runs = (_Runs * len(lists))(
        *(
            _Runs(start.data_ptr(), count.data_ptr(), len(start), len(count), start.shape[2], width)
            for start, count, width in lists
        )
    )
    order = None if plan.key_order is None else plan.key_order.to(torch.int32).contiguous()
    shared = [n for start, count, _ in lists for n in (len(start), len(count))]
    # A unit is a set of neighbouring query heads with one list and one KV head.
    units = math.lcm(kv_heads, *shared, 1 if order is None else len(order))
    call = _Call(
        *(x.data_ptr() for x in (q, k, v, out, lse)),
        *(x.stride(i) for x in (q, k, v, out) for i in (0, 1)),
        *(heads, kv_heads, q_len, kv_len, dim, v_dim),
        *(plan.block_q, plan.n_q_blocks, plan.sink, plan.window, units),
        None if order is None else order.data_ptr(),
        0 if order is None else len(order),
        runs,
        len(lists),
        scale,
        softcap or 0.0,
        torch.get_num_threads(),
        q.dtype == torch.bfloat16,
    )
    if kernel(ctypes.byref(call)):
        raise MemoryError("block-sparse attention: no memory for a tile of keys")
    return out, lse


@functools.lru_cache(None)
def _kernel() -> Any:
    """The C function, compiled if need be; None where that is not possible or not wanted."""
    library = load("attention")
    if library is None:
        return None
    kernel = library.sparse_patch_attention
    kernel.argtypes, kernel.restype = [POINTER(_Call)], ctypes.c_int
    return kernel


def load(name: str) -> ctypes.CDLL | None:
    """`native/<name>.cpp`, compiled if need be; None where that is not possible or not wanted."""
    if os.environ.get("SPARSE_PATCH_COMPILE") == "0":
        return None
    try:
        return ctypes.CDLL(str(build(name)))
    except (NoCompiler, OSError) as error:
        warnings.warn(
            "sparse_patch: the CPU backend runs without its compiled kernel, and slower: "
            f"{error}. Install a C++ compiler (g++ or clang++), or set SPARSE_PATCH_COMPILE=0 to "
            "leave it at that.",
            UserWarning,
            stacklevel=2,
        )
        return None


@functools.lru_cache(None)
def compiled() -> str | None:
    """The name of the compiled kernel in use, which differs where the kernel would; or None."""
    return None if _kernel() is None else build().name


def cache_folder() -> Path:
    """Where this project keeps what it makes once per machine; need not exist."""
    return Path(os.environ.get("SPARSE_PATCH_CACHE") or "~/.cache/sparse-patch").expanduser()


def build(name: str = "attention") -> Path:
    """`native/<name>.cpp` as a shared library, from the cache or compiled into it.

    Raises:
        NoCompiler: no compiler is there, or it fails.
        OSError: the cache folder cannot be written, or is another user's.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise NoCompiler(f"no {', '.join(_COMPILERS)} on PATH")
    command = [*shlex.split(compiler), *_FLAGS]
    source = NATIVE / f"{name}.cpp"
    library = cache_folder() / "kernels" / f"{name}-{_fingerprint(source, command)}.so"
    private_folder(library.parent)
    # What others could have written is never loaded, but built anew in its place.
    if not library.exists() or not only_ours(library):
        _compile(source, command, library)
    return library


def only_ours(path: Path) -> bool:
    """Is a path that exists this user's or root's, and can nobody else write it?

    Windows has no such bits: true there, where the user's folder is private already.
    """
    if os.name == "nt":
        return True
    about = path.stat()
    return about.st_uid in (0, os.getuid()) and not about.st_mode & 0o022


def private_folder(folder: Path) -> None:
    """Make a folder of the cache, for this user alone.

    Raises:
        OSError: it cannot be made, or is another user's.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if only_ours(folder):
        return
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(
            f"{folder} is another user's, who could put code there; set SPARSE_PATCH_CACHE to a "
            "folder of your own"
        )
    folder.chmod(0o700)


def _fingerprint(source: Path, command: Sequence[str]) -> str:
    """Differs where the library would: source, compiler and its flags, and the CPU."""
    texts = (path.read_text() for path in (source, NATIVE / "common.h"))
    parts = [*texts, *command, platform.platform(), platform.machine()]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        about = subprocess.run(
            [command[0], "--version"], capture_output=True, text=True, timeout=60
        )
        parts.append(about.stdout)
    with contextlib.suppress(OSError):  # Linux; a home folder may be shared by unlike machines
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        parts += sorted({line for line in lines if line.startswith(("flags", "Features", "model"))})
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _compile(source: Path, command: Sequence[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        new = Path(scratch) / library.name
        errors = ""
        for native in _NATIVE:
            call = [*command, native, "-o", str(new), str(source)]
            try:
                done = subprocess.run(call, capture_output=True, text=True, timeout=600)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise NoCompiler(f"{command[0]} does not run: {error}") from error
            if done.returncode == 0:
                new.chmod(0o700)  # whatever the umask lets others write
                # All at once: another process may be about to load it.
                new.replace(library)
                return
            errors = errors or done.stderr.strip()
        raise NoCompiler(f"{command[0]} fails: {errors[-500:]}")
