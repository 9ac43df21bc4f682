"""The machine and the versions behind a measurement."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["machine"]


def machine() -> dict[str, Any]:
    """Device, threads, versions and commit behind a measurement: JSON-ready."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "device": device,
        "cpu_capability": _cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": installed_version("transformers"),
        "sparse_patch": installed_version("sparse-patch"),
        "git": _git_hash(),
    }


def installed_version(package: str) -> str | None:
    """The installed version; None where the package runs from its sources."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor and its cores."""
    name = cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _cpu_capability() -> str:
    """The vectors that PyTorch uses, and whether the CPU can multiply bfloat16, in tiles or not."""
    flags = cpuinfo("flags").split()
    units = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *units])


def cpuinfo(field: str) -> str:
    """A field of the first core; empty where Linux does not tell."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith(field):
            return line.split(":", 1)[1].strip()
    return ""


def _git_hash() -> str | None:
    """The commit of this checkout, with "+" if files differ from it; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")
