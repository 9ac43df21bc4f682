"""Real weights through everything that Transformers does with a model.

Where a method keeps everything (`dense`) the answer is that of the model unpatched. Where it does
not, a padded row equals its single run, and what is decoded exactly follows from the prefill. That
calls ran sparse at all is asserted each time.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from transformers import AutoModelForCausalLM, DynamicCache

import sparse_patch
from tests.robustness.real import (
    SPARSE,
    assert_near,
    folder_of,
    part_of,
    states,
)

pytestmark = pytest.mark.network

ROOT = Path(__file__).parents[2]

GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture(params=SPARSE)
def method(request):
    return request.param


def left_padded(rows):
    """ids and mask `[rows, longest]` of token rows."""
    length = max(len(row) for row in rows)
    ids, mask = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
    return ids, {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def rows_of(real):
    return [real.ids(n, start)[0] for n, start in ((560, 0), (97, 900), (300, 300))]


# --- batches -------------------------------------------------------------------------------------


def test_a_batch_of_mixed_lengths_is_that_of_the_model(real):
    ids, extra = left_padded(rows_of(real))
    seen = extra["attention_mask"].bool()
    want = states(real.model, ids, **extra)
    with real.patch("dense") as handle:
        got = states(real.model, ids, **extra)
    assert_near(got[seen], want[seen])
    assert handle.report().sparse_calls >= 3 * real.full_layers


def test_a_padded_row_equals_its_single_run(smollm2, method):
    """In float64: in float32 a batch rounds otherwise, and a close choice may go either way."""
    wide = copy.deepcopy(part_of(smollm2, 2)).double()  # which shares nothing any more
    rows = rows_of(smollm2)
    ids, extra = left_padded(rows)
    with sparse_patch.patch(wide, method, min_length=0, dense_layers=0, **SPARSE[method]) as handle:
        batch = states(wide, ids, **extra)
        assert 0 < handle.report().density < 1
        assert handle.report().sparse_calls >= 2 * 2
        for row, tokens in enumerate(rows):
            assert_near(batch[row, -len(tokens) :], states(wide, tokens[None])[0], 1e-9)


# --- caches --------------------------------------------------------------------------------------


def in_chunks(model, ids, size):
    cache = DynamicCache(config=model.config)
    parts = (ids[:, i : i + size] for i in range(0, ids.shape[1], size))
    return torch.cat([states(model, part, past_key_values=cache) for part in parts], 1)


def test_chunked_prefill_is_that_of_the_model(real):
    ids = real.ids(600)
    want = states(real.model, ids)
    with real.patch("dense") as handle:
        assert_near(in_chunks(real.model, ids, 256), want)
    assert handle.report().sparse_calls >= 3 * real.full_layers


@pytest.mark.parametrize("method", ["flexprefill", "hip"])
def test_chunked_prefill_chooses_in_every_chunk(real, method):
    """A chunk chooses by its own queries among all keys so far: the first as if it were alone, and
    every other as any prefill that goes on from the same cache."""
    ids = real.ids(600)
    with real.patch(method) as handle:
        chunks = in_chunks(real.model, ids, 300)
        assert handle.report().sparse_calls >= 2 * real.full_layers
        assert handle.report().density < 1
        assert torch.equal(chunks[:, :300], states(real.model, ids[:, :300]))
        assert torch.equal(chunks, in_chunks(real.model, ids, 300))
    full = states(real.model, ids)
    assert not torch.equal(chunks, full)
    assert float(torch.cosine_similarity(chunks, full, dim=2).mean()) > 0.9


def chat(real, turns=5):
    """The tokens that five turns with one cache get for an answer."""
    cache, said = DynamicCache(config=real.model.config), real.ids(0)
    answers = []
    for turn in range(turns):
        said = torch.cat([said, real.ids(100, 100 * turn)], 1)
        said = real.model.generate(said, past_key_values=cache, do_sample=False, max_new_tokens=4)
        answers.append(said[:, -4:])
    return torch.cat(answers, 1)


def test_a_chat_of_five_turns_is_that_of_the_model(whole_smollm2):
    want = chat(whole_smollm2)
    with whole_smollm2.patch("dense") as handle:
        assert torch.equal(chat(whole_smollm2), want)
    assert handle.report().sparse_calls == 5 * 30


def test_a_chat_of_five_turns_runs_sparse(real):
    with real.patch("hip") as handle:
        first = chat(real)
        report = handle.report()
        assert torch.equal(chat(real), first)  # nothing of the first chat is left
    assert report.sparse_calls >= 5 * real.full_layers
    assert report.density < 1
    assert report.decode_calls > 0


BEAMS = {"do_sample": False, "max_new_tokens": 6, "num_beams": 2}


def test_beams_are_those_of_the_model(real):
    want = real.model.generate(real.ids(520), **BEAMS)
    with real.patch("dense") as handle:
        assert torch.equal(real.model.generate(real.ids(520), **BEAMS), want)
    assert handle.report().sparse_calls >= real.full_layers


@pytest.mark.parametrize("method", ["flexprefill", "hip"])
def test_beams_run_sparse(smollm2, method):
    """Beams change places between steps, and with them what a decode step remembers."""
    with smollm2.patch(method) as handle:
        first = smollm2.model.generate(smollm2.ids(520), **BEAMS)
        assert torch.equal(smollm2.model.generate(smollm2.ids(520), **BEAMS), first)
    assert handle.report().sparse_calls >= 2 * smollm2.full_layers
    assert handle.report().decode_calls > 0 or method != "hip"


def test_a_static_cache_is_exact(real):
    options = {**GREEDY, "cache_implementation": "static"}
    want = real.model.generate(real.ids(600), **options)
    with real.patch("flexprefill") as handle:
        got = real.model.generate(real.ids(600), **options)
    assert torch.equal(got, want)
    assert handle.report().exact["mask"] >= real.full_layers
    assert handle.report().sparse_calls == 0


@pytest.mark.parametrize("assistant", ["another model", "prompt lookup"])
def test_speculative_decoding_says_what_plain_decoding_says(smollm2, assistant):
    with smollm2.patch("flexprefill") as handle:
        plain = smollm2.model.generate(smollm2.ids(600), **GREEDY)
        before = handle.report()
        more = {"prompt_lookup_num_tokens": 3}
        if assistant == "another model":
            more = {"assistant_model": part_of(smollm2, 3)}
            sparse_patch.unpatch(more["assistant_model"])
        got = smollm2.model.generate(smollm2.ids(600), **GREEDY, **more)
        after = handle.report()
    assert torch.equal(got, plain)
    assert before.density < 1
    assert after.sparse_calls == 2 * before.sparse_calls == 2 * smollm2.full_layers
    assert after.exact["few queries"] > 0


# --- weights -------------------------------------------------------------------------------------


def both_ways(model, ids, tolerance=1e-4):
    """A model of other weights: `dense` is itself, another method runs sparse, undo is exact."""
    want = states(model, ids)
    with sparse_patch.patch(model, "dense", block_size=32, min_length=0) as handle:
        assert_near(states(model, ids), want, tolerance)
    assert handle.report().sparse_calls == len(model.model.layers)
    with sparse_patch.patch(model, "flexprefill", min_length=0, **SPARSE["flexprefill"]) as handle:
        assert bool(torch.isfinite(states(model, ids)).all())
    assert handle.report().sparse_calls == len(model.model.layers)
    assert handle.report().density < 1
    assert torch.equal(states(model, ids), want)


def test_packed_gguf_weights(smollm2):
    """As `GgufConfig(dequantize=False)` leaves them; of a file Transformers 5.23 does so for
    Qwen3.5 and LFM2 only, and unpacks all others, so the layers are packed here."""
    layers = pytest.importorskip("transformers.integrations.gguf.utils")
    kind = GGMLQuantizationType.Q8_0
    model = part_of(smollm2, 3)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    packed = layers.GgufLinear(linear.in_features, linear.out_features, kind)
                    blocks = quantize(linear.weight.detach().numpy(), kind)
                    packed.weight.data = torch.from_numpy(blocks)
                    setattr(parent, name, packed)
    both_ways(model, smollm2.ids(300))  # decode steps need a kernel from the hub


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_weights(smollm2, bits):
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder_of("smollm2"), quantization_config=config, device_map="cpu", num_hidden_layers=3
    )
    assert f"Linear{bits}bit" in type(model.model.layers[0].self_attn.q_proj).__name__
    # On a CPU the products of 4 bits round to bfloat16.
    both_ways(model.eval(), smollm2.ids(400), 1e-2 if bits == 4 else 1e-4)


# --- compiling, training, copies -----------------------------------------------------------------


@pytest.mark.wide
def test_a_compiled_model_runs_sparse():
    folders = (ROOT, ROOT / "kernels", ROOT / "eval", os.environ.get("PYTHONPATH", ""))
    path = os.pathsep.join(map(str, folders))
    command = [sys.executable, "-m", "tests.robustness.compiled_model"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_training_with_gradient_checkpointing_is_that_of_the_model(real):
    model = part_of(real, 2 if real.name == "smollm2" else 6)
    model.get_input_embeddings().weight.requires_grad_(False)  # shared, and large
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    ids = real.ids(300)

    def gradients():
        model.zero_grad()
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        hidden.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    with sparse_patch.patch(model, "flexprefill", min_length=0, **SPARSE["flexprefill"]) as handle:
        got = gradients()
    assert len(want) > 10
    for name, gradient in want.items():
        assert_near(got[name], gradient, 1e-3)
    assert handle.report().sparse_calls == 0
    assert set(handle.report().exact) <= {"training", "gradients"}
    real.model.get_input_embeddings().weight.requires_grad_(True)


def test_a_saved_model_is_the_plain_one(real, tmp_path):
    with real.patch("flexprefill"):
        states(real.model, real.ids(600))
        real.model.save_pretrained(tmp_path)
    assert "sparse_patch" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert real.is_as_loaded(again)


def test_a_deepcopy_is_patched_and_counts_for_itself(real):
    with real.patch("hip") as handle:
        want = states(real.model, real.ids(600))
        clone = copy.deepcopy(real.model)
        assert torch.equal(states(clone, real.ids(600)), want)
        assert sparse_patch.report(clone).sparse_calls == 2 * handle.report().sparse_calls > 0
        sparse_patch.unpatch(clone)
        assert real.is_as_loaded(clone)
        assert torch.equal(states(real.model, real.ids(600)), want)
