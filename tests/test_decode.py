"""Sparse decode in live models: a list is reused only for the sequence that it was made for."""

import copy
import functools
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from sparse_patch_kernels import BlockPlan

import sparse_patch
from sparse_patch import SparsePatchWarning
from sparse_patch.attention import STATE, attention_function
from sparse_patch.methods import hip
from sparse_patch.registry import Method
from tests.zoo import CHUNK, CHUNKED_LAYERS, FAMILIES, LAYERS, SPARSE_LAYERS, tiny_model

ANY = {"min_length": 0, "min_queries": 0}
HIP = {"mask_k": 32, "block_q": 16, "block_k": 4, "sink": 4, "window": 16, "dense_layers": 0, **ANY}
STAGES = {
    "chunks": (16, 4),
    "keep": (64, 32),
    "stride_q": (1, 1),
    "refresh": (8, 4),
    "block_q": 16,
    "sink": 4,
    "window": 16,
    "early_layers": 0,
    **ANY,
}
METHODS = [("hip", HIP), ("infinite_hip", STAGES)]


@dataclass(frozen=True)
class Witness(Method):
    """Decodes through the sparse op with all keys, and remembers them all: any mix-up shows."""

    seen: Any = field(default_factory=Counter)
    sparse_decode = True

    def plan(self, q, k, *, scale, q_offset):
        return None

    def decode(self, q, k, *, scale, memory):
        if memory is None:
            self.seen["fresh"] += 1
        else:
            assert torch.equal(memory, k[:, :-1]), "a memory of another sequence"
            self.seen["continued"] += 1
        return BlockPlan(1, k.shape[1], 64, window=k.shape[1]), k.clone()


@pytest.fixture
def llama():
    return tiny_model("llama")


def tokens(batch=1, length=60, seed=0):
    return torch.randint(6, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, n=12, **options):
    return model.generate(
        ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0, **options
    )


@torch.no_grad()
def decode(model, ids, steps, **inputs):
    """Logits `[batch, steps, vocab]` of the tokens in `steps [batch, n]`, fed one by one."""
    out = model(ids, use_cache=True, **inputs)
    logits, mask = [], inputs.get("attention_mask")
    for token in steps.T:
        extra = {}
        if mask is not None:
            mask = torch.cat([mask, torch.ones(len(ids), 1).long()], 1)
            extra = {"attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}
        out = model(token[:, None], past_key_values=out.past_key_values, **extra)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def left_padded(rows):
    """Token rows of several lengths -> ids and mask of one batch."""
    ids = torch.zeros(len(rows), max(map(len, rows))).long()
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, len(ids[i]) - len(row) :], mask[i, len(ids[i]) - len(row) :] = row, 1
    return ids, {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


# --- the same answers where everything is kept ---------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_that_keeps_every_key_equals_eager(family):
    model = tiny_model(family)
    ids, extra = left_padded([tokens(length=n, seed=n)[0] for n in (40, 27)])
    mask = extra["attention_mask"]
    want = generate(model, ids, 6, attention_mask=mask)
    with sparse_patch.patch(model, Witness(), **ANY) as handle:
        got = generate(model, ids, 6, attention_mask=mask)
    assert torch.equal(got, want)
    sparse = SPARSE_LAYERS.get(family, LAYERS) - CHUNKED_LAYERS.get(family, 0)
    in_the_first_chunk = min(5, max(0, CHUNK - 27)) * CHUNKED_LAYERS.get(family, 0)
    assert handle.report().decode_calls == 2 * 5 * sparse + in_the_first_chunk


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("hip", {**HIP, "mask_k": 1000}),
        ("hip", {**HIP, "window": 1000}),
        ("infinite_hip", {**STAGES, "keep": (1000, 1000)}),
        ("infinite_hip", {**STAGES, "window": 1000}),
    ],
)
def test_a_budget_or_a_window_that_covers_all_changes_nothing(llama, method, params):
    want = generate(llama, tokens(length=200))
    with sparse_patch.patch(llama, method, **params) as handle:
        assert torch.equal(generate(llama, tokens(length=200)), want)
    assert handle.report().exact == {"method": 12 * LAYERS}


@pytest.mark.parametrize(("method", "params"), METHODS)
def test_a_small_budget_decodes_sparse_and_is_counted(llama, method, params):
    dense = decode(llama, tokens(length=200), tokens(length=20, seed=1))
    with sparse_patch.patch(llama, method, **params) as handle:
        sparse = decode(llama, tokens(length=200), tokens(length=20, seed=1))
    report = handle.report()
    assert (report.calls, report.sparse_calls) == (21 * LAYERS, 21 * LAYERS)
    assert report.decode_calls == 20 * LAYERS
    assert report.exact == {}
    assert not torch.allclose(sparse, dense, atol=1e-3)
    # Sink, list and window, and up to seven steps more of it, of some 210 keys.
    assert (4 + 32 + 16) / 220 < report.decode_density < (4 + 32 + 16 + 4 + 7) / 200


