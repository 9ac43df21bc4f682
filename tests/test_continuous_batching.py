"""Continuous batching of a patched model: each request is answered as it would be alone."""

import copy
import inspect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from sparse_patch_kernels import BlockPlan
from transformers import ContinuousBatchingConfig, GenerationConfig

import sparse_patch
from sparse_patch import SparsePatchWarning
from sparse_patch.attention import attention_function
from sparse_patch.registry import Method
from sparse_patch.sequences import Span, requests_of, window_of
from tests.robustness.real import as_loaded, given_back
from tests.zoo import LAYERS, snapshot, tiny_model

ANY = {"min_length": 0, "min_queries": 0}
METHODS = {
    "flexprefill": {"block_size": 16, "min_budget": 1, "gamma": 0.5, **ANY},
    "strided": {"block_size": 16, "gamma": 0.5, "stride": 4, **ANY},
    "a_shape": {"block_size": 16, "sink": 16, "window": 32, **ANY},
}
# Before, Transformers itself answers otherwise in batches than alone where layers slide.
SLIDES_RIGHT = Version(transformers.__version__) >= Version("5.17")
LENGTHS = (200, 90, 31)
TOKENS = 6


@dataclass(frozen=True)
class Witness(Method):
    """Keeps all keys, or declines below `least`; notes the queries and keys of each call."""

    seen: Any = field(default_factory=Counter)
    least: int = 0

    def plan(self, q, k, *, scale, q_offset):
        self.seen[q.shape[1], k.shape[1]] += 1
        if k.shape[1] < self.least:
            return None
        return BlockPlan(q.shape[1], k.shape[1], 64, window=k.shape[1])


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(6, 128, (length,), generator=generator).tolist()


PROMPTS = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]


def settings(tokens: int = 512, page: int = 32, **more: Any) -> ContinuousBatchingConfig:
    known = inspect.signature(ContinuousBatchingConfig).parameters
    size = "page_size" if "page_size" in known else "block_size"
    return ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=tokens, **{size: page}, **more)


def greedy(new: int = TOKENS, **more: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0, **more)


def batched(model, prompts, how=None, new=TOKENS, **more: Any):
    """What each prompt gets in a batch with the others."""
    outputs = model.generate_batch(
        prompts,
        generation_config=greedy(new, eos_token_id=-1),
        continuous_batching_config=how or settings(),
        **more,
    )
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    return list(outputs.values())


def tokens_of(outputs) -> list[list[int]]:
    return [output.generated_tokens for output in outputs]


def alone(model, ids: list[int], new: int = TOKENS, **more: Any) -> tuple[list[int], torch.Tensor]:
    """What `generate` answers, and the log-probabilities of its tokens."""
    how = greedy(new, output_logits=True, return_dict_in_generate=True, **more)
    found = model.generate(torch.tensor([ids]), generation_config=how)
    answer = found.sequences[0, len(ids) :]
    logits = torch.stack(found.logits)[:, 0].float().log_softmax(-1)
    return answer.tolist(), logits.gather(1, answer[:, None])[:, 0]


def assert_same(outputs, want: list[tuple[list[int], torch.Tensor]]) -> None:
    for output, (answer, logprobs) in zip(outputs, want, strict=True):
        assert output.generated_tokens == answer
        torch.testing.assert_close(torch.tensor(output.logprobs), logprobs, atol=1e-4, rtol=0)


@pytest.fixture
def llama():
    return tiny_model("llama")


