"""Which families there are, and a tiny random model of each.

A family is a model type that Transformers maps to a causal model, or to a model of images and text,
of which the text decoder is what counts. Sizes are given by the names of a config's fields, which
most families share. What does not fit is in `OVERRIDES`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import torch
import transformers as tf
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

_ZOO = importlib.import_module("tests.zoo")

# A model of more parameters means that some size was not found.
MOST_PARAMETERS = 20_000_000

# Keys that a layer sees, by the names of the fields that say so.
WINDOWS: dict[str, int] = {
    "sliding_window": _ZOO.WINDOW,
    "sliding_window_size": _ZOO.WINDOW,
    "attention_window_size": _ZOO.WINDOW,
    "window_size": _ZOO.WINDOW,
    "local_attention": 2 * _ZOO.WINDOW,  # of which one half is to the left
    "attention_chunk_size": _ZOO.CHUNK,
}
# Of a family's second model: wider than every prompt.
WIDE = dict.fromkeys(WINDOWS, 512)

# Fields that hold a kind for each layer.
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")


def _each(value: Any, names: str) -> dict[str, Any]:
    """Fields, by names with blanks between, that have the same value."""
    return dict.fromkeys(names.split(), value)


# Values by the name of a field. A config gets those that it has.
SIZES: dict[str, Any] = {
    # What every decoder of the tests has.
    **{name: x for name, x in _ZOO.COMMON.items() if name != "attn_implementation"},
    "head_dim": 16,
    "init_std": 0.12,
    "is_decoder": True,  # of encoders that can be either
    # Other names for the same. Encoders have as many layers as decoders: caches are for these.
    **_each(64, "d_model n_embd emb_dim embedding_size word_embed_proj_dim input_embedding_size"),
    **_each(64, "output_embedding_size embed_dim projection_dim max_source_positions"),
    **_each(4, "n_layer n_layers num_layers n_head n_heads num_heads attention_heads layers"),
    **_each(4, "encoder_layers decoder_layers num_encoder_layers num_decoder_layers"),
    **_each(4, "encoder_attention_heads decoder_attention_heads"),
    **_each(4, "num_encoder_attention_heads num_decoder_attention_heads"),
    **_each(2, "depth"),
    **_each(16, "d_head d_kv dim_head kv_channels rotary_dim"),
    **_each(512, "n_positions n_ctx max_seq_len max_target_positions"),
    **_each(128, "ffn_dim d_ff dff d_inner dim_ff n_inner mlp_dim ffn_hidden_size"),
    **_each(128, "encoder_ffn_dim decoder_ffn_dim"),
    # Routed experts.
    **_each(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_each(2, "num_experts_per_tok moe_topk moe_k top_k_experts"),
    **_each(1, "n_group topk_group first_k_dense_replace num_dense_layers zero_expert_num"),
    **_each(64, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size"),
    **_each(64, "shared_experts_intermediate_size moe_shared_expert_intermediate_size"),
    **_each(64, "shared_intermediate_size"),
    **_each(128, "dense_intermediate_size prefix_dense_intermediate_size intermediate_size_mlp"),
    "router_hidden_size": 16,
    # Latent attention.
    **_each(32, "q_lora_rank kv_lora_rank o_lora_rank"),
    **_each(16, "qk_nope_head_dim v_head_dim index_head_dim"),
    **_each(8, "qk_rope_head_dim index_topk index_n_heads"),
    # Windows, and heads of layers that have one.
    **WINDOWS,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 4.0,
    # Recurrent layers.
    **_each(16, "mamba_d_state mamba_head_dim mamba_chunk_size ssm_state_size state_size"),
    **_each(16, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
    **_each(4, "mamba_n_heads n_mamba_heads linear_num_value_heads linear_num_heads"),
    **_each(2, "linear_num_key_heads attn_layer_period"),
    **_each(1, "n_groups attn_layer_offset"),
    "mamba_num_heads": 8,
    "mamba_d_ssm": 128,
    "mamba_d_head": "auto",
    "lru_width": 64,
    # Ids of images, sounds and the like: none is in a prompt.
    **_each(5, "image_token_id image_token_index"),
    **_each(4, "video_token_id audio_token_id"),
    **_each(3, "boi_token_id boi_token_index eoi_token_id eoi_token_index boa_token_id"),
    **_each(3, "eoa_token_id eoa_token_index vision_start_token_id vision_end_token_id"),
    **_each(2, "sep_token_id"),
    **_each(1, "decoder_start_token_id cls_token_id"),
    # Towers, which a prompt of text does not enter.
    **_each(64, "out_hidden_size text_hidden_size adapter_in_dim adapter_input_size"),
    **_each(64, "adapter_out_dim projector_hidden_size num_embeddings"),
    **_each(16, "image_size hidden_size_per_layer_input"),
    "patch_size": 4,
    "base_channels": 32,
    "vocab_size_per_layer_input": 128,
}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _mrope(*sections: int) -> dict[str, Any]:
    """Rotary positions of several axes."""
    return {**_ROPE, "mrope_section": list(sections)}


_SLIDING_THEN_FULL = ["sliding_attention", "full_attention"] * 2

# What a family needs besides, by its own name or that of a config within it.
OVERRIDES: dict[str, dict[str, Any]] = {
    **_each({"rope_parameters": _mrope(2, 3, 3)}, "cosmos3_edge_text glm4v_text glm_ocr_text"),
    **_each({"rope_parameters": _mrope(2, 3, 3)}, "paddleocr_vl_text qwen2_5_omni_text"),
    **_each({"rope_parameters": _mrope(2, 3, 3)}, "qwen2_5_vl_text qwen2_vl_text"),
    **_each({"layer_types": ["conv", "full_attention"] * 2}, "lfm2 lfm2_moe"),
    **_each({"num_codebooks": 1}, "musicgen_decoder musicgen_melody_decoder"),
    "bamba": {"attn_layer_indices": [1, 3]},
    "bailing_hybrid": {"layer_group_size": 2},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "chameleon": {"vocabulary_map": {"<image>": 5, "IMGIMGAZ": 4}},
    "cohere_compass_text": {
        "layer_types": _SLIDING_THEN_FULL,
        "rope_parameters": dict.fromkeys(_SLIDING_THEN_FULL, _ROPE),
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"layer_types": ["indexed_attention"] * 4},
    "gemma3n_text": {"layer_types": _SLIDING_THEN_FULL, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "laguna": {"layer_types": _SLIDING_THEN_FULL, "sliding_window": _ZOO.WINDOW},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": _SLIDING_THEN_FULL, "sliding_window": _ZOO.WINDOW},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 1000,
        "split_ngram_parts": 1,
    },
    "reformer": {
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [16, 32],
        "attn_layers": ["local", "lsh"] * 2,
        "is_decoder": True,
    },
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "sliding_window": _ZOO.WINDOW,
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 64]},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [64, 64],
        "rope_parameters": _mrope(3, 3, 2),
    },
    "florence_vision": {
        "depths": [1, 1, 1, 1],
        "embed_dim": [16, 16, 32, 32],
        "num_heads": [2, 2, 2, 2],
        "num_groups": [2, 2, 2, 2],
    },
    "glm4v_moe_text": {"rope_parameters": _mrope(2, 1, 1)},
    "glm5_next_text": {"index_topk": 16, "qk_rope_head_dim": 0, "head_dim": 16},
    "granite4_vision": {"deepstack_layer_map": [], "downsample_rate": "4/8"},
    "hunyuan_vl_text": {"rope_parameters": _mrope(2, 2, 2, 2)},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "molmo2_adapter": {"vision_feature_layer": [1, 2]},
    "muse_spark_audio": {"hidden_sizes": [16, 16, 32, 32]},
    "muse_spark_text": {"moe_hidden_size": 64},
    "radio": {"video_temporal_patch_size": 2},
    "step3p5": {"sliding_window": _ZOO.WINDOW, "layer_types": _SLIDING_THEN_FULL},
    "unlimited_ocr_text": {"num_key_value_heads": 4},
    "xmod": {"default_language": "en_XX"},
}


class NotBuilt(Exception):
    """No tiny model of this family could be built; the text says why."""


def families() -> dict[str, str]:
    """Model type -> name of its class: causal ones, then those of images and text that are left."""
    causal = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return {**modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **causal}


def build(family: str, windows: Mapping[str, int] = WINDOWS) -> tf.PreTrainedModel:
    """A tiny model of a family: always the same weights, float32, in evaluation mode.

    Seeds the global generator of torch.

    Args:
        family: a key of `families()`.
        windows: values of the fields that `WINDOWS` names.

    Raises:
        NotBuilt: a size does not fit, or the model would not be tiny.
    """
    try:
        cls = getattr(tf, families()[family])
        config = _config_of(family, cls, windows)
        with torch.device("meta"):
            size = sum(x.numel() for x in cls(config).parameters())
    except Exception as error:  # whatever a config or a constructor may raise
        raise NotBuilt(f"{type(error).__name__}: {_said(error)}") from error
    if size > MOST_PARAMETERS:
        raise NotBuilt(f"{size:,} parameters where {MOST_PARAMETERS:,} are the most")
    torch.manual_seed(0)
    try:
        model = cls(_config_of(family, cls, windows)).eval()
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {_said(error)}") from error
    _ZOO.sharpen(model)
    return model


def _config_of(family: str, cls: type[Any], windows: Mapping[str, int]) -> Any:
    """As the auto classes do it: a model of text alone takes the part of the config about text."""
    kind = CONFIG_MAPPING[family]
    config = tiny_config(kind, windows)
    parts = [name for name, part in kind.sub_configs.items() if part == cls.config_class]
    return getattr(config, parts[0]) if parts else config


def tiny_config(kind: type[Any], windows: Mapping[str, int]) -> Any:
    """A config of that class with every size replaced that `SIZES` knows, in configs within too."""
    default = kind()
    names = {field.name for field in dataclasses.fields(kind)}
    values = {name: x for name, x in SIZES.items() if name in names}
    given = vars(default)  # asking for it may raise, where layers differ
    for name in WINDOWS:
        if given.get(name) is None:
            values.pop(name, None)  # a family without a window by default gets none
    for name in _KINDS:
        kinds = given.get(name)
        if name in names and isinstance(kinds, list | tuple) and kinds:
            values[name] = (list(dict.fromkeys(kinds)) * _ZOO.LAYERS)[: _ZOO.LAYERS]
    if "kv_lora_rank" in names:  # latent attention has as many heads of keys
        values["num_key_value_heads"] = 4
        values["head_dim"] = values["qk_rope_head_dim"]
    values = {
        name: x
        for name, x in values.items()
        if isinstance(x, list) or not isinstance(given.get(name), list | tuple)
    }
    for name in kind.sub_configs:
        part = given.get(name)
        if isinstance(part, tf.PreTrainedConfig):
            values[name] = tiny_config(type(part), windows)
    values |= OVERRIDES.get(kind.model_type, {})
    values |= {name: x for name, x in windows.items() if values.get(name) is not None}
    return kind(**values)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
