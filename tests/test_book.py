"""Patches written on models that share configs or decoders, and taken off again."""

import copy
import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparse_patch
from sparse_patch import SparsePatchWarning
from sparse_patch.attention import STATE
from tests.zoo import LAYERS, snapshot, tiny_model

ANY = {"min_length": 0, "sink": 1, "window": 9}


@pytest.fixture
def llama():
    return tiny_model("llama")


def tokens(length=60):
    return torch.randint(6, 128, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(model):
    return model(tokens())[0]


def name_of(model):
    return model.config._attn_implementation


# --- one config under several models -------------------------------------------------------------


def of_the_same_config(model):
    other = AutoModelForCausalLM.from_config(model.config).eval()
    assert other.config is model.config
    return other


@pytest.mark.parametrize("first_out", [0, 1])
def test_models_that_share_a_config_are_patched_apart(llama, first_out):
    models = [llama, of_the_same_config(llama)]
    before = [run(model) for model in models]
    name = name_of(llama)
    patches = [sparse_patch.patch(model, "a_shape", **ANY) for model in models]
    patches[first_out].remove()
    torch.testing.assert_close(run(models[first_out]), before[first_out], atol=1e-5, rtol=0)
    assert (run(models[1 - first_out]) - before[1 - first_out]).abs().max() > 1e-3
    assert patches[1 - first_out].report().sparse_calls == LAYERS
    patches[1 - first_out].remove()
    assert name_of(llama) == name
    assert all(
        torch.equal(run(model), logits) for model, logits in zip(models, before, strict=True)
    )


def test_an_unpatched_model_of_a_shared_config_is_exact(llama, recwarn):
    other = of_the_same_config(llama)
    want = run(other)
    with sparse_patch.patch(llama, "a_shape", **ANY):
        torch.testing.assert_close(run(other), want, atol=1e-5, rtol=0)
    assert torch.equal(run(other), want)
    assert not recwarn.list


def test_a_model_that_is_gone_holds_nothing(llama):
    other = of_the_same_config(llama)
    name = name_of(llama)
    sparse_patch.patch(other, "a_shape", **ANY)
    del other
    gc.collect()
    sparse_patch.patch(llama, "a_shape", **ANY).remove()
    assert name_of(llama) == name


def test_a_copy_that_shares_the_config_holds_it_too(llama):
    name = name_of(llama)
    handle = sparse_patch.patch(llama, "a_shape", **ANY)
    clone = copy.deepcopy(llama, {id(llama.config): llama.config})
    assert clone.config is llama.config
    handle.remove()
    run(clone)
    assert sparse_patch.report(clone).sparse_calls == LAYERS
    sparse_patch.unpatch(clone)
    assert name_of(llama) == name


# --- two ways to one decoder ---------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_vlm"])
@pytest.mark.parametrize("inner_first", [True, False])
def test_a_model_and_its_decoder_have_one_book(family, inner_first):
    model = tiny_model(family)
    state, ways = snapshot(model), [model, model.get_decoder()]
    if inner_first:
        ways.reverse()
    outer, inner = (sparse_patch.patch(way, "a_shape", **ANY) for way in ways)
    run(model)
    assert (outer.report().calls, inner.report().calls > 0) == (0, True)
    assert all(sparse_patch.report(way).calls == inner.report().calls for way in ways)
    inner.remove()
    run(model)
    assert outer.report().calls == inner.report().calls
    sparse_patch.patch(ways[1], "a_shape", **ANY)
    sparse_patch.unpatch(ways[0])
    assert snapshot(model) == state
    with pytest.raises(ValueError, match="not patched"):
        sparse_patch.report(ways[1])


def test_the_outer_patch_outlives_the_inner_one_of_the_decoder(llama):
    outer = sparse_patch.patch(llama, "a_shape", **ANY)
    sparse_patch.patch(llama.model, "dense", **{"min_length": 0}).remove()
    run(llama)
    assert outer.report().sparse_calls == LAYERS
    with pytest.raises(ValueError, match="no attention weights"):
        llama.model(tokens(), output_attentions=True)


# --- another implementation, meanwhile -----------------------------------------------------------


@pytest.mark.parametrize("asked", ["eager", "sdpa", {"": "eager"}])
def test_an_implementation_asked_for_meanwhile_is_told_of_and_left(llama, asked):
    handle = sparse_patch.patch(llama, "a_shape", **ANY)
    llama.set_attn_implementation(asked)
    name = asked if isinstance(asked, str) else asked[""]
    with pytest.warns(
        SparsePatchWarning, match=f"changed to attn_implementation='{name}'"
    ) as caught:
        got = [run(llama), run(llama)][1]
    assert len(caught) == 1
    handle.remove()
    assert name_of(llama) == name
    torch.testing.assert_close(run(llama), got, atol=1e-5, rtol=0)
    assert not any(hasattr(module, STATE) for module in llama.modules())


def test_a_patch_after_another_choice_gives_that_choice_back(llama):
    outer = sparse_patch.patch(llama, "a_shape", **ANY)
    llama.set_attn_implementation("sdpa")
    inner = sparse_patch.patch(llama, "a_shape", **ANY)
    run(llama)
    assert inner.report().sparse_calls == LAYERS
    outer.remove()
    inner.remove()
    assert name_of(llama) == "sdpa"


def test_our_name_without_a_patch_is_told_of_once(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    named = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="sparse_patch"
    ).eval()
    with pytest.warns(SparsePatchWarning, match="name alone chooses no method") as caught:
        got = [run(named), run(named)]
    assert len(caught) == 1
    torch.testing.assert_close(got[0], run(llama), atol=1e-5, rtol=0)
    with sparse_patch.patch(named, "a_shape", **ANY) as handle:
        run(named)
    assert handle.report().sparse_calls == LAYERS
    assert name_of(named) == "sparse_patch"


def test_layers_left_out_of_a_patch_are_not_told_of(llama, recwarn):
    with sparse_patch.patch(llama, "a_shape", layers=[1], **ANY):
        run(llama)
    assert not recwarn.list
