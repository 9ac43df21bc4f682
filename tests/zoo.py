"""Tiny random fp32 models of many families, for the tests that patch real Transformers code.

What an attention patch must survive differs by family (grouped heads, sliding or chunked windows,
soft-capping, sinks, NoPE layers, value heads narrower than key heads, routed experts), so the test
matrix runs over one small model of each kind. Everything is built from a config: no network.

The default initialisation (0.02) gives nearly uniform attention, under which a wrong mask or a
dropped key hardly moves the logits. These models use larger weights, so that attention is peaked,
and values for which every special feature matters on a prompt of 40 tokens. Token 0 is the
padding and 2 would be the end of the text, but generation never stops early.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedConfig, PreTrainedModel

Builder = Callable[[], PreTrainedModel]

LAYERS = 4
SPARSE_LAYERS = {
    "mistral_swa": 0,
    "gemma2": 2,
    "gpt_oss": 2,
    "gemma3": 2,
    "cohere2": 2,
}
"""Of the families in which some layers slide, which run exact; a chunk is a sequence of its own."""

CHUNKED_LAYERS = {"llama4_text": 2}
"""Those that cut a row into chunks, all of which are calls."""

WINDOW = 8
"""Keys a sliding layer sees."""
CHUNK = 16
"""Keys in one chunk of a chunked layer."""

PADS = 13
"""Left of the first row of a `batch`."""

_SLIDING_THEN_FULL = ["sliding_attention", "full_attention"] * 2

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}

_GEMMA3 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "layer_types": _SLIDING_THEN_FULL,
}

_MLA_MOE = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "initializer_range": 0.18,
}


class NoSuchFamily(LookupError):
    """The Transformers that is installed is too old for a family."""


def _family(
    prefix: str, model: str = "ForCausalLM", config: str = "Config", **options: Any
) -> Builder:
    """A builder of `prefix + model` from `prefix + config`; `options` override the common sizes."""

    def build() -> PreTrainedModel:
        if not hasattr(tf, prefix + config):
            raise NoSuchFamily(f"Transformers {tf.__version__} has no {prefix + config}")
        settings = getattr(tf, prefix + config)(**{**COMMON, **options})
        return getattr(tf, prefix + model)(settings)

    return build


def _gemma3_vlm() -> PreTrainedModel:
    """Images of 16x16 pixels, each of which takes 4 `image_token_id` (5) in the prompt."""
    vision = tf.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    text = tf.Gemma3TextConfig(**{**COMMON, **_GEMMA3})
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=4,
            boi_token_index=3,
            eoi_token_index=4,
            image_token_index=5,
            initializer_range=0.2,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )


FAMILIES: dict[str, Builder] = {
    "llama": _family("Llama"),
    "qwen2": _family("Qwen2"),
    "qwen3": _family("Qwen3", head_dim=16),
    "mistral": _family("Mistral", sliding_window=None),
    "mistral_swa": _family("Mistral", sliding_window=WINDOW),
    "gemma2": _family(
        "Gemma2",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        attn_logit_softcapping=4.0,
    ),
    "gemma3": _family("Gemma3", config="TextConfig", **_GEMMA3),
    "phi3": _family("Phi3"),
    "glm4": _family("Glm4", head_dim=16),
    "gpt_oss": _family(
        "GptOss",
        head_dim=16,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "olmo2": _family("Olmo2"),
    "granite": _family("Granite", attention_multiplier=0.4, residual_multiplier=0.5),
    "cohere2": _family(
        "Cohere2", logit_scale=1.0, sliding_window=WINDOW, layer_types=_SLIDING_THEN_FULL
    ),
    "smollm3": _family("SmolLM3", no_rope_layer_interval=2),
    "qwen3_moe": _family(
        "Qwen3Moe", head_dim=16, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2
    ),
    "mixtral": _family("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": _family("DeepseekV3", **_MLA_MOE),
    "llama4_text": _family(
        "Llama4",
        config="TextConfig",
        head_dim=16,
        intermediate_size=64,
        intermediate_size_mlp=128,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=2,
        attention_chunk_size=CHUNK,
        use_qk_norm=False,
    ),
}
"""Causal models that a patch must handle."""

EXTRA_FAMILIES: dict[str, Builder] = {
    "gpt_neox": _family("GPTNeoX", num_key_value_heads=4),
    "opt": _family(
        "OPT", num_key_value_heads=4, ffn_dim=128, word_embed_proj_dim=64, init_std=0.12
    ),
    # Its last two layers take over the keys of earlier ones, and cut the mask to the last rows.
    "gemma4": _family(
        "Gemma4",
        config="TextConfig",
        head_dim=16,
        global_head_dim=16,
        sliding_window=WINDOW,
        layer_types=_SLIDING_THEN_FULL,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=16,
    ),
    "falcon": _family(
        "Falcon", num_key_value_heads=4, num_kv_heads=2, new_decoder_architecture=True
    ),
    "gemma3_vlm": _gemma3_vlm,
    # With few index heads, ReLU leaves many keys at exactly 0 and top-k breaks the ties by chance.
    "deepseek_v32": _family(
        "DeepseekV32", **_MLA_MOE, index_topk=8, index_head_dim=16, index_n_heads=8
    ),
    "t5": _family(
        "T5",
        model="ForConditionalGeneration",
        num_key_value_heads=4,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=4,
        num_heads=4,
        decoder_start_token_id=0,
    ),
}
"""Models outside the matrix: other position encodings, a vision tower, and ones to refuse."""


@torch.no_grad()
def sharpen(model: PreTrainedModel) -> None:
    """Move parameters that the initialiser leaves constant or too small, and tame the logits."""
    for name, weight in model.named_parameters():
        if name.endswith("q_norm.weight"):  # otherwise the norm undoes the large projections
            weight += 1.5
        elif name.endswith("sinks"):
            weight.normal_(1.0, 1.0)
        elif name.endswith(("bias", "mm_input_projection_weight")):
            weight.normal_(0.0, 0.2)
    # Logits of magnitude 1: a tolerance in absolute terms then means the same for every family.
    head = getattr(model.get_output_embeddings(), "weight", None)
    if head is not None:
        head /= 5


def tiny_model(name: str, attn_implementation: str = "eager") -> PreTrainedModel:
    """The model `name` of either table: always the same weights, fp32, in evaluation mode.

    Seeds the global generator of torch.
    """
    try:
        return build(name, attn_implementation)
    except NoSuchFamily as reason:
        import pytest  # what is not a test calls `build`

        pytest.skip(str(reason))


def build(name: str, attn_implementation: str = "eager") -> PreTrainedModel:
    """As `tiny_model`, but raises NoSuchFamily where that skips the test."""
    torch.manual_seed(0)
    model = (FAMILIES | EXTRA_FAMILIES)[name]().eval()
    sharpen(model)
    if attn_implementation != "eager":
        model.set_attn_implementation(attn_implementation)
    model.generation_config.eos_token_id = None
    return model


def batch(length: int = 40) -> dict[str, torch.Tensor]:
    """Inputs of a forward of two rows, `[2, length]` each; the first is short by `PADS`."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(6, 128, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :PADS], mask[0, :PADS] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@torch.no_grad()
def logits(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """float32 `[batch, seq, vocabulary]`"""
    return model(**inputs).logits


def snapshot(model: PreTrainedModel) -> tuple[dict[str, Any], ...]:
    """All attributes of all modules, and the attention names of all configs."""
    keys = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    names = {
        name: module.config._attn_implementation
        for name, module in model.named_modules()
        if isinstance(getattr(module, "config", None), PreTrainedConfig)
    }
    return keys, hooks, names