# --- equal to `generate`, request by request -----------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "gpt_oss", "mistral_swa"])
def test_keeping_everything_answers_as_the_model_does(family):
    model = tiny_model(family)
    before = snapshot(model)
    if not SLIDES_RIGHT and family not in ("llama", "qwen3"):
        pytest.skip("this Transformers does not keep windows right")
    want = [alone(model, ids)[0] for ids in PROMPTS]
    if family != "gemma2":  # whose soft cap unpatched batches leave out
        assert tokens_of(batched(model, PROMPTS)) == want
    with sparse_patch.patch(model, "dense", block_size=16, **ANY) as handle:
        assert tokens_of(batched(model, PROMPTS)) == want
    full = handle.report().sparse_calls // len(PROMPTS)
    assert full == {"llama": 4, "qwen3": 4, "mistral_swa": 0}.get(family, 2)
    assert snapshot(model) == before


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("method", METHODS)
def test_a_request_is_as_sparse_as_it_is_alone(family, method):
    model = tiny_model(family)
    if not SLIDES_RIGHT and family != "llama":
        pytest.skip("this Transformers does not keep windows right")
    with sparse_patch.patch(model, method, **METHODS[method]) as one_by_one:
        want = [alone(model, ids) for ids in PROMPTS]
    with sparse_patch.patch(model, method, **METHODS[method]) as together:
        assert_same(batched(model, PROMPTS, settings(return_logprobs=True)), want)
    one_by_one, together = one_by_one.report(), together.report()
    assert together.density == pytest.approx(one_by_one.density)
    assert 0 < together.density < 1
    assert together.sparse_calls == one_by_one.sparse_calls
    assert together.exact == one_by_one.exact


def test_a_long_prompt_comes_in_chunks_as_in_generate(llama):
    with sparse_patch.patch(llama, "strided", **METHODS["strided"]) as handle:
        outputs = batched(llama, PROMPTS[:1], settings(tokens=64, return_logprobs=True))
        assert handle.report().sparse_calls == 3 * LAYERS  # of 64 tokens
        assert handle.report().exact["method"] == LAYERS  # of 8, less than a block
        assert_same(outputs, [alone(llama, PROMPTS[0], prefill_chunk_size=64)])


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_chunks_share_batches_with_whole_prompts_and_decode_steps(family):
    """Twelve prompts through batches of 64 tokens: chunks begin and end anywhere."""
    model = tiny_model(family)
    if not SLIDES_RIGHT and family != "llama":
        pytest.skip("this Transformers does not keep windows right")
    prompts = [prompt(5 + 29 * seed % 151, seed) for seed in range(12)]
    want = [alone(model, ids)[0] for ids in prompts]
    with sparse_patch.patch(model, "dense", block_size=16, **ANY) as handle:
        assert tokens_of(batched(model, prompts, settings(tokens=64))) == want
    assert handle.report().sparse_calls > 12 * LAYERS / 2


def test_a_real_model_answers_as_it_does_alone():
    with given_back(as_loaded("smollm2")) as smollm2:
        prompts = [smollm2.ids(length, start)[0].tolist() for length, start in ((520, 0), (200, 9))]
        plain = [alone(smollm2.model, ids, 4)[0] for ids in prompts]
        with smollm2.patch("dense"):
            assert tokens_of(batched(smollm2.model, prompts, settings(1024), 4)) == plain
        with smollm2.patch("strided", min_length=400) as handle:
            outputs = batched(smollm2.model, prompts, settings(1024, return_logprobs=True), 4)
            report = handle.report()
            assert report.sparse_calls == smollm2.full_layers
            assert report.density < 0.9
            assert_same(outputs, [alone(smollm2.model, ids, 4) for ids in prompts])


# --- requests come and go ------------------------------------------------------------------------


@pytest.fixture
def running():
    """Managers of this fixture are stopped, whatever happens."""
    managers = []

    def start(model, how=None, new=TOKENS):
        manager = model.init_continuous_batching(
            generation_config=greedy(new, eos_token_id=-1),
            continuous_batching_config=how or settings(),
        )
        managers.append(manager)
        manager.start()
        return manager

    yield start
    for manager in managers:
        manager.stop(block=True)


def first(manager, request=None):
    """The next output, of a request if one is named."""
    for _ in range(600):
        output = manager.get_result(request_id=request, timeout=0.1)
        if output is not None:
            return output
    raise AssertionError("no answer in a minute")