def test_the_list_is_made_anew_every_so_many_steps(llama, monkeypatch):
    searched, search = Counter(), hip.Hip._search

    def counting(self, q, k, scale):
        searched[q.shape[1], k.shape[1]] += 1
        return search(self, q, k, scale)

    monkeypatch.setattr(hip.Hip, "_search", counting)
    with sparse_patch.patch(llama, "hip", refresh=8, **HIP):
        generate(llama, tokens(length=100), n=21)
    assert searched == dict.fromkeys([(100, 100), (1, 101), (1, 109), (1, 117)], LAYERS)


# --- whose memory it is --------------------------------------------------------------------------


def test_one_sequence_is_followed_from_step_to_step(llama):
    method = Witness()
    with sparse_patch.patch(llama, method, **ANY):
        generate(llama, tokens())
        assert method.seen == {"fresh": LAYERS, "continued": 10 * LAYERS}
        generate(llama, tokens(batch=3, seed=1))
    assert method.seen == {"fresh": 4 * LAYERS, "continued": 40 * LAYERS}


def test_reordered_beams_start_afresh(llama):
    method = Witness()
    want = generate(llama, tokens(), num_beams=4)
    with sparse_patch.patch(llama, method, **ANY) as handle:
        assert torch.equal(generate(llama, tokens(), num_beams=4), want)
    assert handle.report().decode_calls == 11 * 4 * LAYERS
    assert method.seen == {"fresh": 11 * 4 * LAYERS}


def test_a_sequence_goes_on_however_many_came_between(llama):
    """The two differ in one token, not the last: the first layer's newest key is the same."""
    method, one = Witness(), tokens()
    two = one.clone()
    two[0, -5] += 1
    with sparse_patch.patch(llama, method, **ANY), torch.no_grad():
        caches = [llama(ids[:, :-1], use_cache=True).past_key_values for ids in (one, two)]
        for cache in caches:
            llama(one[:, -1:], past_key_values=cache)
        newest = [cache.layers[0].keys[0, :, -1] for cache in caches]
        assert torch.equal(*newest)
        llama(one[:, :1], past_key_values=caches[0])
    assert method.seen == {"fresh": 2 * LAYERS, "continued": LAYERS}


def test_a_cropped_cache_starts_afresh(llama):
    method = Witness()
    with sparse_patch.patch(llama, method, **ANY), torch.no_grad():
        cache = llama(tokens(), use_cache=True).past_key_values
        for token in (7, 8):
            llama(torch.tensor([[token]]), past_key_values=cache)
        cache.crop(-1)
        llama(torch.tensor([[9]]), past_key_values=cache)
        assert method.seen == {"fresh": 2 * LAYERS, "continued": LAYERS}
        llama(torch.tensor([[9]]), past_key_values=cache)
    assert method.seen == {"fresh": 2 * LAYERS, "continued": 2 * LAYERS}


def test_several_tokens_at_once_end_it(llama):
    """As in speculative decoding, or a second turn; exact or sparse."""
    method = Witness()
    with sparse_patch.patch(llama, method, min_length=0, min_queries=64), torch.no_grad():
        cache = llama(tokens(), use_cache=True).past_key_values
        for some in ([[7]], [[7, 8]], [[7]], [[8]]):
            llama(torch.tensor(some), past_key_values=cache)
    assert method.seen == {"fresh": 2 * LAYERS, "continued": LAYERS}


def test_what_is_remembered_does_not_hold_the_cache_and_goes_with_it(llama):
    with sparse_patch.patch(llama, "hip", **HIP), torch.no_grad():
        cache = llama(tokens(length=300), use_cache=True).past_key_values
        llama(torch.tensor([[7]]), past_key_values=cache)
        memories = getattr(llama.model.layers[0].self_attn, STATE).memories._of_keys
        ((kv_len, (runs, _)),) = next(iter(memories.values())).values()
        assert kv_len == 301
        for kept in (runs[0].start, runs[0].count):
            assert kept.untyped_storage().nbytes() <= 16 * 2 * 16 * 4
        del cache
        assert len(memories) == 0


def test_a_copy_of_the_model_answers_as_the_model_does(llama):
    """What is remembered stays with the caches of the original: a copy chooses anew."""
    method = Witness()
    with sparse_patch.patch(llama, method, **ANY), torch.no_grad():
        cache = llama(tokens(), use_cache=True).past_key_values
        llama(torch.tensor([[7]]), past_key_values=cache)
        clone, its_cache = copy.deepcopy((llama, cache))
        want = llama(torch.tensor([[8]]), past_key_values=cache).logits
        got = clone(torch.tensor([[8]]), past_key_values=its_cache).logits
    assert torch.equal(got, want)
    assert sparse_patch.report(clone).decode_calls == 2 * LAYERS


