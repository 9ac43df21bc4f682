"""What a bug report must say of a machine: versions, kernels and backends with reasons, caches."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from sparse_patch_kernels import BackendUnavailable, choose_backend
from sparse_patch_kernels.cpu import building, native

import sparse_patch
from sparse_patch_eval.base.machine import cpu_name, cpuinfo, installed_version, machine

__all__ = ["about_this_machine", "devices"]

_PACKAGES = (
    *("torch", "transformers", "triton", "typer", "rich", "gguf", "accelerate"),
    *("lm-eval", "datasets", "jinja2", "scipy", "matplotlib", "vllm"),
)
_VARIABLES = (
    *("SPARSE_PATCH_CACHE", "SPARSE_PATCH_COMPILE", "CXX", "OMP_NUM_THREADS", "MKL_NUM_THREADS"),
    *("ATEN_CPU_CAPABILITY", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "TRITON_CACHE_DIR"),
    *("TRITON_INTERPRET", "HF_HOME", "HF_HUB_OFFLINE", "PYTORCH_ENABLE_MPS_FALLBACK"),
)
_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def devices() -> list[str]:
    """The devices that models can be patched on here: the CPU, and every GPU."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def about_this_machine() -> dict[str, dict[str, Any]]:
    """Facts by section, JSON-ready; compiles the CPU kernels where that is still to be done."""
    facts = machine()
    return {
        "versions": {
            "sparse-patch": f"{sparse_patch.__version__}, commit {facts['git']}",
            "python": f"{facts['python']}, {facts['platform']}",
            **{name: installed_version(name) or "not installed" for name in _PACKAGES},
        },
        "processor": {
            "name": cpu_name(),
            "units": ", ".join(_units()) or "not known",
            "PyTorch uses": facts["cpu_capability"],
            "threads": facts["threads"],
        },
        "GPUs": {f"cuda:{i}": _gpu(i) for i in range(torch.cuda.device_count())} or {"none": ""},
        "compiler": {"C++": _compiler()},
        "backend": {device: _backend(device) for device in devices()},
        "caches": {str(folder): _size(folder) for folder in _caches()},
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _units() -> list[str]:
    flags = (cpuinfo("flags") or cpuinfo("Features")).split()
    return [unit for unit in _UNITS if unit in flags]


def _gpu(index: int) -> str:
    about = torch.cuda.get_device_properties(index)
    built = torch.version.cuda or torch.version.hip
    return (
        f"{about.name}, {about.total_memory / 2**30:.0f} GiB, compute capability "
        f"{about.major}.{about.minor}, PyTorch for {built}"
    )


def _compiler() -> str:
    command = building.compiler()
    if command is None:
        return "none found"
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(command)} does not run: {error}"
    return f"{' '.join(command)}: {(done.stdout or done.stderr).strip().splitlines()[0]}"


def _backend(device: str) -> str:
    """Which backend runs on a device, and why that one."""
    try:
        chosen = choose_backend("auto", torch.device(device))
    except BackendUnavailable as error:
        return f"none, all calls run exact: {error}"
    if chosen != "cpu":
        return f"{chosen}: a GPU, and Triton is installed"
    why_not = why_no_cpu_kernel()
    if why_not is not None:
        return f"cpu, in PyTorch and slower: {why_not}"
    return f"cpu, our C++ kernel; bfloat16 is multiplied by {native.products()}"


@functools.lru_cache(None)
def why_no_cpu_kernel() -> str | None:
    """Why the CPU backend runs without its compiled kernel; None where it has it."""
    if os.environ.get("SPARSE_PATCH_COMPILE") == "0":
        return "SPARSE_PATCH_COMPILE=0 asks for it"
    try:
        building.build("attention")
    except (building.NoCompiler, OSError) as error:
        return f"{error}. Install a C++ compiler (g++ or clang++)"
    return None if native.compiled() else "the compiled library cannot be loaded"


def _caches() -> list[Path]:
    ours = building.cache_folder()
    parts = sorted(path for path in ours.iterdir() if path.is_dir()) if ours.is_dir() else []
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache").expanduser()
    return [ours, *parts, triton]


def _size(folder: Path) -> str:
    if not folder.is_dir():
        return "not there yet"
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    writable = "" if os.access(folder, os.W_OK) else ", not writable"
    return f"{sum(sizes) / 2**20:.1f} MiB in {len(sizes)} files{writable}"
