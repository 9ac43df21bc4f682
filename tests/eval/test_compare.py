"""What one comparison measures, against direct computations on a tiny model."""

import copy

import pytest
import torch
from sparse_patch_eval.ask.kl import kl_divergence
from sparse_patch_eval.ask.prefill import prefill
from sparse_patch_eval.inputs.text import encode
from study.compare import (
    compare,
    dense_baseline,
    kl_rows,
    next_token_nll,
    score_needle,
)
from study.needles import needle_prompt, needle_prompts
from study.tuning import capture_layers, mean_density, tuning_layers

import sparse_patch
from sparse_patch import get_method


@pytest.fixture(scope="module")
def walks(folder):
    return (folder / "walks.txt").read_text()


@pytest.fixture(scope="module")
def prompt(tiny, walks):
    return needle_prompt(tiny[1], 1100, text=walks, keys=8, scored=60, seed=2)


@pytest.fixture(scope="module")
def dense(tiny, prompt):
    return dense_baseline(*tiny, prompt, [0, 1])


@torch.no_grad()
def test_dense_numbers_are_those_of_the_plain_model(tiny, prompt, dense):
    model, tokenizer = tiny
    logits = model(prompt.input_ids).logits[0]
    torch.testing.assert_close(dense.logits, logits[prompt.scored], atol=1e-5, rtol=1e-4)
    losses = -logits[:-1].log_softmax(-1).gather(1, prompt.input_ids[0, 1:, None])[:, 0]
    assert dense.row["nll"] == pytest.approx(float(losses[prompt.scored].mean()), rel=1e-4)
    scores = []
    for number in (prompt.answer, *prompt.others):
        ids = torch.tensor([encode(tokenizer, f" {number}")])
        whole = model(torch.cat([prompt.input_ids, ids], 1)).logits[0, 1099:-1]
        scores.append(float(whole.log_softmax(-1).gather(1, ids[0, :, None]).mean()))
    assert dense.row["needle_nll"] == pytest.approx(-scores[0], rel=1e-4)
    assert dense.row["margin"] == pytest.approx(scores[0] - max(scores[1:]), abs=1e-4)


def test_a_method_that_keeps_everything_changes_nothing(tiny, prompt, dense):
    row = compare(*tiny, prompt, get_method("dense"), dense, rows=128)
    assert row["density"] == 1
    assert row["exact"] == 0
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert row["recall"] == pytest.approx(1, abs=1e-5)
    assert row["error"] == pytest.approx(0, abs=1e-5)
    for key in ("nll", "needle_nll", "margin"):
        assert row[key] == pytest.approx(dense.row[key], abs=1e-4)


def test_a_method_that_runs_exact_counts_as_everything(tiny, prompt, dense):
    row = compare(*tiny, prompt, get_method("a_shape"), dense, rows=128)
    assert (row["density"], row["exact"], row["recall"], row["error"]) == (1, 1, 1, 0)


