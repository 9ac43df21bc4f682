"""One prefill, and what is asked of it."""

from __future__ import annotations

import pytest
import torch
from sparse_patch_eval.ask.answer import Generation, answer, cut, generate, likelihood
from sparse_patch_eval.ask.prefill import prefill
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from sparse_patch import get_method, patch

PROMPT = [3 + 7 * n % 250 for n in range(600)]


def _whole_log_prob(model, prompt, continuation):
    logits = model(torch.tensor([prompt + continuation])).logits[0].float()
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    picked = rows.gather(1, torch.tensor(continuation)[:, None])
    return float(picked.sum()), bool((rows.argmax(-1) == torch.tensor(continuation)).all())


@torch.inference_mode()
def test_likelihoods_are_those_of_one_forward_over_prompt_and_continuation(tiny):
    model, tokenizer = tiny
    continuations = [[7], [7, 8, 9], [9, 9], PROMPT[:100]]
    found = answer(model, tokenizer, PROMPT, continuations=continuations)
    for (log_prob, greedy), continuation in zip(found.scores, continuations, strict=True):
        expected, is_greedy = _whole_log_prob(model, PROMPT, continuation)
        assert log_prob == pytest.approx(expected, abs=1e-4)
        assert greedy == is_greedy


def test_the_tokens_of_a_long_answer_attend_exactly(tiny):
    model, _ = tiny
    method = get_method("a_shape", sink=4, window=8)
    with patch(model, method, min_length=0) as handle:
        start = prefill(model, torch.tensor([PROMPT]))
        before = handle.report().sparse_calls
        likelihood(model, start, PROMPT[:200])
        assert handle.report().sparse_calls == before == model.config.num_hidden_layers


def test_generation_is_what_transformers_generates_and_leaves_the_scores_alone(tiny):
    model, tokenizer = tiny
    wanted = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False, pad_token_id=0
    )[0, len(PROMPT) :]
    asked = (Generation(6), Generation(6))
    found = answer(model, tokenizer, PROMPT, generations=asked, continuations=[wanted.tolist()])
    text = tokenizer.decode(wanted, skip_special_tokens=True)
    assert found.texts == (text, text)
    assert found.scores[0][1], "the greedy continuation is greedy"


def test_a_stop_text_ends_the_answer_and_is_not_in_it():
    assert cut("1234.\nNext", ["\n"]) == "1234."
    assert cut("1234.\nNext", [".", "\n"]) == "1234"
    assert cut("1234", ["\n"]) == "1234"


def test_the_prompt_is_sparse_and_its_answer_is_not(tiny):
    model, tokenizer = tiny
    method = get_method("a_shape", sink=4, window=8)
    found = answer(
        model,
        tokenizer,
        PROMPT,
        method=method,
        patch_options={"min_length": 0, "min_queries": 8},
        generations=[Generation(3)],
        continuations=[[7, 8]],
        tail=5,
    )
    assert found.tail.shape == (5, 256)
    assert 0 < found.density < 1
    assert found.exact == {}
    assert found.recall is None
    dense = answer(model, tokenizer, PROMPT, continuations=[[7, 8]])
    assert dense.density is None
    assert dense.scores != found.scores


def test_exact_layers_are_told_apart_from_sparse_ones(tiny):
    model, tokenizer = tiny
    method = get_method("a_shape", sink=4, window=8)
    options = {"min_length": 0, "min_queries": 8}
    every = answer(model, tokenizer, PROMPT, method=method, patch_options=options)
    options["dense_layers"] = 1
    one = answer(model, tokenizer, PROMPT, method=method, patch_options=options)
    layers = model.config.num_hidden_layers
    assert (every.sparse_calls, one.sparse_calls) == (layers, layers - 1)
    assert one.density == pytest.approx(every.density)
    assert sum(one.exact.values()) == 1
    none = answer(model, tokenizer, PROMPT, method=method, patch_options={"min_length": 4000})
    assert none.density is None
    assert sum(none.exact.values()) == layers


@torch.inference_mode()
def test_a_cache_that_forgets_is_copied_not_cropped(tiny):
    _, tokenizer = tiny
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0,
        initializer_range=0.5,
    )
    model = Gemma3ForCausalLM(config).eval()
    found = answer(model, tokenizer, PROMPT, continuations=[[5, 6, 7], [5, 6, 7]])
    expected, _ = _whole_log_prob(model, PROMPT, [5, 6, 7])
    assert found.scores[0] == found.scores[1]
    assert found.scores[0][0] == pytest.approx(expected, abs=1e-4)


def test_empty_input_is_refused(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="at least one token"):
        answer(model, tokenizer, [])
    with pytest.raises(ValueError, match="at least one token"):
        answer(model, tokenizer, PROMPT, continuations=[[]])


def test_prefill_can_be_gone_on_from_twice(tiny):
    model, tokenizer = tiny
    start = prefill(model, torch.tensor([PROMPT]))
    first = generate(model, tokenizer, start, Generation(5))
    assert generate(model, tokenizer, start, Generation(5)) == first


def test_recall_is_measured_when_asked_for(tiny):
    model, tokenizer = tiny
    options = {"min_length": 0, "min_queries": 8}
    found = [
        answer(model, tokenizer, PROMPT, method=method, patch_options=options, recall_rows=10_000)
        for method in (get_method("a_shape", sink=4, window=8), get_method("a_shape", window=300))
    ]
    assert 0 < found[0].recall < found[1].recall < 1
