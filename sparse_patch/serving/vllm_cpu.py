"""vLLM's attention on a CPU, with the prefill of long prompts sparse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)

from .pages import Unpack, Write, find_packing
from .vllm_layers import SparseForward, is_asked_for


class SparseCPUBackend(CPUAttentionBackend):
    """vLLM's own, but for the models that sparse_patch is asked for."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return SparseCPUImpl if is_asked_for() else CPUAttentionBackendImpl


class SparseCPUImpl(SparseForward, CPUAttentionBackendImpl):
    """One layer."""

    def window(self) -> int | None:
        return self.sliding_window if self.sliding_window > 0 else None

    def find_unpack(self, layer: Any, kv_cache: Tensor) -> Unpack | None:
        block, dim, dtype = kv_cache.shape[2], kv_cache.shape[3] // 2, kv_cache.dtype
        return find_packing(_writer(layer.isa, block, dim, dtype), block, dim, dtype)

    def why_all_exact(self, metadata: CPUAttentionMetadata) -> str | None:
        if metadata.dynamic_causal is not None:
            return "mask"
        return None if metadata.causal else "not causal"

    def part_key(self) -> tuple[Any, ...]:
        return self.sliding_window, self.num_heads, self.num_kv_heads, self.head_size

    def finish_part(
        self, layer: Any, part: CPUAttentionMetadata, sequences: int
    ) -> CPUAttentionMetadata:
        part.scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=sequences,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            seq_lens=part.seq_lens,
            dtype=self.dtype,
            query_start_loc=part.query_start_loc,
            causal=part.causal,
            sliding_window_size=self.sliding_window,
            isa=layer.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return part


def _writer(isa: str, block: int, dim: int, dtype: torch.dtype) -> Write:
    """vLLM's function that puts keys and values into a block."""

    def write(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        cache = torch.zeros(1, 1, 2 * block, dim, dtype=dtype)
        keys, values = cache.chunk(2, dim=2)
        slots = torch.arange(block)
        ops.cpu_attn_reshape_and_cache(k[:, None], v[:, None], keys, values, slots, isa)
        return keys.flatten(), values.flatten()

    return write
