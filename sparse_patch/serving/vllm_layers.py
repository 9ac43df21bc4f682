"""What our backends for vLLM have in common: whose layers they are, and what is known of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from sparse_patch_kernels import block_sparse_attention
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType

from ..call import Call
from ..costs import keeps_all
from ..profiles import shape_of
from .account import Account
from .batch import Piece, pieces_of
from .layer import EngineLayer
from .settings import KEY, Settings

logger = init_logger("vllm.sparse_patch")

# The accounts of the engines in this process, by configuration (which cannot be hashed).
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
    _accounts[:] = [(known, one) for known, one in _accounts if known() is not None]
    for known, account in _accounts:
        if known() is config:
            return account
    settings = Settings.read(config.additional_config[KEY])
    shape = shape_of(config.model_config.hf_text_config)
    choice = settings.choose(shape, config.parallel_config.tensor_parallel_size)
    first = get_tensor_model_parallel_rank() == 0
    account = Account(settings, choice, log=logger.info if first else None)
    if first:
        logger.info(
            "sparse_patch: %r in %d layers of %d, for prompts from %d tokens on",
            choice.method, len(choice.layers - choice.dense), shape["layers"], settings.min_length,
        )  # fmt: skip
    _accounts.append((weakref.ref(config), account))
    return account


def layer_of(impl: Any, name: str, account: Account, window: int | None) -> EngineLayer | None:
    """What is known of a layer; None: it is none of those asked for, or no decoder layer.

    Args:
        impl: vLLM's, of the layer of this name.
        window: keys that a row sees, itself among them; None: all.
    """
    if impl.attn_type != AttentionType.DECODER:
        return None
    state = account.state(extract_layer_index(name))
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


def part_in(metadata: Any, pieces: Sequence[Piece], window: Any, make: Any) -> Any:
    """The metadata of a part of a step, made once for all layers with that window."""
    parts = metadata.__dict__.setdefault("sparse_patch_parts", {})
    key = tuple(piece.index for piece in pieces), window
    if key not in parts:
        parts[key] = make()
    return parts[key]