def test_requests_join_and_leave_while_others_run(llama, running):
    with sparse_patch.patch(llama, "flexprefill", **METHODS["flexprefill"]):
        want = [alone(llama, ids)[0] for ids in PROMPTS]
        manager = running(llama)
        leaves = manager.add_request(PROMPTS[0], max_new_tokens=1500, streaming=True)
        output = first(manager, leaves)
        assert output.generated_tokens == want[0][: len(output.generated_tokens)]
        joins = manager.add_request(PROMPTS[1])
        while (output := first(manager)).request_id != joins:
            pass
        assert output.generated_tokens == want[1]
        manager.cancel_request(leaves)
        last = manager.add_request(PROMPTS[2])
        while (output := first(manager)).request_id != last:
            assert len(output.generated_tokens) < 1500
        assert output.generated_tokens == want[2]
        manager.stop(block=True)


def test_a_prefix_that_another_request_has_left_is_not_computed_again(llama):
    shared, own = prompt(128), prompt(40, seed=5)
    want = alone(llama, shared + own)[0]
    method = Witness()
    with sparse_patch.patch(llama, method, **ANY):
        how = {"how": settings(page=32), "persistent_manager": True}
        batched(llama, [[*shared, 7]], **how)
        method.seen.clear()
        (output,) = batched(llama, [shared + own], **how)
        llama.destroy_cached_continuous_batching_manager()
    assert output.generated_tokens == want
    assert method.seen == {(40, 168): LAYERS}


def test_several_answers_to_one_prompt_share_its_keys(llama):
    want = alone(llama, PROMPTS[0])[0]
    how = greedy(eos_token_id=-1)
    how.update(do_sample=True, top_k=1, num_return_sequences=2)
    with sparse_patch.patch(llama, "dense", block_size=16, **ANY):
        outputs = llama.generate_batch(
            PROMPTS[:1], generation_config=how, continuous_batching_config=settings()
        )
    assert tokens_of(outputs.values()) == [want] * 2


# --- what runs exact -----------------------------------------------------------------------------


def test_every_request_is_judged_by_its_own_length(llama):
    with sparse_patch.patch(llama, "dense", block_size=16, min_length=80, min_queries=0) as handle:
        batched(llama, PROMPTS)
    report = handle.report()
    assert report.sparse_calls == 2 * LAYERS
    assert report.exact == {"short": LAYERS, "decode": 3 * LAYERS * (TOKENS - 1)}


def test_what_a_method_declines_runs_exact_and_is_counted(llama):
    want = [alone(llama, ids)[0] for ids in PROMPTS]
    with sparse_patch.patch(llama, Witness(least=100), **ANY) as handle:
        assert tokens_of(batched(llama, PROMPTS)) == want
    assert handle.report().sparse_calls == LAYERS
    assert handle.report().exact["method"] == 2 * LAYERS


def test_methods_that_remember_decode_exact(llama):
    """Their memories belong to the cache of one sequence."""
    options = {"mask_k": 32, "block_q": 16, "block_k": 4, "sink": 4, "window": 16}
    with sparse_patch.patch(llama, "hip", **options, dense_layers=0, **ANY) as handle:
        want = [alone(llama, ids, 1)[0] for ids in PROMPTS]
        assert [answer[:1] for answer in tokens_of(batched(llama, PROMPTS))] == want
    assert handle.report().decode_calls == 0
    assert handle.report().exact["decode"] == 3 * LAYERS * (TOKENS - 1)


# --- patched and unpatched -----------------------------------------------------------------------


def test_unpatching_while_requests_run_leaves_them_right(llama, running):
    before = snapshot(llama)
    want = alone(llama, PROMPTS[0], 100)[0]
    sparse_patch.patch(llama, "dense", block_size=16, **ANY)
    manager = running(llama, new=100)
    request = manager.add_request(PROMPTS[0], streaming=True)
    output = first(manager, request)
    assert len(output.generated_tokens) < 100
    sparse_patch.unpatch(llama)
    while not output.is_finished():
        output = first(manager, request)
    assert output.error is None
    assert output.generated_tokens == want
    manager.stop(block=True)
    assert snapshot(llama) == before
    assert tokens_of(batched(llama, PROMPTS)) == [alone(llama, ids)[0] for ids in PROMPTS]