def together(llama, method, params, prompts, steps, order):
    """Logits `[prompts, steps, vocab]` of prompts that are decoded in some order, each in a cache
    of its own; `order` names the prompt whose turn it is."""
    with sparse_patch.patch(llama, method, **params), torch.no_grad():
        caches = [llama(ids[None], use_cache=True).past_key_values for ids in prompts]
        out = [[] for _ in prompts]
        for i in order:
            token = steps[i : i + 1, len(out[i])][None]
            out[i].append(llama(token, past_key_values=caches[i]).logits[0, -1])
    return torch.stack([torch.stack(rows) for rows in out])


@pytest.mark.parametrize(("method", "params"), METHODS)
def test_sequences_in_turn_get_the_answers_they_get_alone(llama, method, params):
    """Two of them end alike, so that the keys of the first layer do; a third is as long as they."""
    prompts, steps = tokens(batch=3, length=200), tokens(batch=3, length=16, seed=1)
    prompts[1, 40:], steps[1] = prompts[0, 40:], steps[0]
    alone = together(llama, method, params, prompts, steps, [0] * 16 + [1] * 16 + [2] * 16)
    turns = torch.stack([torch.randperm(3) for _ in range(16)]).flatten().tolist()
    assert torch.equal(together(llama, method, params, prompts, steps, turns), alone)


@pytest.mark.parametrize(("method", "params"), METHODS)
def test_threads_get_the_answers_they_get_alone(llama, method, params):
    prompts, steps = tokens(batch=4, length=200), tokens(batch=4, length=16, seed=1)
    alone = together(llama, method, params, prompts, steps, sorted([*range(4)] * 16))
    got = [None] * 4

    def one(i):
        with torch.no_grad():
            cache = llama(prompts[i : i + 1], use_cache=True).past_key_values
            got[i] = torch.stack(
                [
                    llama(token[None, None], past_key_values=cache).logits[0, -1]
                    for token in steps[i]
                ]
            )

    with sparse_patch.patch(llama, method, **params):
        threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(torch.stack(got), alone)


def test_a_step_may_be_taken_in_another_thread_than_the_one_before(llama):
    method = Witness()
    with sparse_patch.patch(llama, method, **ANY), torch.no_grad():
        cache = llama(tokens(), use_cache=True).past_key_values
        for token in (7, 8, 9):
            step = functools.partial(llama, torch.tensor([[token]]), past_key_values=cache)
            thread = threading.Thread(target=torch.no_grad()(step))
            thread.start()
            thread.join()
    assert method.seen == {"fresh": LAYERS, "continued": 2 * LAYERS}


