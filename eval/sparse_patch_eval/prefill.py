"""Time a prefill, go on from it, and compare two of them. What the demo and the bench share.

Time-to-first-token here is one forward of the whole prompt that fills a KV cache and yields the
logits of the last position; tokenising and loading are outside.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # seconds of import, for what only wants `machine`
    from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class Prefill:
    """One prefill.

    Attributes:
        seconds: wall time until the logits of the last prompt token were there.
        tail: float32 `[kept, vocab]`, logits of the last prompt tokens.
        cache: the KV cache, ready to decode from; decoding extends it.
    """

    seconds: float
    tail: Tensor
    cache: Cache

    @property
    def logits(self) -> Tensor:
        """float32 `[vocab]`, for the first new token."""
        return self.tail[-1]


@torch.inference_mode()
def prefill(model: PreTrainedModel, input_ids: Tensor, *, kept: int = 1) -> Prefill:
    """Run `input_ids [1, length]` through `model` and take the time.

    Args:
        kept: of how many last tokens the logits are wanted.
    """
    _wait_for(input_ids.device)
    start = time.perf_counter()
    out = model(input_ids, use_cache=True, logits_to_keep=kept)
    first = int(out.logits[0, -1].argmax())  # reading it waits for the device
    seconds = time.perf_counter() - start
    assert first >= 0
    return Prefill(seconds, out.logits[0].float(), out.past_key_values)


@torch.inference_mode()
def decode(model: PreTrainedModel, start: Prefill, count: int) -> list[int]:
    """The next `count` tokens after a prefill, greedily. Uses the prefill's cache up."""
    tokens = [int(start.logits.argmax())]
    while len(tokens) < count:
        step = torch.tensor([tokens[-1:]], device=start.logits.device)
        out = model(step, past_key_values=start.cache, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens


def kl_divergence(dense: Tensor, sparse: Tensor) -> float:
    """KL(dense || sparse) of two next-token distributions, given logits `[vocab]`, in nats."""
    log_p, log_q = dense.log_softmax(-1), sparse.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum())


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and with: JSON-ready."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "device": device,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "sparse_patch": _version("sparse-patch"),
        "git": _git_hash(),
    }


def _version(package: str) -> str | None:
    """None where the package runs from its sources, not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {os.cpu_count()} cores"


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


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
