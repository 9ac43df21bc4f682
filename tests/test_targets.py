"""Which modules a patch is about: what runs decides, not what was once written."""

import functools
import types
import warnings

import accelerate
import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama import modeling_llama as llama_code

import sparse_patch
from sparse_patch import SparsePatchWarning
from tests.zoo import LAYERS, batch, tiny_model

KEEP = {"block_size": 16, "min_length": 0, "min_queries": 0}
Attention = llama_code.LlamaAttention


@pytest.fixture
def llama():
    return tiny_model("llama", "sdpa")


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


def own_forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
    """What speed-up libraries put in the place of Llama's: SDPA, without asking anybody."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (
        p(hidden_states).view(shape).transpose(1, 2)
        for p in (self.q_proj, self.k_proj, self.v_proj)
    )
    q, k = llama_code.apply_rotary_pos_emb(q, k, *position_embeddings)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attention_mask, is_causal=attention_mask is None, enable_gqa=True
    )
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


def on_the_class(model, forward, monkeypatch):
    monkeypatch.setattr(Attention, "forward", forward)


def on_the_instance(model, forward, monkeypatch):
    for layer in model.model.layers:
        layer.self_attn.forward = types.MethodType(forward, layer.self_attn)


def on_one_instance(model, forward, monkeypatch):
    module = model.model.layers[2].self_attn
    module.forward = types.MethodType(forward, module)


def as_a_partial(model, forward, monkeypatch):
    for layer in model.model.layers:
        layer.self_attn.forward = functools.partial(forward, layer.self_attn)


WAYS = [on_the_class, on_the_instance, on_one_instance, as_a_partial]


@pytest.mark.parametrize("replace", WAYS)
def test_a_forward_that_does_not_ask_is_refused(llama, replace, monkeypatch):
    replace(llama, own_forward, monkeypatch)
    before = {name: sorted(module.__dict__) for name, module in llama.named_modules()}
    with pytest.raises(ValueError, match=r"forward of LlamaAttention was replaced .*test_targets"):
        sparse_patch.patch(llama, "dense")
    assert {name: sorted(module.__dict__) for name, module in llama.named_modules()} == before
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("replace", WAYS)
def test_a_forward_that_asks_is_as_good_as_the_first(llama, replace, monkeypatch):
    """Called by another function of another name, or wrapped."""
    written = Attention.forward

    def helper(module, *args, **kwargs):
        return written(module, *args, **kwargs)

    def asks(self, *args, **kwargs):
        found = llama_code.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, None
        )
        assert found is not None
        return helper(self, *args, **kwargs)

    @functools.wraps(written)
    def wrapped(self, *args, **kwargs):
        return written(self, *args, **kwargs)

    for forward in (asks, wrapped):
        replace(llama, forward, monkeypatch)
        with sparse_patch.patch(llama, "dense", **KEEP) as handle:
            logits(llama, **batch())
        assert handle.report().sparse_calls == 2 * LAYERS


@pytest.mark.parametrize("replace", WAYS)
def test_a_forward_replaced_after_the_patch_is_told_of_once(llama, replace, monkeypatch):
    ids = batch()["input_ids"]
    want = logits(llama, input_ids=ids)
    with sparse_patch.patch(llama, "dense", **KEEP):
        replace(llama, own_forward, monkeypatch)
        with pytest.warns(SparsePatchWarning, match=r"did not call our attention") as caught:
            got, _ = (logits(llama, input_ids=ids, use_cache=False) for _ in range(2))
        assert len(caught) == 1
        layers = [2] if replace is on_one_instance else [0, 1, 2, 3]
        assert f"layers {layers} did" in str(caught[0].message)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        with pytest.raises(RuntimeError, match="another library replaced a forward"):
            logits(llama, **batch(), use_cache=False)


def test_layers_that_are_asked_are_never_told_of(llama):
    with sparse_patch.patch(llama, "flexprefill", min_length=0), warnings.catch_warnings():
        warnings.simplefilter("error")
        llama.generate(**batch(), max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_an_error_in_a_forward_is_the_error_that_is_seen(llama):
    with sparse_patch.patch(llama, "dense", **KEEP) as handle:
        llama.model.norm.forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            logits(llama, **batch())
        del llama.model.norm.forward
        logits(llama, **batch())
    assert handle.report().sparse_calls == 4 * LAYERS


# --- layers that say no index --------------------------------------------------------------------


@pytest.mark.parametrize(
    "indices", [[-1, -1, -1, -1], [0, 0, 1, 1], [None, 1, 2, 3], [True, 1, 2, 3], ["a", 1, 2, 3]]
)
def test_layers_whose_index_is_none_are_told_apart_by_their_order(llama, indices):
    for layer, index in zip(llama.model.layers, indices, strict=True):
        layer.self_attn.layer_idx = index
    with sparse_patch.patch(llama, "a_shape", dense_layers=1, min_length=0, **SHAPE) as handle:
        logits(llama, **batch(), use_cache=False)
    assert [layer.layer for layer in handle.report().layers] == [0, 1, 2, 3]
    assert [layer.sparse_calls for layer in handle.report().layers] == [0, 2, 2, 2]
    with sparse_patch.patch(llama, "a_shape", layers=[-1], min_length=0) as handle:
        assert [layer.layer for layer in handle.report().layers] == [3]


SHAPE = {"sink": 1, "window": 9}


def test_a_missing_index_is_no_reason_to_stay_dense(llama):
    for layer in llama.model.layers:
        del layer.self_attn.layer_idx
    with sparse_patch.patch(llama, "a_shape", min_length=0, **SHAPE) as handle:
        logits(llama, **batch(), use_cache=False)
    assert [layer.sparse_calls for layer in handle.report().layers] == [2, 2, 2, 2]


def test_indices_with_gaps_are_the_models_own(llama):
    """As in hybrid models, whose other layers are not attention."""
    for index, layer in enumerate(llama.model.layers):
        layer.self_attn.layer_idx = 3 + 4 * index
    with sparse_patch.patch(llama, "a_shape", layers=[7, 15], min_length=0, **SHAPE) as handle:
        logits(llama, **batch(), use_cache=False)
    assert [layer.layer for layer in handle.report().layers] == [7, 15]


def test_a_module_used_at_several_layers_is_one_layer(llama):
    """Decode remembers nothing there: which of its caches a step goes on from is not known."""
    shared = llama.model.layers[0].self_attn
    shared.layer_idx = -1
    for layer in llama.model.layers:
        layer.self_attn = shared
    inputs = batch()
    want = logits(llama, **inputs, use_cache=False)
    with sparse_patch.patch(llama, "dense", **KEEP) as handle:
        got = logits(llama, **inputs, use_cache=False)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=0)
    assert [(layer.layer, layer.sparse_calls) for layer in handle.report().layers] == [(0, 8)]


# --- where weights lie and where they compute ----------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_offloaded_weights_compute_where_their_hook_says(llama, backend, how, tmp_path):
    ids = batch()["input_ids"]
    with sparse_patch.patch(llama, "a_shape", backend=backend, min_length=0, **SHAPE):
        want = logits(llama, input_ids=ids)
    if how == "cpu_offload":
        accelerate.cpu_offload(llama, execution_device="cpu")
    elif how == "disk_offload":
        accelerate.disk_offload(llama, tmp_path, execution_device="cpu")
    else:
        places = {name: "disk" if name == "model" else "cpu" for name in ("model", "lm_head")}
        accelerate.dispatch_model(llama, places, main_device="cpu", offload_dir=tmp_path)
    assert llama.device.type == "meta" or how == "dispatch_model"
    with sparse_patch.patch(llama, "a_shape", backend=backend, min_length=0, **SHAPE) as handle:
        torch.testing.assert_close(logits(llama, input_ids=ids), want, atol=1e-5, rtol=0)
    assert handle.report().sparse_calls == 2 * LAYERS
