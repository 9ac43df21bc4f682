"""What a command checks before it works: packages, device, backend, output folder.

Each raises an error whose message is one line that ends with what to do.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import torch
from sparse_patch_kernels import BackendUnavailable, choose_backend

__all__ = ["check_backend", "check_device", "check_output", "require"]


def require(what: str, *packages: str, extra: str) -> None:
    """Raise an ImportError if a package that `what` needs is missing; `extra` of ours brings it."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'{what} needs {" and ".join(missing)}: pip install "sparse-patch[{extra}]"'
        )


def check_device(device: str) -> None:
    """Raise a ValueError if PyTorch cannot hold a tensor on a device."""
    try:
        on_meta = torch.empty(1, device=device).is_meta
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--device {device!r} is not to be had here (torch {torch.__version__}: {reason}); "
            f"try {_known_devices()}"
        ) from error
    if on_meta:
        raise ValueError(f"--device {device!r} holds no numbers; try {_known_devices()}")


def _known_devices() -> str:
    return ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])


def check_backend(backend: str, device: str) -> None:
    """Raise a ValueError if a backend that is named does not exist or cannot run on a device."""
    if backend == "auto":
        return
    try:
        choose_backend(backend, torch.device(device))
    except (ValueError, BackendUnavailable) as error:
        raise ValueError(f"--backend {backend}: {error}") from error


def check_output(folder: Path) -> None:
    """Raise an OSError if a folder can neither be written nor made; leave nothing in either case.

    Permissions do not say all, so a folder is made where the first new one would be, and removed.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".sparse-patch-"):
            pass
    except OSError as error:
        raise OSError(
            f"--output {folder} cannot be written ({there}: {error.strerror}); name another folder"
        ) from error
