"""What a machine lacks, found before anything is imported that would fail for want of it."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# As in pyproject.toml.
PYTHON = (3, 10)
PACKAGES = {"torch": "2.8", "triton": "3.4", "transformers": "5.4"}


def missing(on_gpu: bool) -> list[str]:
    """What is missing, each with what to do."""
    if sys.version_info < PYTHON:
        return [f"Python {'.'.join(map(str, PYTHON))} or later: name one with PYTHON="]
    found = [
        f"{name}>={least}: pip install '{name}>={least}', or name a Python that has it with PYTHON="
        for name, least in PACKAGES.items()
        if not _has(name, least)
    ]
    if on_gpu and not found:
        found += _gpu() + _compiler()
    return found


def _gpu() -> list[str]:
    import torch

    if os.environ.get("TRITON_INTERPRET") == "1":
        return ["Triton's compiler: TRITON_INTERPRET=1 is set; unset it, or give --dry-run"]
    if torch.version.cuda is None and torch.version.hip is None:
        return [
            f"a torch with CUDA or ROCm (this is {torch.__version__}): pip install torch from "
            "https://pytorch.org/get-started/locally"
        ]
    if not torch.cuda.is_available():
        return [f"a GPU that torch {torch.__version__} can use: see nvidia-smi and the driver"]
    return []


def _compiler() -> list[str]:
    """Triton builds its launchers with the C compiler of the machine."""
    found = []
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        found.append("a C compiler: apt-get install gcc, or set CC=")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        found.append(f"Python's headers ({header}): apt-get install python3-dev")
    return found


def _has(name: str, least: str) -> bool:
    try:
        return _numbers(version(name)) >= _numbers(least)
    except PackageNotFoundError:
        return False


def _numbers(text: str) -> tuple[int, ...]:
    """(2, 13) of "2.13.0+cpu": two numbers are all that is asked for."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in text.split(".")[:2])
