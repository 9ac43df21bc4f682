"""vLLM's attention on a CPU, with the prefill of long prompts sparse."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)

from .batch import Piece, rows_of, starts_of
from .layer import EngineLayer
from .pages import Packing, Pages, find_packings
from .vllm_layers import account_of, is_asked_for, layer_of, part_in, pieces_in, try_out


class SparseCPUBackend(CPUAttentionBackend):
    """vLLM's own, but for the models that sparse_patch is asked for."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return SparseCPUImpl if is_asked_for() else CPUAttentionBackendImpl


class SparseCPUImpl(CPUAttentionBackendImpl):
    """One layer: sequences that run sparse are taken out of a step, and the rest left to vLLM."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        config = get_current_vllm_config()
        self.account = account_of(config)
        self.dtype = config.model_config.dtype
        try_out(self.account, self, self.dtype)
        self.own: EngineLayer | None = None
        self.packings: tuple[Packing, Packing] | None = None
        self.seen = False

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        *more: Any,
        **options: Any,
    ) -> Tensor:
        """See vLLM's; `kv_cache` is `[blocks, kv_heads, block, 2 * dim]`."""
        if attn_metadata is None:  # in a warm-up
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *more, **options
            )
        if not self.seen:
            self._meet(layer, kv_cache)
        left = pieces = pieces_in(attn_metadata)
        if self.own is not None:
            pages = self._pages(kv_cache, attn_metadata)
            reason = _why_all_exact(attn_metadata)
            left = self.own.attend(pieces, query, key, value, pages, output, reason)
            self.account.tick()
        if left and len(left) < len(pieces):
            rows = rows_of(left)
            part = torch.empty_like(output[rows])
            some = self._part(layer, attn_metadata, left)
            super().forward(layer, query[rows], key, value, kv_cache, some, part, *more, **options)
            output[rows] = part
        elif left:
            super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *more, **options
            )
        return output

    def _meet(self, layer: Any, kv_cache: Tensor) -> None:
        """Learn what is not known before the first step."""
        window = self.sliding_window if self.sliding_window > 0 else None
        self.own = layer_of(self, layer.layer_name, self.account, window)
        if self.own is not None and self.own.always_exact != "cache":
            _, _, block, width = kv_cache.shape
            self.packings = find_packings(
                _writer(layer.isa, block, width // 2, kv_cache.dtype),
                block,
                width // 2,
                kv_cache.dtype,
            )
        self.seen = True

    def _pages(self, kv_cache: Tensor, metadata: CPUAttentionMetadata) -> Pages | None:
        if self.packings is None:
            return None
        keys, values = kv_cache.view(*kv_cache.shape[:2], 2, -1).unbind(2)
        return Pages(keys, values, self.packings, metadata.block_table)

    def _part(
        self, layer: Any, metadata: CPUAttentionMetadata, pieces: Sequence[Piece]
    ) -> CPUAttentionMetadata:
        def make() -> CPUAttentionMetadata:
            starts = metadata.query_start_loc
            index = torch.tensor([piece.index for piece in pieces])
            part = dataclasses.replace(
                metadata,
                num_actual_tokens=sum(piece.q_len for piece in pieces),
                max_query_len=max(piece.q_len for piece in pieces),
                max_seq_len=max(piece.kv_len for piece in pieces),
                query_start_loc=torch.tensor(starts_of(pieces), dtype=starts.dtype),
                seq_lens=metadata.seq_lens[index],
                block_table=metadata.block_table[index],
            )
            part.scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(pieces),
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
                dynamic_causal=None,
                kv_cache_dtype=self.kv_cache_dtype,
            )
            return part

        key = self.sliding_window, self.num_heads, self.num_kv_heads, self.head_size
        return part_in(metadata, pieces, key, make)


def _why_all_exact(metadata: CPUAttentionMetadata) -> str | None:
    if metadata.dynamic_causal is not None:
        return "mask"
    return None if metadata.causal else "not causal"


def _writer(isa: str, block: int, dim: int, dtype: torch.dtype) -> Any:
    """vLLM's function that puts keys and values into a block, see `pages.Write`."""

    def write(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        cache = torch.zeros(1, 1, 2 * block, dim, dtype=dtype)
        keys, values = cache.chunk(2, dim=2)
        slots = torch.arange(block)
        ops.cpu_attn_reshape_and_cache(k[:, None], v[:, None], keys, values, slots, isa)
        return keys.flatten(), values.flatten()

    return write