def test_a_manager_that_was_never_started_holds_nothing_once_it_is_gone(llama):
    sparse_patch.patch(llama, "dense", **ANY)
    manager = llama.init_continuous_batching(generation_config=greedy(eos_token_id=-1))
    sparse_patch.unpatch(llama)
    manager.stop()
    assert llama.config._attn_implementation == "eager"


def test_a_manager_that_is_kept_ends_with_the_patch(llama):
    want = tokens_of(batched(llama, PROMPTS))
    with sparse_patch.patch(llama, "dense", block_size=16, **ANY):
        for _ in range(2):
            assert tokens_of(batched(llama, PROMPTS, persistent_manager=True)) == want
        assert hasattr(llama, "_cached_continuous_batching_manager")
    assert not hasattr(llama, "_cached_continuous_batching_manager")
    assert tokens_of(batched(llama, PROMPTS)) == want


def test_a_manager_that_was_kept_before_the_patch_is_refused(llama):
    batched(llama, PROMPTS, persistent_manager=True)
    with sparse_patch.patch(llama, "flexprefill", **METHODS["flexprefill"]) as handle:
        with pytest.raises(RuntimeError, match="destroy_cached_continuous_batching_manager"):
            llama.generate_batch(PROMPTS)
        llama.destroy_cached_continuous_batching_manager()
        batched(llama, PROMPTS)
        assert handle.report().sparse_calls > 0


def test_a_copy_batches_by_itself(llama):
    with sparse_patch.patch(llama, "flexprefill", **METHODS["flexprefill"]) as handle:
        clone = copy.deepcopy(llama)
        batched(clone, PROMPTS)
        assert handle.report().sparse_calls == 0
        assert sparse_patch.report(clone).sparse_calls == 2 * LAYERS


def test_names_that_another_has_changed_are_left_alone(llama):
    with sparse_patch.patch(llama, "flexprefill", **METHODS["flexprefill"]) as handle:
        llama.set_attn_implementation("sdpa")
        with pytest.warns(SparsePatchWarning, match="did not call our attention"):
            batched(llama, PROMPTS)
        assert handle.report().sparse_calls == 0
        assert llama.config._attn_implementation == "sdpa"


# --- how a batch is laid out ---------------------------------------------------------------------


def test_requests_are_cut_out_of_a_batch():
    assert requests_of([0, 3, 3, 4], [0, 10, 10, 15]) == [
        Span(slice(0, 10), slice(0, 3)),
        Span(slice(10, 15), slice(3, 4)),
    ]
    with pytest.raises(ValueError, match="3 queries has 2 keys"):
        requests_of([0, 3], [0, 2])


def test_a_window_is_no_mask_where_it_hides_nothing():
    assert window_of(8, None) is window_of(8, 8) is None
    assert window_of(5, 3).as_subclass(torch.Tensor).tolist() == [[0, 0, 0, 1, 2]]


LAYOUT = {
    "read_index": [torch.arange(9)],
    "cu_seq_lens_q": torch.tensor([0, 2, 3]),
    "cu_seq_lens_k": torch.tensor([0, 5, 9]),
}


def test_tokens_of_no_request_get_zeros(llama):
    """From Transformers 5.24 on, the model asks the cache, and attention gets all keys."""
    module = llama.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 5, 16, generator=generator)
    k, v = torch.randn(2, 1, 2, 9, 16, generator=generator)
    with sparse_patch.patch(llama, "dense", **ANY):
        out, _ = attention_function(module, q, k, v, None, is_causal=False, **LAYOUT)
        one, _ = attention_function(module, q[:, :, :2], k[:, :, :5], v[:, :, :5], None)
        two, _ = attention_function(module, q[:, :, 2:3], k[:, :, 5:], v[:, :, 5:], None)
    torch.testing.assert_close(out[:, :3], torch.cat([one, two], 1))
    assert not out[:, 3:].any()


def test_a_batch_laid_out_for_flash_attention_is_refused(llama):
    module = llama.model.layers[0].self_attn
    q, kv = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    with pytest.raises(RuntimeError, match="begun for FlashAttention"):
        attention_function(module, q, kv, kv, None, block_table=torch.zeros(1), **LAYOUT)