@torch.no_grad()
def test_a_sparse_prefill_is_measured_whole_prompt_sparse_and_decoding_exact(tiny, prompt, dense):
    model, tokenizer = tiny
    method = get_method("a_shape", sink=4, window=32)
    row = compare(model, tokenizer, prompt, method, dense, rows=128)
    with sparse_patch.patch(model, method, min_length=0):
        out = model(prompt.input_ids, use_cache=True)
    kl = kl_rows(dense.logits, out.logits[0, prompt.scored])
    assert row["kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert row["kl"] > 1e-4
    ids = torch.tensor([encode(tokenizer, f" {prompt.answer}")])
    steps = model(ids[:, :-1], past_key_values=out.past_key_values).logits[0]
    logits = torch.cat([out.logits[0, -1:], steps])
    nll = -logits.log_softmax(-1).gather(1, ids[0, :, None]).mean()
    assert row["needle_nll"] == pytest.approx(float(nll), rel=1e-4)
    assert 0 < row["density"] < 0.3
    assert 0 < row["recall"] < 1
    assert row["error"] > 0.05


def test_layers_that_run_exact_raise_the_density_to_one(tiny, prompt, dense):
    both = compare(*tiny, prompt, get_method("a_shape", sink=4, window=32), dense, rows=64)
    method = get_method("a_shape", sink=4, window=32, dense_layers=1)
    half = compare(*tiny, prompt, method, dense, rows=64)
    assert half["density"] == pytest.approx((1 + both["density"]) / 2)
    assert half["exact"] == 0.5


def test_scoring_a_needle_leaves_the_cache_as_it_was(tiny, prompt):
    model, tokenizer = tiny
    start = prefill(model, prompt.input_ids)
    before = copy.deepcopy(start.cache.layers[1].keys)
    once = score_needle(model, tokenizer, prompt, start.logits, start.cache)
    assert torch.equal(start.cache.layers[1].keys, before)
    assert score_needle(model, tokenizer, prompt, start.logits, start.cache) == once


@torch.no_grad()
def test_right_is_what_greedy_decoding_writes(tiny, walks):
    """A model that says what it said before, whatever is asked: its own output is the answer."""
    model, tokenizer = tiny
    prompt = needle_prompt(tokenizer, 700, text=walks, keys=1, scored=20)
    start = prefill(model, prompt.input_ids)
    assert not score_needle(model, tokenizer, prompt, start.logits, start.cache)["right"]
    ids = encode(tokenizer, f" {prompt.answer}")
    wish = torch.full((256,), -1.0)
    calls = []

    class Parrot:
        def __call__(self, tokens, **_):
            calls.append(tokens)
            logits = wish.repeat(1, tokens.shape[1], 1)
            for n in range(tokens.shape[1]):
                logits[0, n, ids[n + 1]] = 5.0
            return type("Out", (), {"logits": logits})

    class Cache:
        def crop(self, count):
            assert count == 1 - len(ids)

    first = wish.clone()
    first[ids[0]] = 5.0
    got = score_needle(Parrot(), tokenizer, prompt, first, Cache())
    assert got["right"]
    assert got["margin"] > 0
    assert len(calls) == 8


def test_kl_of_rows_is_kl_of_each():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 7, generator=g), torch.randn(300, 7, generator=g)
    want = [kl_divergence(p, q) for p, q in zip(a, b, strict=True)]
    torch.testing.assert_close(kl_rows(a, b), torch.tensor(want), atol=1e-6, rtol=1e-4)


def test_nll_reads_the_token_after_each_scored_position(prompt):
    logits = torch.zeros(60, 256)
    logits[torch.arange(60), prompt.input_ids[0, prompt.scored.start + 1 :][:60]] = 50.0
    assert next_token_nll(logits, prompt) == pytest.approx(0, abs=1e-6)


# --- tuning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4, 6])
def test_every_layer_is_tuned_on_one_prompt_of_each_text(tiny, walks, count):
    texts = {"a": walks[:90000], "b": walks[90000:]}
    prompts = needle_prompts(tiny[1], 900, count, texts=texts, scored=20)
    layers = tuning_layers(30, prompts)
    for text in texts:
        mine = [n for p, some in zip(prompts, layers, strict=True) if p.text == text for n in some]
        assert sorted(mine) == list(range(30))
    with pytest.raises(ValueError, match="5 tuning prompts cannot take 2 texts"):
        tuning_layers(30, needle_prompts(tiny[1], 900, 5, texts=texts, scored=20))


def test_the_density_tuned_is_the_one_a_patched_model_reports(tiny, prompt):
    captured = list(capture_layers(tiny[0], [prompt]))
    assert [sorted(inside) for inside in captured] == [[0, 1]]
    spec = "proxyattn:min_budget=64,gamma=0.7,block_size=64,dense_layers=1"
    method = get_method("proxyattn", min_budget=64, gamma=0.7, block_size=64, dense_layers=1)
    with sparse_patch.patch(tiny[0], method, min_length=0) as handle:
        prefill(tiny[0], prompt.input_ids)
    assert mean_density(spec, captured) == pytest.approx((1 + handle.report().density) / 2)
