"""A short test of this installation, on every device: the op against its definition, and a patch.

The op runs on tiny random inputs in each dtype, and its reference in float64 on the same ones. A
tiny random model is patched with a method that keeps everything, which must not change its answer,
with the method we recommend, which must run sparse, and is then given back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sparse_patch_kernels import BlockPlan, block_sparse_attention, choose_backend
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sparse_patch

__all__ = ["Check", "self_test"]

# Largest errors of outputs that are means of numbers of size 1: some roundings of the dtype.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_KEYS, _BLOCK = 300, 32
_PROMPT = 512
# Largest difference of logits, whose size is 1, between two orders of summation in float32.
_LOGITS = 1e-3


@dataclass(frozen=True)
class Check:
    """One check: what was found, in words, and whether it is right."""

    name: str
    ok: bool
    found: str
    seconds: float


def self_test(devices: list[str]) -> Iterator[Check]:
    """The checks, each as soon as it is done. What one of them raises is its finding."""
    for device in devices:
        for dtype in _TOLERANCES:
            yield _check(
                f"{device}: op in {str(dtype).removeprefix('torch.')}",
                partial(_op_error, device, dtype),
            )
        yield _check(f"{device}: patched model", partial(_patched, device))


def _check(name: str, run: Callable[[], tuple[bool, str]]) -> Check:
    begin = time.perf_counter()
    try:
        ok, found = run()
    except Exception as error:  # whatever is wrong with this machine is what is asked for
        ok, found = False, f"{type(error).__name__}: {error}"
    return Check(name, ok, found, time.perf_counter() - begin)


def _op_error(device: str, dtype: torch.dtype) -> tuple[bool, str]:
    """The op on whatever backend runs on a device, against the reference on the same inputs."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(heads, _KEYS, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2)
    )
    n = -(-_KEYS // _BLOCK)
    mask = (torch.rand(4, n, n, generator=generator) < 0.4) | torch.eye(n, dtype=torch.bool)
    plan = BlockPlan.from_block_mask(
        mask.to(device), block_q=_BLOCK, block_k=_BLOCK, q_len=_KEYS, kv_len=_KEYS
    )
    backend = choose_backend("auto", torch.device(device))
    got = block_sparse_attention(q, k, v, plan, backend=backend)
    q, k, v = (x.to(torch.float64) for x in (q, k, v))
    want = block_sparse_attention(q, k, v, plan, backend="reference")
    error = float((got.to(torch.float64) - want).abs().max())
    most = _TOLERANCES[dtype]
    return error <= most, f"backend {backend}, largest error {error:.1e} (at most {most:.0e})"


@torch.no_grad()
def _patched(device: str) -> tuple[bool, str]:
    model = _tiny_model().to(device)
    ids = torch.randint(0, 128, (1, _PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    before = model(ids).logits
    options: dict[str, Any] = {"min_length": 0, "min_queries": 0}
    with sparse_patch.patch(model, "dense", **options) as handle:
        kept = _difference(model(ids).logits, before)
    with sparse_patch.patch(model, sparse_patch.RECOMMENDED, **options) as recommended:
        finite = bool(model(ids).logits.isfinite().all())
    layers = model.config.num_hidden_layers
    found = {
        f"keeping everything changes logits by {kept:.1e} (at most {_LOGITS:.0e})": kept <= _LOGITS,
        _ran(handle.report(), layers): handle.report().sparse_calls == layers,
        f"{sparse_patch.RECOMMENDED}: {_ran(recommended.report(), layers)}": (
            finite and recommended.report().sparse_calls == layers
        ),
        "unpatched it is what it was": torch.equal(model(ids).logits, before),
    }
    wrong = [f"not so: {words}" for words, holds in found.items() if not holds]
    return not wrong, "; ".join(wrong or found)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _ran(report: sparse_patch.Report, layers: int) -> str:
    return f"{report.sparse_calls} of {layers} layers run sparse"


def _tiny_model() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * _PROMPT,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()
