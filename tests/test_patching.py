"""What a patch does to a live model, and that it can be taken out again. Pitfalls, one by one."""

import copy
import io
import threading
import types
import warnings

import pytest
import torch
from sparse_patch_kernels import BackendUnavailable
from sparse_patch_kernels.cpu import building
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TextGenerationPipeline

import sparse_patch
from sparse_patch import SparsePatchWarning, call, layer, patching, routing
from sparse_patch.attention import attention_function
from tests.zoo import tiny_model

FLEX = {"block_size": 16, "min_budget": 1, "gamma": 0.5, "min_length": 0, "min_queries": 0}
KEEP = {"block_size": 16, "min_length": 0, "min_queries": 0}


@pytest.fixture
def llama():
    return tiny_model("llama")


def tokens(batch=1, length=200, seed=0):
    return torch.randint(6, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(ids, **inputs).logits


def left_padded(rows, length):
    """Token rows of several lengths -> ids, mask, positions of one batch."""
    ids, mask = (
        torch.zeros(len(rows), length, dtype=torch.long),
        torch.zeros(len(rows), length).long(),
    )
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
    return ids, {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


# --- one line in, one line out -------------------------------------------------------------------


def test_one_line_patches_and_one_line_restores(llama):
    ids = tokens()
    before = logits(llama, ids)
    sparse_patch.patch(llama, "flexprefill", **FLEX)
    during = logits(llama, ids)
    assert sparse_patch.report(llama).sparse_calls == 4
    assert 0 < sparse_patch.report(llama).density < 1
    assert not torch.equal(during, before)
    sparse_patch.unpatch(llama)
    assert torch.equal(logits(llama, ids), before)
    with pytest.raises(ValueError, match="not patched"):
        sparse_patch.report(llama)
    sparse_patch.unpatch(llama)  # nothing to do, nothing to complain of


def test_the_context_manager_restores_after_an_error(llama):
    ids = tokens()
    before = logits(llama, ids)

    def interrupted():
        with sparse_patch.patch(llama, "flexprefill", **FLEX):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(logits(llama, ids), before)
    assert llama.config._attn_implementation == "eager"


def test_kernels_are_compiled_when_a_model_is_patched_not_in_its_first_prefill(llama, monkeypatch):
    calls = []
    monkeypatch.setattr(building, "prepare", lambda: calls.append("prepared"))
    with sparse_patch.patch(llama, "dense", backend="reference"):
        assert calls == []
    with sparse_patch.patch(llama, "dense"):
        assert calls == ["prepared"]


def test_patches_nest_and_leave_in_any_order(llama):
    ids = tokens()
    plain = logits(llama, ids)
    with sparse_patch.patch(llama, "flexprefill", **FLEX) as outer:
        flex = logits(llama, ids)
        with sparse_patch.patch(llama, "a_shape", sink=1, window=9, min_length=0) as inner:
            shape = logits(llama, ids)
        assert torch.equal(logits(llama, ids), flex)
        assert (outer.report().sparse_calls, inner.report().sparse_calls) == (8, 4)
    assert torch.equal(logits(llama, ids), plain)

    outer = sparse_patch.patch(llama, "flexprefill", **FLEX)
    inner = sparse_patch.patch(llama, "a_shape", sink=1, window=9, min_length=0)
    outer.remove()
    assert torch.equal(logits(llama, ids), shape)
    outer.remove()  # a second time is no harm
    inner.remove()
    assert torch.equal(logits(llama, ids), plain)
    assert llama.config._attn_implementation == "eager"


def test_an_inner_patch_of_some_layers_leaves_the_others_to_the_outer(llama):
    with sparse_patch.patch(llama, "flexprefill", **FLEX) as outer:
        with sparse_patch.patch(llama, "a_shape", layers=[1, -1], min_length=0) as inner:
            logits(llama, tokens())
        assert [layer.calls for layer in outer.report().layers] == [1, 0, 1, 0]
        assert [layer.layer for layer in inner.report().layers] == [1, 3]


def test_dense_layers_stay_exact(llama):
    with sparse_patch.patch(llama, "flexprefill", dense_layers=2, **FLEX) as handle:
        logits(llama, tokens())
    assert [layer.sparse_calls for layer in handle.report().layers] == [0, 0, 1, 1]
    assert handle.report().exact == {"layer kept dense": 2}
    with sparse_patch.patch(llama, "flexprefill", dense_layers=[-1], **FLEX) as handle:
        logits(llama, tokens())
    assert [layer.sparse_calls for layer in handle.report().layers] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("method", "params", "named"),
    [
        ("pbs", {"tau": (0.9, 0.8)}, "tau"),
        ("minference", {"heads": ((0, "stream_llm", 4, 16),)}, "heads"),
        ("proxyattn", {"n_proxy": 1}, "n_proxy"),
    ],
)
def test_a_model_split_by_heads_refuses_what_is_about_all_of_them(llama, method, params, named):
    """In tests/eval/test_scale_out.py the model is really split; here it only says so."""
    llama._tp_size = 2
    with pytest.raises(ValueError, match=f"{named} refers to all heads .* over 2 processes"):
        sparse_patch.patch(llama, method, **params)
    sparse_patch.patch(llama, method)
    llama._tp_size = None
    sparse_patch.patch(llama, method, **params)


def test_two_models_two_methods(llama):
    other = tiny_model("llama")
    sparse_patch.patch(llama, "flexprefill", **FLEX)
    sparse_patch.patch(other, "a_shape", sink=1, window=9, min_length=0)
    done = {}
    threads = [
        threading.Thread(target=lambda m=m, n=n: done.update({n: logits(m, tokens())}))
        for n, m in {"flex": llama, "shape": other}.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(done["flex"], logits(llama, tokens()))
    assert torch.equal(done["shape"], logits(other, tokens()))
    assert not torch.equal(done["flex"], done["shape"])


def test_a_deepcopy_and_a_pickle_keep_the_patch_and_their_own_counts(llama):
    sparse_patch.patch(llama, "flexprefill", **FLEX)
    want = logits(llama, tokens())
    file = io.BytesIO()
    torch.save(llama, file)
    file.seek(0)
    for clone in (copy.deepcopy(llama), torch.load(file, weights_only=False)):
        assert torch.equal(logits(clone, tokens()), want)
        assert sparse_patch.report(clone).sparse_calls == 8
        assert sparse_patch.report(llama).sparse_calls == 4
        sparse_patch.unpatch(clone)
        assert clone.config._attn_implementation == "eager"
    assert torch.equal(logits(llama, tokens()), want)


def test_saving_a_patched_model_leaks_nothing(llama, tmp_path):
    ids = tokens()
    before = logits(llama, ids)
    sparse_patch.patch(llama, "flexprefill", **FLEX)
    llama.save_pretrained(tmp_path)
    assert "sparse_patch" not in (tmp_path / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(plain, ids), before)
    named = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sparse_patch")
    torch.testing.assert_close(logits(named, ids), before, atol=1e-4, rtol=0)


def test_a_wrapper_is_patched_through(llama):
    wrapped = torch.nn.Sequential(torch.nn.ModuleDict({"inner": llama}))
    with sparse_patch.patch(wrapped, "flexprefill", **FLEX):
        logits(llama, tokens())
        assert sparse_patch.report(wrapped).sparse_calls == 4
    assert llama.config._attn_implementation == "eager"


def test_a_method_object_is_as_good_as_a_name(llama):
    method = sparse_patch.get_method("flexprefill", block_size=16, min_budget=1)
    with sparse_patch.patch(llama, method, min_length=0) as handle:
        logits(llama, tokens())
    assert handle.report().sparse_calls == 4
    assert "gamma=0.9" in handle.report().method


# --- padding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [("flexprefill", FLEX), ("a_shape", {"window": 9, "sink": 1})])
def test_a_sparse_row_does_not_feel_its_padding(llama, side, method):
    name, params = method
    rows = [tokens(length=n, seed=n)[0] for n in (200, 133)]
    ids, extra = left_padded(rows, 200)
    where = [slice(0, 200), slice(67, 200)]
    if side == "right":
        ids[1], extra["attention_mask"][1] = ids[1].roll(133), extra["attention_mask"][1].roll(133)
        extra["position_ids"][1] = torch.arange(200)
        where[1] = slice(0, 133)
    with sparse_patch.patch(llama, name, **{**params, "min_length": 0}) as handle:
        batch = logits(llama, ids, **extra)
        assert handle.report().sparse_calls == 8
        for i, row in enumerate(rows):
            alone = logits(llama, row[None])[0]
            torch.testing.assert_close(batch[i, where[i]], alone, atol=5e-5, rtol=0)


def test_a_model_that_cuts_the_mask_to_its_last_rows_keeps_its_padding():
    model = tiny_model("gemma4")
    ids, extra = left_padded([tokens(length=n)[0] for n in (60, 47)], 60)
    options = {"max_new_tokens": 6, "do_sample": False}
    want = model.generate(ids, attention_mask=extra["attention_mask"], **options)
    with torch.no_grad():
        full = model(ids, logits_to_keep=3, **extra).logits
    with sparse_patch.patch(model, "dense", **KEEP) as handle:
        got = model.generate(ids, attention_mask=extra["attention_mask"], **options)
        with torch.no_grad():
            cut = model(ids, logits_to_keep=3, **extra).logits
    assert torch.equal(got, want)
    torch.testing.assert_close(cut, full, atol=1e-5, rtol=0)
    assert handle.report().sparse_calls > 0


def test_padding_in_the_middle_is_skipped_too(llama):
    ids, mask = tokens(), torch.ones(1, 200).long()
    mask[:, 50:90] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    short = torch.cat([ids[:, :50], ids[:, 90:]], 1)
    with sparse_patch.patch(llama, "flexprefill", **FLEX):
        got = logits(llama, ids, attention_mask=mask, position_ids=positions)[0, 90:]
        torch.testing.assert_close(got, logits(llama, short)[0, 50:], atol=5e-5, rtol=0)


def test_methods_get_plain_tensors_whatever_the_mask_is(llama):
    """The mask is of a class that reads four indices as two, and what it indexes becomes one."""
    ids, mask = tokens(), torch.ones(1, 200).long()
    mask[:, 50:90] = 0
    short = torch.cat([ids[:, :50], ids[:, 90:]], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    params = {"mask_k": 32, "block_q": 16, "block_k": 4, "sink": 4, "window": 16}
    with sparse_patch.patch(llama, "hip", min_length=0, dense_layers=0, **params) as handle:
        kinds = set()

        def look(state, q, k, v, call, run):
            kinds.update(map(type, (q, k, v, run.out)))
            return run.out

        handle.observe(look)
        logits(llama, ids, attention_mask=mask, position_ids=positions)
        assert kinds == {torch.Tensor}
        handle.observe(None)
        got = logits(llama.double(), ids, attention_mask=mask, position_ids=positions)[0, 90:]
        torch.testing.assert_close(got, logits(llama, short)[0, 50:], atol=1e-9, rtol=0)


def test_a_row_that_is_all_padding_is_zero_and_counted(llama):
    ids, extra = left_padded([tokens()[0], tokens()[0][:0]], 200)
    with sparse_patch.patch(llama, "flexprefill", **FLEX) as handle:
        got = logits(llama, ids, **extra)
        torch.testing.assert_close(got[0], logits(llama, tokens())[0], atol=5e-5, rtol=0)
    assert bool(torch.isfinite(got).all())
    assert handle.report().exact == {"all padding": 4}


def test_an_empty_batch_is_exact_and_counted(llama):
    """Transformers' own Llama cannot reshape one, so this asks the attention alone."""
    module = llama.model.layers[0].self_attn
    q, kv = torch.randn(0, 4, 200, 16), torch.randn(0, 2, 200, 16)
    with sparse_patch.patch(llama, "flexprefill", **FLEX) as handle:
        for mask in (None, torch.ones(0, 200).bool()):
            assert attention_function(module, q, kv, kv, mask)[0].shape == (0, 200, 4, 16)
    assert handle.report().exact == {"empty batch": 2}


def test_where_no_backend_runs_it_is_exact_and_tried_once(llama, monkeypatch):
    tried = []

    def unavailable(*_, **__):
        tried.append(1)
        raise BackendUnavailable("no compiler, no Triton")

    want = logits(llama, tokens())
    monkeypatch.setattr(layer, "block_sparse_attention", unavailable)
    with sparse_patch.patch(llama, "flexprefill", **FLEX) as handle:
        with pytest.warns(SparsePatchWarning, match="no sparse backend runs on this device"):
            got = [logits(llama, tokens()) for _ in range(2)]
    for one in got:
        torch.testing.assert_close(one, want, atol=1e-4, rtol=0)
    assert handle.report().exact == {"no backend": 8}
    assert len(tried) == 1
    with sparse_patch.patch(llama, "flexprefill", backend="cpu", **FLEX):
        with pytest.raises(BackendUnavailable):
            logits(llama, tokens())


# --- chunks, turns, caches -----------------------------------------------------------------------


def test_chunks_and_turns_run_sparse_with_their_offset(llama):
    ids = tokens(length=300)
    with sparse_patch.patch(llama, "flexprefill", **FLEX) as handle, torch.no_grad():
        first = llama(ids[:, :150], use_cache=True)
        llama(ids[:, 150:], past_key_values=first.past_key_values)
    assert handle.report().sparse_calls == 8


def test_a_few_queries_against_a_long_cache_run_exact(llama):
    """Speculative decoding verifies a handful of tokens at once."""
    ids = tokens(length=210)
    want = logits(llama, ids)
    with sparse_patch.patch(llama, "dense", **{**KEEP, "min_queries": 64}) as handle:
        with torch.no_grad():
            first = llama(ids[:, :200], use_cache=True)
            got = llama(ids[:, 200:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(got, want[:, 200:], atol=5e-5, rtol=0)
    assert handle.report().exact == {"few queries": 4}


def test_assisted_generation_equals_plain_generation(llama):
    ids = tokens(length=100)
    options = {"max_new_tokens": 12, "do_sample": False}
    want = llama.generate(ids, **options)
    with sparse_patch.patch(llama, "dense", **{**KEEP, "min_queries": 64}) as handle:
        got = llama.generate(ids, assistant_model=tiny_model("llama"), **options)
    assert torch.equal(got, want)
    assert handle.report().exact["few queries"] > 0


def test_decode_is_exact_and_never_warns(llama):
    with sparse_patch.patch(llama, "flexprefill", **FLEX) as handle:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            llama.generate(tokens(), max_new_tokens=5, do_sample=False)
    assert handle.report().exact == {"decode": 16}
    assert handle.report().sparse_calls == 4


def test_a_static_cache_runs_exact_and_says_so(llama):
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    want = llama.generate(tokens(), **options)
    with sparse_patch.patch(llama, "flexprefill", **FLEX) as handle:
        with pytest.warns(SparsePatchWarning, match="static cache"):
            got = llama.generate(tokens(), **options)
    assert torch.equal(got, want)
    assert handle.report().exact["mask"] == 4
    assert handle.report().sparse_calls == 0


# --- what a method cannot do ---------------------------------------------------------------------


def exact_only(model, ids, reason, **inputs):
    """Patched logits equal unpatched ones, all calls are counted as `reason`, one warning."""
    want = model(ids, **inputs).logits
    with sparse_patch.patch(model, "flexprefill", **FLEX) as handle:
        with pytest.warns(SparsePatchWarning) as caught:
            got, _ = (model(ids, **inputs).logits for _ in range(2))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert set(handle.report().exact) == {reason}
    assert handle.report().sparse_calls == 0
    assert [str(w.message).count(f"({reason})") for w in caught] == [1]


def test_training_mode_runs_exact(llama):
    exact_only(llama.train(), tokens(), "training")


def test_recorded_gradients_run_exact(llama):
    exact_only(llama, tokens(), "gradients")


@torch.no_grad()
def test_a_mask_of_the_users_own_runs_exact(llama):
    mask = torch.rand(1, 1, 200, 200, generator=torch.Generator().manual_seed(0)) < 0.5
    mask |= torch.eye(200, dtype=torch.bool)
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    exact_only(llama, tokens(), "mask", attention_mask=added)
    llama.set_attn_implementation("sdpa")  # eager would add a boolean mask to the logits
    exact_only(llama, tokens(), "mask", attention_mask=mask)


def test_training_with_padding_has_the_loss_and_gradients_of_sdpa(llama):
    llama.set_attn_implementation("sdpa")
    llama.train()
    llama.gradient_checkpointing_enable()
    ids, extra = left_padded([tokens(length=n)[0] for n in (60, 47)], 60)
    extra["labels"] = ids.masked_fill(extra["attention_mask"] == 0, -100)

    def step():
        llama.zero_grad()
        loss = llama(ids, **extra).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in llama.named_parameters()}

    loss, grads = step()
    with sparse_patch.patch(llama, "flexprefill", **FLEX) as handle:
        patched_loss, patched_grads = step()
    torch.testing.assert_close(patched_loss, loss, atol=1e-5, rtol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(patched_grads[name], grad, atol=2e-4, rtol=1e-3)
    assert handle.report().sparse_calls == 0


def test_short_sequences_run_exact_without_a_warning(llama):
    ids = tokens()
    with sparse_patch.patch(llama, "flexprefill", **{**FLEX, "min_length": 201}) as handle:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits(llama, ids)
    assert handle.report().exact == {"short": 4}


def test_a_row_that_is_short_without_its_padding_runs_exact(llama):
    ids, extra = left_padded([tokens(length=n)[0] for n in (200, 100)], 200)
    with sparse_patch.patch(llama, "flexprefill", **{**FLEX, "min_length": 150}) as handle:
        logits(llama, ids, **extra)
    assert handle.report().exact == {"short": 4}
    assert handle.report().sparse_calls == 4


def test_nan_in_q_runs_exact_and_warns(llama):
    with torch.no_grad():
        llama.model.layers[2].self_attn.q_proj.weight[0, 0] = float("nan")
    with sparse_patch.patch(llama, "flexprefill", **FLEX) as handle:
        with pytest.warns(SparsePatchWarning, match="NaN or infinity"):
            got = logits(llama, tokens())
    assert bool(got.isnan().any())
    assert handle.report().exact == {"non-finite": 2}


def test_on_a_gpu_one_infinity_in_a_key_shows_in_every_row(monkeypatch):
    monkeypatch.setattr(layer, "waits", lambda x: True)
    q, k, v = (torch.randn(2, 256, 16) for _ in range(3))
    k[1, -1, 3] = float("inf")  # which no row but the last sees
    options = routing.Options(0, 1, "auto", False)
    state = layer.LayerState(0, sparse_patch.get_method("a_shape", sink=8, window=64), options)
    plain = call.Call(0.25)
    broken, _ = layer.run_sparse(state, q, k, v, plain)
    assert bool(broken.out.isnan().all())
    whole, _ = layer.run_sparse(state, q, k.nan_to_num(posinf=0), v, plain)
    assert bool(torch.isfinite(whole.out).all())


@pytest.mark.parametrize(
    ("family", "reasons"),
    [
        ("gemma2", {"sliding window"}),
        ("gpt_oss", {"sliding window"}),
        ("mistral_swa", {"sliding window"}),
        ("cohere2", {"sliding window"}),
    ],
)
def test_special_layers_are_counted_by_reason(family, reasons):
    model = tiny_model(family)
    with sparse_patch.patch(model, "flexprefill", **FLEX) as handle:
        logits(model, tokens())
    assert set(handle.report().exact) == reasons


def test_an_unknown_family_with_an_indexer_is_refused():
    model = tiny_model("deepseek_v32")
    model.config.model_type = "deepseek_v99"
    with pytest.raises(ValueError, match="DeepseekV32Indexer"):
        sparse_patch.patch(model, "flexprefill")


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 9, dtype=torch.bool),  # longer than the keys
        torch.ones(2, 8, dtype=torch.bool),  # another batch
        torch.zeros(1, 8),  # to be added: 0 would mean visible, not padding
        torch.ones(1, 8, 8, dtype=torch.bool),
    ],
    ids=lambda m: f"{tuple(m.shape)} {m.dtype}",
)
def test_a_mask_that_could_be_misread_is_an_error(llama, mask):
    module = llama.model.layers[0].self_attn
    q, kv = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    with sparse_patch.patch(llama, "dense", **KEEP):
        with pytest.raises(ValueError, match="neither 4-D nor boolean padding"):
            attention_function(module, q, kv, kv, mask)


def test_a_model_that_selects_keys_itself_is_never_overruled(llama):
    """The families are refused by name; a new one shows by what it passes."""
    module = llama.model.layers[0].self_attn
    q, kv = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    for name in ("indices", "block_indices"):
        with pytest.raises(RuntimeError, match="selects keys itself"):
            attention_function(module, q, kv, kv, None, **{name: torch.zeros(1)})
    with pytest.raises(RuntimeError, match="without what continuous batching says"):
        attention_function(module, q, kv, kv, None, cache=object())


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("falcon", "AttentionInterface"),
        ("deepseek_v32", "selects keys itself"),
        ("t5", "encoder-decoder"),
    ],
)
def test_models_that_cannot_be_patched_are_refused_untouched(family, message):
    model = tiny_model(family)
    before = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        sparse_patch.patch(model, "flexprefill")
    assert {name: sorted(module.__dict__) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "flexprefil"}, ValueError, "did you mean 'flexprefill'"),
        ({"gamma": 2}, ValueError, "gamma=2"),
        ({"gama": 0.5}, ValueError, "did you mean 'gamma'"),
        ({"layers": [4]}, ValueError, r"layers: no attention layer \[4\]"),
        ({"dense_layers": [-5]}, ValueError, "dense_layers"),
        ({"min_length": -1}, ValueError, "min_length=-1"),
        ({"measure_recall": -1}, ValueError, "measure_recall=-1"),
        ({"backend": "cuda"}, ValueError, "choose one of"),
        ({"backend": "triton"}, BackendUnavailable, "triton"),
        ({"method": 3}, ValueError, "method=3"),
        ({"method": sparse_patch.get_method("dense"), "gamma": 1}, ValueError, r"\['gamma'\]"),
    ],
)
def test_bad_arguments_are_named_before_anything_changes(
    llama, options, error, message, monkeypatch
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = {"method": "flexprefill", **options}
    with pytest.raises(error, match=message):
        sparse_patch.patch(llama, **options)
    assert llama.config._attn_implementation == "eager"
    assert "_sparse_patch_book" not in llama.model.__dict__


@pytest.mark.parametrize("thing", [None, "llama", torch.nn.Linear(2, 2)])
def test_what_is_no_transformers_model_is_refused(thing):
    with pytest.raises(TypeError, match="Transformers model"):
        sparse_patch.patch(thing, "flexprefill")


def test_attention_weights_are_refused_not_silently_empty(llama):
    with sparse_patch.patch(llama, "flexprefill", **FLEX):
        with pytest.raises(ValueError, match="no attention weights"):
            llama(tokens(), output_attentions=True)


def test_the_name_avoids_what_transformers_reads_meaning_into():
    for word in ("flash", "sdpa", "flex_attention", "paged|", "/"):
        assert word not in patching.NAME


# --- other machinery -----------------------------------------------------------------------------


def test_only_the_text_tower_of_a_vision_language_model_is_patched():
    model = tiny_model("gemma3_vlm")
    ids = tokens(length=60)
    ids[:, 10:14] = 5  # one image of four tokens
    kinds = (ids == 5).long()
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": images, "token_type_ids": kinds}
    want, text = logits(model, ids, **inputs), logits(model, tokens())
    with sparse_patch.patch(model, "dense", **KEEP) as handle:
        vision = model.config.vision_config._attn_implementation
        got, got_text = logits(model, ids, **inputs), logits(model, tokens())
        assert vision == "eager"
        assert not any(hasattr(m, "_sparse_patch") for m in model.model.vision_tower.modules())
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(got_text, text, atol=1e-4, rtol=0)
    assert handle.report().sparse_calls == 2  # the text-only prompt, on the two full layers


@pytest.mark.parametrize("case", ["no mask", "all ones", "padded"])
def test_a_compiled_model_still_runs_sparse(llama, case):
    ids, extra = tokens(batch=2), {}
    if case != "no mask":
        extra["attention_mask"] = torch.ones(2, 200).long()
    if case == "padded":
        ids, extra = left_padded([tokens(length=n)[0] for n in (200, 150)], 200)
    with sparse_patch.patch(llama, "flexprefill", **FLEX) as handle:
        want = logits(llama, ids, **extra)
        compiled = torch.compile(llama, backend="eager", fullgraph=True)
        got = logits(compiled, ids, **extra)
    real = extra.get("attention_mask", torch.ones(2, 200)).bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-4, rtol=0)
    assert handle.report().sparse_calls == 16
    torch._dynamo.reset()


