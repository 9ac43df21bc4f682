"""What our backends for vLLM have in common: whose layers they are, and how a step goes."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sparse_patch_kernels import block_sparse_attention
from torch import Tensor
from vllm import envs
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType

from ..call import Call
from ..costs import keeps_all
from ..profiles import shape_of
from .account import Account
from .batch import Piece, pieces_of, rows_of, starts_of
from .layer import EngineLayer
from .pages import Pages, Unpack
from .settings import KEY, Settings

logger = init_logger("vllm.sparse_patch")

# The accounts of the engines in this process, by a part of their configurations (which cannot be
# hashed).
_accounts: list[tuple[weakref.ref[Any], Account]] = []

# Tokens that the method and the op are tried on when an engine starts.
_TRIAL = 256


def is_asked_for() -> bool:
    """Does the model that is being built run sparse_patch?"""
    config = get_current_vllm_config_or_none()
    if config is None or not isinstance(config.additional_config, dict):
        return False
    draft = config.model_config is not None and config.model_config.runner_type == "draft"
    return KEY in config.additional_config and not draft


def account_of(config: Any) -> Account:
    """The account of an engine, opened at the first call."""
    shared = config.compilation_config  # also by what vLLM derives for a part of the model
    _accounts[:] = [(known, one) for known, one in _accounts if known() is not None]
    for known, account in _accounts:
        if known() is shared:
            return account
    settings = Settings.read(config.additional_config[KEY])
    shape = shape_of(config.model_config.hf_text_config)
    choice = settings.choose(shape, config.parallel_config.tensor_parallel_size)
    first = get_tensor_model_parallel_rank() == 0
    log = logger.info if first else None
    account = Account(settings, choice, log, envs.VLLM_LOG_STATS_INTERVAL)
    if first:
        logger.info(
            "sparse_patch: %r in %d layers of %d, for prompts from %d tokens on",
            choice.method, len(choice.layers - choice.dense), shape["layers"], settings.min_length,
        )  # fmt: skip
    _accounts.append((weakref.ref(shared), account))
    return account


def layer_of(impl: Any, name: str, account: Account, window: int | None) -> EngineLayer | None:
    """What is known of a layer; None: it is none of those asked for, or no decoder layer.

    Args:
        impl: vLLM's, of the layer of this name (`model.layers.7.self_attn.attn`).
        window: keys that a row sees, itself among them; None: all.
    """
    if impl.attn_type != AttentionType.DECODER:
        return None
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    state = account.state(numbers[0]) if numbers else None
    if state is None:
        return None
    reason = None
    if impl.alibi_slopes is not None:
        reason = "position bias"
    elif impl.kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        reason = "cache"
    sinks = None if impl.sinks is None else impl.sinks.detach()
    call = Call(scale=impl.scale, softcap=impl.logits_soft_cap or None, sinks=sinks)
    owns = impl.kv_sharing_target_layer_name is None
    return EngineLayer(state, call, impl.num_kv_heads, window, reason, owns)


def try_out(account: Account, impl: Any, dtype: torch.dtype) -> None:
    """Run the method and the op once on heads as these, which also compiles what they need: now
    rather than in the first request.

    Raises:
        ValueError: the method does not go with them.
    """
    shape = impl.num_heads, impl.num_kv_heads, impl.head_size, dtype
    sparse = account.choice.layers - account.choice.dense
    if shape in account.tried or not sparse:
        return
    account.tried.add(shape)
    method = account.choice.of_layer(min(sparse))
    assert method is not None
    device = current_platform.device_type
    q = torch.ones(impl.num_heads, _TRIAL, impl.head_size, dtype=dtype, device=device)
    k = torch.ones(impl.num_kv_heads, _TRIAL, impl.head_size, dtype=dtype, device=device)
    plan = method.plan(q, k, scale=impl.scale, q_offset=0) or keeps_all(_TRIAL, _TRIAL)
    block_sparse_attention(q, k, k, plan, scale=impl.scale, backend=account.settings.backend)


def pieces_in(metadata: Any) -> list[Piece]:
    """The sequences of a step, found once for all of its layers."""
    known: list[Piece] | None = getattr(metadata, "sparse_patch_pieces", None)
    if known is None:
        known = pieces_of(metadata.query_start_loc.tolist(), metadata.seq_lens.tolist())
        metadata.sparse_patch_pieces = known
    return known


class SparseForward:
    """To stand before a vLLM implementation of attention: takes the sequences that run sparse out
    of a step, and leaves the rest to it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        config = get_current_vllm_config()
        self.account = account_of(config)
        self.dtype = config.model_config.dtype
        self.own: EngineLayer | None = None
        self.unpack: Unpack | None = None
        self.seen = False
        try_out(self.account, self, self.dtype)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *more: Any,
        **options: Any,
    ) -> Tensor:
        """See vLLM's: query and output are `[tokens, heads, dim]`, the cache is
        `[blocks, kv_heads, block, 2 * dim]`."""
        attend: Callable[..., Tensor] = super().forward  # type: ignore[misc]
        whole = layer, query, key, value, kv_cache, attn_metadata, output
        if attn_metadata is None:  # in a warm-up
            return attend(*whole, *more, **options)
        if not self.seen:
            self._meet(layer, kv_cache)
        left = pieces = pieces_in(attn_metadata)
        if self.own is not None:
            pages = None
            if self.unpack is not None:
                pages = Pages(kv_cache, self.unpack, attn_metadata.block_table)
            reason = self.why_all_exact(attn_metadata)
            left = self.own.attend(pieces, query, key, value, pages, output, reason)
            self.account.tick()
        if len(left) == len(pieces):
            return attend(*whole, *more, **options)
        if left:
            rows = rows_of(left, query.device)
            out = torch.empty_like(output[rows])
            part = self._part(layer, attn_metadata, left)
            attend(layer, query[rows], key, value, kv_cache, part, out, *more, **options)
            output[rows] = out
        return output

    def _meet(self, layer: Any, kv_cache: Tensor) -> None:
        """Learn what is not known before the first step."""
        self.own = layer_of(self, layer.layer_name, self.account, self.window())
        if self.own is not None and self.own.always_exact != "cache":
            self.unpack = self.find_unpack(layer, kv_cache)
        self.seen = True

    def _part(self, layer: Any, metadata: Any, pieces: Sequence[Piece]) -> Any:
        """The metadata of a part of a step, made once for all layers that ask alike."""
        parts = metadata.__dict__.setdefault("sparse_patch_parts", {})
        key = tuple(piece.index for piece in pieces), *self.part_key()
        if key not in parts:
            device, starts = metadata.seq_lens.device, metadata.query_start_loc
            index = torch.tensor([piece.index for piece in pieces], device=device)
            part = dataclasses.replace(
                metadata,
                num_actual_tokens=sum(piece.q_len for piece in pieces),
                max_query_len=max(piece.q_len for piece in pieces),
                max_seq_len=max(piece.kv_len for piece in pieces),
                query_start_loc=torch.tensor(starts_of(pieces), dtype=starts.dtype, device=device),
                seq_lens=metadata.seq_lens[index],
                block_table=metadata.block_table[index],
            )
            parts[key] = self.finish_part(layer, part, len(pieces))
        return parts[key]

    def window(self) -> int | None:
        """Keys that a row sees, itself among them; None: all."""
        raise NotImplementedError

    def find_unpack(self, layer: Any, kv_cache: Tensor) -> Unpack | None:
        """How the cache is read; None: it is not."""
        raise NotImplementedError

    def why_all_exact(self, metadata: Any) -> str | None:
        """A reason why nothing in this step runs sparse."""
        raise NotImplementedError

    def part_key(self) -> tuple[Any, ...]:
        """What `finish_part` depends on beside the sequences."""
        return ()

    def finish_part(self, layer: Any, part: Any, sequences: int) -> Any:
        """The metadata of a part, with what depends on the engine."""
        raise NotImplementedError
