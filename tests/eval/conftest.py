"""A tiny local model with a byte-level tokenizer, and the scripts as modules."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with a byte-level tokenizer, and a text file beside it."""
    path = tmp_path_factory.mktemp("eval")
    vocabulary = {t: n for n, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(token_models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(path / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path / "model")
    (path / "prose.txt").write_text("It was a bright cold day in April. " * 400)
    # Long, and no sentence twice: for prompts that share nothing.
    walks = (f"Traveller {n} walked past the {n * 7}th mill and slept." for n in range(3000))
    (path / "walks.txt").write_text("\n".join(walks))
    return path


@pytest.fixture(scope="module")
def tiny(folder):
    """The model and its tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    return LlamaForCausalLM.from_pretrained(folder / "model").eval(), tokenizer


@pytest.fixture(scope="session")
def script():
    """Loads a script by its name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return load
