"""What is captured of a model is what its attention computes with."""

import pytest
import torch
from sparse_patch_eval.ask.capture import capture
from sparse_patch_eval.ask.judge import dense_output

from tests.zoo import tiny_model


def ids(n, seed=0):
    return torch.randint(3, 100, (1, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "granite", "olmo2"])
@torch.no_grad()
def test_captured_q_k_v_give_the_models_own_attention(family):
    model = tiny_model(family)
    own, hooks = {}, []
    for index, layer in enumerate(model.model.layers):

        def keep(_, args, index=index):
            own[index] = args[0][0]

        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(keep))
    logits = model(ids(70)).logits[0]
    for hook in hooks:
        hook.remove()
    seen = capture(model, ids(70), logits_to_keep=70)
    assert sorted(seen.layers) == [0, 1, 2, 3]
    torch.testing.assert_close(seen.logits, logits, atol=1e-5, rtol=1e-4)
    for index, attention in seen.layers.items():
        out = dense_output(attention).transpose(0, 1).flatten(1)
        torch.testing.assert_close(out, own[index], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_only_the_layers_asked_for_and_the_model_is_left_as_it_was():
    model = tiny_model("llama")
    before = model(ids(40)).logits
    seen = capture(model, ids(40), [1, -1])
    assert sorted(seen.layers) == [1, 3]
    assert seen.logits.shape == (1, 128)
    assert seen.cache.get_seq_length() == 40
    assert torch.equal(model(ids(40)).logits, before)


def test_logits_of_chosen_rows():
    model = tiny_model("llama")
    rows = torch.tensor([3, 17, 38])
    every = capture(model, ids(40), [0], logits_to_keep=40).logits
    torch.testing.assert_close(
        capture(model, ids(40), [0], logits_to_keep=rows).logits, every[rows]
    )


def test_a_layer_that_is_not_plain_causal_attention_is_named():
    model = tiny_model("mistral_swa")
    with pytest.raises(ValueError, match=r"layer 0 cannot be captured.*sliding window"):
        capture(model, ids(40))


def test_a_layer_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="no attention layer"):
        capture(tiny_model("llama"), ids(40), [7])
