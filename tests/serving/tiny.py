"""Tiny random models of families that differ in attention, as folders that vLLM loads."""

from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.zoo import COMMON, sharpen

WINDOW = 100
_LAYER_TYPES = ["sliding_attention", "full_attention"] * 2
_GEMMA: dict[str, Any] = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": WINDOW,
    "layer_types": _LAYER_TYPES,
    "tie_word_embeddings": True,  # as vLLM takes them
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "Config", {}),
    "qwen3": ("Qwen3", "Config", {"head_dim": 32, "num_key_value_heads": 1}),
    "mistral_swa": ("Mistral", "Config", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2", "Config", {**_GEMMA, "attn_logit_softcapping": 4.0}),
    "gemma3": ("Gemma3", "TextConfig", _GEMMA),
    "gpt_oss": (
        "GptOss",
        "Config",
        {
            "head_dim": 32,
            "sliding_window": WINDOW,
            "layer_types": _LAYER_TYPES,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
    ),
}


def save(family: str, folder: Path) -> str:
    """Build the model, always with the same weights, and return its folder's name."""
    prefix, config, options = FAMILIES[family]
    torch.manual_seed(0)
    settings = getattr(tf, prefix + config)(**{**COMMON, "hidden_size": 128, **options})
    model = getattr(tf, prefix + "ForCausalLM")(settings).eval()
    sharpen(model)
    model.save_pretrained(folder)
    return str(folder)


def prompts(*lengths: int) -> list[dict[str, list[int]]]:
    """Random tokens, as vLLM takes them."""
    generator = torch.Generator().manual_seed(1)
    return [
        {"prompt_token_ids": torch.randint(6, 128, (n,), generator=generator).tolist()}
        for n in lengths
    ]