def test_a_step_that_failed_leaves_nothing_for_the_next(llama, monkeypatch):
    method = Witness()
    with sparse_patch.patch(llama, method, **ANY), torch.no_grad():
        cache = llama(tokens(), use_cache=True).past_key_values
        llama(torch.tensor([[7]]), past_key_values=cache)
        with monkeypatch.context() as broken:
            broken.setattr(llama.model.layers[2].mlp, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                llama(torch.tensor([[8]]), past_key_values=cache)
        cache.crop(-1)  # which the first layers need, and the last one too
        other = llama(tokens(length=30, seed=3), use_cache=True).past_key_values
        llama(torch.tensor([[8]]), past_key_values=other)
    assert method.seen["continued"] == 3


# --- rows of a batch -----------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "params"), METHODS)
def test_a_left_padded_row_decodes_as_it_would_alone(llama, method, params):
    rows = [tokens(length=n, seed=n)[0] for n in (200, 133)]
    steps = tokens(batch=2, length=20, seed=1)
    ids, extra = left_padded(rows)
    with sparse_patch.patch(llama, method, **params) as handle:
        batch = decode(llama, ids, steps, **extra)
        assert handle.report().decode_calls == 2 * 20 * LAYERS
        for i, row in enumerate(rows):
            alone = decode(llama, row[None], steps[i : i + 1])[0]
            torch.testing.assert_close(batch[i], alone, atol=5e-5, rtol=0)


def test_a_row_that_is_short_decodes_exact_beside_one_that_does_not(llama):
    ids, extra = left_padded([tokens(length=n, seed=n)[0] for n in (200, 100)])
    with sparse_patch.patch(llama, "hip", **{**HIP, "min_length": 150}) as handle:
        decode(llama, ids, tokens(batch=2, length=5, seed=1), **extra)
    report = handle.report()
    assert (report.decode_calls, report.exact) == (5 * LAYERS, {"short": 6 * LAYERS})


# --- when it is exact ----------------------------------------------------------------------------


def test_a_static_cache_decodes_exact_and_says_so(llama):
    with sparse_patch.patch(llama, "hip", **HIP) as handle:
        with pytest.warns(SparsePatchWarning, match="static cache"):
            generate(llama, tokens(length=100), cache_implementation="static")
    assert handle.report().decode_calls == 0


@pytest.mark.parametrize(("method", "off"), [("hip", 0), ("infinite_hip", (0, 0))])
def test_without_refresh_decode_is_exact(llama, method, off):
    params = {**dict(METHODS)[method], "refresh": off}
    with sparse_patch.patch(llama, method, **params) as handle:
        generate(llama, tokens(length=100))
    report = handle.report()
    assert (report.decode_calls, report.exact) == (0, {"decode": 11 * LAYERS})
    assert report.sparse_calls == LAYERS


def test_dense_layers_and_short_sequences_decode_exact(llama):
    params = {**HIP, "dense_layers": 3}
    with sparse_patch.patch(llama, "hip", **params) as handle:
        generate(llama, tokens(length=100))
    assert [layer.decode_calls for layer in handle.report().layers] == [0, 0, 0, 11]
    assert sum(layer.exact["decode"] for layer in handle.report().layers[:3]) == 33
    with sparse_patch.patch(llama, "hip", **{**HIP, "min_length": 106}) as handle:
        generate(llama, tokens(length=100))
    assert (handle.report().decode_calls, handle.report().exact) == (6 * LAYERS, {"short": 24})


def test_a_broken_key_is_noticed_in_any_step(llama):
    """Each step looks at what is new to it: all keys at first, then the newest."""
    module = llama.model.layers[0].self_attn
    q, kv = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 100, 16)
    with sparse_patch.patch(llama, Witness(), **ANY) as handle, torch.no_grad():
        for kv_len in (90, 91, 92):
            attention_function(module, q[:, :, :1], kv[:, :, :kv_len], kv[:, :, :kv_len], None)
        assert handle.report().decode_calls == 3
        kv[:, :, 92] = float("nan")
        for kv_len in (93, 94):
            attention_function(module, q[:, :, :1], kv[:, :, :kv_len], kv[:, :, :kv_len], None)
    assert handle.report().exact == {"non-finite": 2}


def test_training_and_a_mask_of_the_users_own_decode_exact(llama):
    module = llama.model.layers[0].self_attn
    q, kv = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 100, 16)
    with sparse_patch.patch(llama, Witness(), **ANY) as handle, torch.no_grad():
        attention_function(module, q, kv, kv, torch.ones(1, 1, 1, 100, dtype=torch.bool))
        attention_function(module.train(), q, kv, kv, None)
    assert handle.report().exact == {"mask": 1, "training": 1}


# --- what the report says ------------------------------------------------------------------------


def test_decode_steps_leave_the_density_of_the_prefill_alone(llama):
    with sparse_patch.patch(llama, "hip", measure_recall=True, **HIP) as handle, torch.no_grad():
        llama(tokens(length=200))
    before = handle.report()
    assert (before.decode_calls, before.decode_density) == (0, None)
    assert "decode steps" not in str(before)
    with sparse_patch.patch(llama, "hip", measure_recall=True, **HIP) as handle:
        decode(llama, tokens(length=200), tokens(length=9, seed=1))
    after = handle.report()
    assert (after.density, after.recall) == (before.density, before.recall)
    assert after.sparse_calls == 10 * LAYERS
    assert str(after).splitlines()[-1].startswith("36 of the sparse calls are decode steps")
    written = json.loads(json.dumps(after.to_dict()))
    assert written["decode_calls"] == 36
    of_layers = [layer["decode_density"] for layer in written["layers"]]
    assert written["decode_density"] == pytest.approx(sum(of_layers) / LAYERS)


def test_a_compiled_model_decodes_sparse_too(llama):
    del llama.model.layers[1:]  # compiling takes long
    llama.config.num_hidden_layers = 1
    ids, extra = left_padded([tokens(length=n, seed=n)[0] for n in (100, 90)])
    token = tokens(batch=2, length=1, seed=1)
    with sparse_patch.patch(llama, "hip", **HIP) as handle, torch.no_grad():
        want = decode(llama, ids, token, **extra)
        cache = llama(ids, use_cache=True, **extra).past_key_values
        mask = torch.cat([extra["attention_mask"], torch.ones(2, 1).long()], 1)
        more = {"attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}
        compiled = torch.compile(llama, backend="eager")
        got = compiled(token, past_key_values=cache, **more).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert handle.report().decode_calls == 2 * 2
    torch._dynamo.reset()
