"""From how many keys on sparse attention pays on a GPU: measured, once per patch and kind of call.

`patch(..., min_length="auto")` asks this where times cannot be taken as calls go by, since to take
them would wait for the device. What sparse attention costs, a plan of the method and the op at
`DENSITY` of what is causal, is timed beside what PyTorch's SDPA chooses, host and all, on random
numbers of the call's heads and dimensions: at 4,096 keys, and at twice as many until it pays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from sparse_patch_kernels import BlockPlan, block_sparse_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .registry import Method

LENGTHS = (4096, 8192, 16384, 32768)
"""Keys at which attention is timed; with twice the last, every method is taken to pay."""
DENSITY = 0.25
"""What plans of the recommended settings keep of a prompt of some thousand tokens."""
LEAST_SAVED = 0.05
"""Sparse attention that saves less than this share of exact attention does not pay."""
_BLOCK = 128
_ROUNDS = 3

Seconds = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Kind:
    """Calls that one measurement stands for: q `[heads, n, dim]`, k and v `[kv_heads, n, ...]`."""

    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Kind:
        """Of q, k and v with their heads on the third axis from the end."""
        return cls(q.shape[-3], k.shape[-3], q.shape[-1], v.shape[-1], q.dtype, q.device)

    def inputs(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k and v of `n` tokens."""
        own = torch.Generator(self.device).manual_seed(0)
        shapes = (self.heads, self.dim), (self.kv_heads, self.dim), (self.kv_heads, self.v_dim)
        q, k, v = (
            torch.randn(heads, n, dim, generator=own, dtype=self.dtype, device=self.device)
            for heads, dim in shapes
        )
        return q, k, v


def keys_to_pay(
    method: Method,
    kind: Kind,
    backend: str | None = None,
    lengths: Sequence[int] = LENGTHS,
    seconds: Seconds | None = None,
) -> int:
    """The least of `lengths` at which the method is faster than exact attention, or twice the last.

    Args:
        backend: of the op.
        seconds: times a call; default: the fastest of a few, the device waited for.
    """
    seconds = seconds or _seconds_on(kind.device)
    with torch.no_grad():
        for n in lengths:
            if _pays(method, kind.inputs(n), backend, seconds):
                return n
    return 2 * lengths[-1]


def _pays(
    method: Method, inputs: tuple[Tensor, Tensor, Tensor], backend: str | None, seconds: Seconds
) -> bool:
    q, k, v = inputs
    n, scale = q.shape[1], 1 / math.sqrt(q.shape[2])

    def plan() -> BlockPlan | None:
        return method.plan(q, k, scale=scale, q_offset=0)

    if plan() is None:
        return False
    kept = _random_plan(n, q.device)
    exact = seconds(lambda: _sdpa(q, k, v))
    op = seconds(lambda: block_sparse_attention(q, k, v, kept, backend=backend))
    return seconds(plan) + op <= (1 - LEAST_SAVED) * exact


def _random_plan(n: int, device: torch.device) -> BlockPlan:
    """A plan that keeps `DENSITY` of the causal pairs, the diagonal among them."""
    own = torch.Generator(device).manual_seed(0)
    blocks = -(-n // _BLOCK)
    mask = torch.rand(1, blocks, blocks, generator=own, device=device) < DENSITY
    mask |= torch.eye(blocks, dtype=torch.bool, device=device)
    return BlockPlan.from_block_mask(mask, block_q=_BLOCK, block_k=_BLOCK, q_len=n, kv_len=n)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)


def _seconds_on(device: torch.device) -> Seconds:
    wait = torch.get_device_module(device).synchronize

    def seconds(call: Callable[[], object]) -> float:
        call()  # compiles and tunes what it needs
        best = math.inf
        for _ in range(_ROUNDS):
            wait(device)
            begin = time.perf_counter()
            call()
            wait(device)
            best = min(best, time.perf_counter() - begin)
        return best

    return seconds
