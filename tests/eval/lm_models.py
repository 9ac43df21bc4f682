"""A tiny model on disk for the lm-eval tests, and requests for it.

Byte-level tokens. "!" is token 0 and the padding at once: what tells padding by its token fails.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPARSE = {
    "method": "a_shape:sink=4;window=16;block_size=16",
    "min_length": 0,
    "min_queries": 8,
}
"""Sparse on prompts of a hundred tokens."""

TASKS = Path(__file__).parent / "lm_tasks"

CONTEXTS = [
    "The mill stands by the river! " * 3,
    "!!! The road to the mill " * 6,
    "No lamp.",
    "The wind! The wind! The wind of the north " * 4,
    "The mill stands by the river! " * 3,
]
ANSWERS = [" mill", " a!b", "!", " river and so on", "x"]
PAIRS = [(context, answer) for context in CONTEXTS for answer in ANSWERS] + [("", "No lamp!")]


def save_tiny(folder):
    """4 query and 2 KV heads, so that two processes can share it."""
    vocabulary = {t: n for n, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(token_models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="!", eos_token=backend.id_to_token(255)
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def instances(kind, arguments):
    """lm-eval's requests of one kind; each argument is a tuple."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]