def test_compiled_layers_are_whole_graphs_that_follow_the_patch(llama):
    """One graph a layer through AOTAutograd; patched anew or a copy, the right counts go up."""
    ids = tokens(batch=2)
    for block in llama.model.layers:
        block.self_attn.compile(fullgraph=True, backend="aot_eager")
    plain = logits(llama, ids)
    with sparse_patch.patch(llama, "flexprefill", **FLEX) as handle:
        got = logits(llama, ids)
        assert handle.report().sparse_calls == 8
        clone = copy.deepcopy(llama)
        torch.testing.assert_close(logits(clone, ids), got, atol=1e-4, rtol=0)
        assert sparse_patch.report(clone).sparse_calls == 16
    assert handle.report().sparse_calls == 8
    with sparse_patch.patch(llama, "flexprefill", **FLEX) as handle:
        torch.testing.assert_close(logits(llama, ids), got, atol=1e-4, rtol=0)
        assert handle.report().sparse_calls == 8
    torch.testing.assert_close(logits(llama, ids), plain, atol=1e-4, rtol=0)
    torch._dynamo.reset()


def test_a_compiled_model_has_gradients(llama):
    ids = tokens()
    with sparse_patch.patch(llama, "flexprefill", **FLEX) as handle:
        compiled = torch.compile(llama, backend="aot_eager")
        compiled(ids, labels=ids).loss.backward()
        got = llama.model.embed_tokens.weight.grad.clone()
    assert handle.report().exact == {"gradients": 4}
    llama.zero_grad()
    llama(ids, labels=ids).loss.backward()
    torch.testing.assert_close(got, llama.model.embed_tokens.weight.grad, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


def test_a_graph_does_not_outlive_its_patch():
    with pytest.raises(RuntimeError, match="belongs to a removed patch"):
        layer.LayerState.of_handle(10**9)


def test_a_compiled_model_without_a_cache_warns_that_it_runs_exact(llama):
    want = logits(llama, tokens(), use_cache=False)
    with sparse_patch.patch(llama, "flexprefill", **FLEX) as handle:
        compiled = torch.compile(llama, backend="eager")
        with pytest.warns(SparsePatchWarning, match="torch.compile with use_cache=False"):
            got = logits(compiled, tokens(), use_cache=False)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert handle.report().exact == {"mask": 4}
    torch._dynamo.reset()


def test_recall_is_measured_on_request(llama):
    with sparse_patch.patch(llama, "dense", measure_recall=True, **KEEP) as handle:
        logits(llama, tokens())
    assert handle.report().recall == pytest.approx(1.0)
    with sparse_patch.patch(llama, "flexprefill", measure_recall=64, **FLEX) as handle:
        logits(llama, tokens())
    assert 0 < handle.report().recall < 1


def test_a_backend_named_by_the_user_is_the_one_that_runs(llama):
    ids = tokens()
    with sparse_patch.patch(llama, "flexprefill", backend="reference", **FLEX):
        want = logits(llama, ids)
    with sparse_patch.patch(llama, "flexprefill", backend="cpu", **FLEX):
        torch.testing.assert_close(logits(llama, ids), want, atol=5e-5, rtol=0)


def test_the_report_reads_as_a_table_and_as_json(llama):
    import json

    with sparse_patch.patch(llama, "flexprefill", dense_layers=1, **FLEX) as handle:
        logits(llama, tokens())
    lines = str(handle.report()).splitlines()
    assert lines[0] == "FlexPrefill(gamma=0.5, min_budget=1, block_size=16)"
    assert len(lines) == 2 + 4 + 1
    assert lines[2].split() == ["0", "1", "0", "-", "-", "layer", "kept", "dense", "1"]
    assert json.loads(json.dumps(handle.report().to_dict()))["sparse_calls"] == 3


def test_reprs_are_a_line_and_notebooks_show_tables(llama):
    with sparse_patch.patch(llama, "flexprefill", dense_layers=1, **FLEX) as handle:
        logits(llama, tokens())
        method = "FlexPrefill(gamma=0.5, min_budget=1, block_size=16)"
        assert repr(handle) == f"<Patch of LlamaForCausalLM, active: {method} in 3 layers>"
        page = handle._repr_html_()
    assert "LlamaForCausalLM, removed" in repr(handle)
    found = handle.report()
    assert repr(found) == (
        f"<Report of {method}, 4 layers: 3 of 4 calls sparse, density {found.density:.3f}, "
        "1 exact (layer kept dense)>"
    )
    assert "gamma=0.5, tau=" in found.method  # all parameters
    assert page.count("<tr>") == 2 + 5  # all layers, and each
    assert f"<td>all</td><td>4</td><td>3</td><td>{found.density:.3f}</td>" in page
    assert "&lt;Patch of" in page


def test_a_long_parameter_is_cut(llama):
    with sparse_patch.patch(llama, "pbs", tau=tuple([0.5] * 40), min_length=10**6) as handle:
        assert len(repr(handle)) < 200
        assert len(repr(handle.report())) < 200
        assert "..." in repr(handle)


def test_what_has_no_text_of_ours_in_it_is_escaped_in_notebooks(llama):
    class Odd:
        sparse_decode = False

        def plan(self, q, k, *, scale, q_offset):
            return None

        def __repr__(self):
            return "<b>odd"

    with sparse_patch.patch(llama, Odd()) as handle:
        assert "<b>" not in handle._repr_html_()
        assert "&lt;b&gt;odd" in handle._repr_html_()


def test_of_a_pipeline_the_model_is_patched(llama):
    backend = Tokenizer(WordLevel({"word": 6, "?": 7}, unk_token="?"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    pipeline = TextGenerationPipeline(llama, tokenizer)
    with sparse_patch.patch(pipeline, "flexprefill", **FLEX) as handle:
        pipeline("word " * 200, max_new_tokens=1, do_sample=False)
        assert sparse_patch.report(pipeline).sparse_calls == 4
        want = logits(llama, tokens())
        inspected = sparse_patch.inspect(pipeline, tokens(), min_length=0)
    assert handle.model is llama
    assert len(inspected.layers) == 4
    sparse_patch.patch(llama, "flexprefill", **FLEX)
    assert torch.equal(logits(llama, tokens()), want)
    sparse_patch.unpatch(pipeline)
    with pytest.raises(ValueError, match="not patched"):
        sparse_patch.report(llama)


@pytest.mark.parametrize("holder", [None, "model", types.SimpleNamespace(model="llama")])
def test_what_holds_no_model_is_refused(holder):
    with pytest.raises(TypeError, match="is not, and does not hold, a Transformers model"):
        sparse_patch.patch(holder)


def test_patching_a_thousand_times_leaves_nothing_behind(llama):
    before = {name: len(module.__dict__) for name, module in llama.named_modules()}
    for _ in range(1000):
        with sparse_patch.patch(llama, "flexprefill"):
            pass
    assert {name: len(module.__dict__) for name, module in llama.named_modules()} == before
    assert not llama._forward_pre_hooks
