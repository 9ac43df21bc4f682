"""C++ that is built once per machine with the system's compiler, and loaded.

The sources ship with the package, in `src/`. `prepare`, else the first use of one, compiles it for
this very CPU, which takes some seconds, into the cache folder (`$SPARSE_PATCH_CACHE`, else
`~/.cache/sparse-patch`); later processes load it from there, and one that comes meanwhile waits.
Where there is no compiler, PyTorch does the work and a warning says so once;
`SPARSE_PATCH_COMPILE=0` chooses that without a warning.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock

__all__ = [
    "NoCompiler",
    "build",
    "cache_folder",
    "compiler",
    "load",
    "only_ours",
    "private_folder",
]

SOURCES = Path(__file__).parent / "src"
NAMES = ("attention", "lists", "selection")
DTYPES = (torch.float32, torch.bfloat16)  # that the sources are written for
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-O3", "-ffp-contract=fast", "-std=c++17", "-fPIC", "-shared", "-pthread")
# What makes code for this very CPU; some compilers for ARM know the second only.
_NATIVE = ("-march=native", "-mcpu=native")


class NoCompiler(RuntimeError):
    """A source cannot be built here; the message says why."""


@functools.lru_cache(None)
def prepare() -> None:
    """Compile what this process may need and the cache lacks, so that no first call waits for it.

    Says on standard error that it compiles.
    """
    with ThreadPoolExecutor(len(NAMES)) as pool:
        list(pool.map(load, NAMES))


def load(name: str) -> ctypes.CDLL | None:
    """`src/<name>.cpp`, compiled if need be; None where that is not possible or not wanted."""
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


def cache_folder() -> Path:
    """Where this project keeps what it makes once per machine; need not exist."""
    return Path(os.environ.get("SPARSE_PATCH_CACHE") or "~/.cache/sparse-patch").expanduser()


def compiler() -> list[str] | None:
    """The command of the C++ compiler: `$CXX`, else the first on PATH; None: there is none."""
    command = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    return None if command is None else shlex.split(command)


def build(name: str) -> Path:
    """`src/<name>.cpp` as a shared library, from the cache or compiled into it.

    Raises:
        NoCompiler: no compiler is there, or it fails.
        OSError: the cache folder cannot be written, or is another user's.
    """
    cxx = compiler()
    if cxx is None:
        raise NoCompiler(f"no {', '.join(_COMPILERS)} on PATH")
    command = [*cxx, *_FLAGS]
    source = SOURCES / f"{name}.cpp"
    library = cache_folder() / "kernels" / f"{name}-{_fingerprint(source, command)}.so"
    private_folder(library.parent)
    if not _is_there(library):
        with FileLock(library.with_suffix(".lock"), mode=0o600):
            if not _is_there(library):  # nor has another process made it meanwhile
                print(
                    f"sparse_patch: compiling {source.name} for this machine, once; this takes "
                    "some seconds",
                    file=sys.stderr,
                )
                _compile(source, command, library)
    return library


def _is_there(library: Path) -> bool:
    # What others could have written is never loaded, but built anew in its place.
    return library.exists() and only_ours(library)


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
    texts = (path.read_text() for path in (source, *sorted(SOURCES.glob("*.h"))))
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
