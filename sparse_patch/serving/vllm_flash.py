"""vLLM's FlashAttention backend (CUDA), with the prefill of long prompts sparse.

Written against vLLM 0.32, and not yet run on a GPU (`scripts/serving_gpu_check.py` does that).
Decode steps that run in a CUDA graph are not counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from .batch import pieces_of
from .pages import Unpack, side_by_side
from .vllm_layers import SparseForward, is_asked_for


class SparseFlashBackend(FlashAttentionBackend):
    """vLLM's own, but for the models that sparse_patch is asked for."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return SparseFlashImpl if is_asked_for() else FlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return SparseFlashBuilder if is_asked_for() else FlashAttentionMetadataBuilder


class SparseFlashBuilder(FlashAttentionMetadataBuilder):
    """Keeps prompts out of CUDA graphs, and lengths where reading them waits for no device."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashAttentionMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        lengths = common_attn_metadata.seq_lens_cpu_upper_bound  # right for prompts
        if lengths is None:
            lengths = common_attn_metadata.seq_lens.cpu()
        starts = common_attn_metadata.query_start_loc_cpu
        metadata.sparse_patch_pieces = pieces_of(starts.tolist(), lengths.tolist())
        return metadata


class SparseFlashImpl(SparseForward, FlashAttentionImpl):
    """One layer."""

    def window(self) -> int | None:
        before = self.sliding_window[0] if self.sliding_window is not None else -1
        return before + 1 if before >= 0 else None

    def find_unpack(self, layer: Any, kv_cache: Tensor) -> Unpack | None:
        inner = self.num_kv_heads, 2 * self.head_size
        known = kv_cache.ndim == 4 and (kv_cache.shape[1], kv_cache.shape[3]) == inner
        return side_by_side if known and kv_cache.dtype == self.dtype else None

    def why_all_exact(self, metadata: FlashAttentionMetadata) -> str | None:
        special = metadata.mm_prefix_query_range_tensor, metadata.rswa_prefix_lens
        if isinstance(metadata.causal, torch.Tensor) or any(x is not None for x in special):
            return "mask"
        return None if metadata.causal else "not causal"

    def finish_part(
        self, layer: Any, part: FlashAttentionMetadata, sequences: int
    ) -> FlashAttentionMetadata:
        part.scheduler_metadata, part.max_num_splits = None, 0  # the kernel's own choice
        return part
