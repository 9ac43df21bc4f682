"""`inspect`: every number against its definition, on a tiny model."""

import json

import pytest
import torch
from sparse_patch_eval.ask.capture import capture

import sparse_patch
from tests.zoo import tiny_model

N = 200
FLEX = {"gamma": 0.5, "min_budget": 1, "block_size": 16}


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(6, 128, (1, N), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def found(llama, ids):
    return sparse_patch.inspect(llama, ids, "flexprefill", rows=0, resolution=7, **FLEX)


@pytest.fixture(scope="module")
def inside(llama, ids):
    return capture(llama, ids).layers


def plan_of(attention):
    method = sparse_patch.get_method("flexprefill", **FLEX)
    return method.plan(attention.q, attention.k, scale=attention.scale, q_offset=0)


def probabilities(attention):
    """float32 `[heads, N, N]`."""
    group = len(attention.q) // len(attention.k)
    scores = attention.q @ attention.k.repeat_interleave(group, 0).mT * attention.scale
    return scores.masked_fill(torch.ones(N, N).triu(1).bool(), float("-inf")).softmax(-1)


def test_density_and_recall_are_those_of_the_plan_on_dense_activations(found, inside):
    assert [view.layer for view in found.layers] == [0, 1, 2, 3]
    assert found.rows == N
    for view in found.layers:
        attention = inside[view.layer]
        plan = plan_of(attention)
        want = sparse_patch.recall(attention.q, attention.k, plan, scale=attention.scale)
        got = torch.tensor([head.recall for head in view.heads])
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        assert [head.density for head in view.heads] == pytest.approx(plan.head_density().tolist())
        kept = (probabilities(attention) * plan.to_dense_mask()).sum(-1)
        for head, rows in zip(view.heads, kept, strict=True):
            assert head.worst_recall == pytest.approx(float(rows.min()), abs=1e-5)
            assert float(rows[head.worst_row]) == pytest.approx(head.worst_recall, abs=1e-5)
    assert 0 < found.density < 0.9
    assert found.worst_heads(1)[0][1].recall == min(
        head.recall for view in found.layers for head in view.heads
    )


def test_maps_hold_the_mass_what_is_lost_and_the_share_of_pairs(found, inside):
    assert found.band == 29
    for view in found.layers:
        attention = inside[view.layer]
        probs, shown = probabilities(attention), plan_of(attention).to_dense_mask()
        causal = torch.ones(N, N).tril().bool()
        for band in range(7):
            rows = slice(band * 29, (band + 1) * 29)
            for other in range(7):
                keys = slice(other * 29, (other + 1) * 29)
                part = probs[:, rows, keys]
                mass = part.sum(-1).mean(-1)
                lost = (part * ~shown[:, rows, keys]).sum(-1).mean(-1)
                pairs = int(causal[rows, keys].sum())
                kept = (shown & causal)[:, rows, keys].sum((1, 2)) / max(1, pairs)
                torch.testing.assert_close(view.mass[:, band, other], mass, atol=1e-5, rtol=0)
                torch.testing.assert_close(view.lost[:, band, other], lost, atol=1e-5, rtol=0)
                torch.testing.assert_close(view.kept[:, band, other], kept, atol=1e-5, rtol=0)


def test_the_next_token_is_that_of_a_patched_prefill(llama, ids, found):
    with torch.no_grad():
        dense = llama(ids).logits[0, -1].log_softmax(-1)
        with sparse_patch.patch(llama, "flexprefill", min_length=0, min_queries=0, **FLEX):
            sparse = llama(ids).logits[0, -1].log_softmax(-1)
    kl = float((dense.exp() * (dense - sparse)).sum())
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert found.kl > 0
    assert (found.dense_token, found.sparse_token) == (int(dense.argmax()), int(sparse.argmax()))


def test_errors_are_of_the_output_and_none_where_all_is_kept(llama, ids, found):
    assert all(0 < head.error < 2 for view in found.layers for head in view.heads)
    whole = sparse_patch.inspect(llama, ids, "a_shape", sink=0, window=N - 1)
    assert whole.recall == pytest.approx(1, abs=0.01)
    assert max(view.error for view in whole.layers) < 0.1
    assert whole.kl == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("pbs", {"block_size": 16, "segment": 32, "tau": 0.5}),
        ("hip", {"block_q": 16, "block_k": 2, "mask_k": 16, "sink": 4, "window": 8}),
    ],
)
def test_plans_of_every_form_are_judged(llama, ids, inside, method, params):
    found = sparse_patch.inspect(llama, ids, method, rows=0, dense_layers=0, **params)
    for view in found.layers:
        attention = inside[view.layer]
        plan = sparse_patch.get_method(method, **params).plan(
            attention.q, attention.k, scale=attention.scale, q_offset=0
        )
        want = sparse_patch.recall(attention.q, attention.k, plan, scale=attention.scale)
        got = torch.tensor([head.recall for head in view.heads])
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            view.mass.sum(-1) - view.lost.sum(-1) <= 1.0001, torch.ones(4, len(view.mass[0])).bool()
        )


def test_a_sample_of_rows_holds_the_last_one_and_ends_of_bands(llama, ids):
    found = sparse_patch.inspect(llama, ids, "flexprefill", rows=20, resolution=8, **FLEX)
    assert found.band == 25
    assert found.rows == 16
    assert {head.worst_row % 25 in (11, 24) for view in found.layers for head in view.heads} == {
        True
    }
    odd = sparse_patch.inspect(llama, ids[:, :-3], "flexprefill", rows=8, resolution=8, **FLEX)
    assert odd.rows == 8  # seven ends of bands, and the last row


def test_exact_layers_say_why(llama, ids):
    found = sparse_patch.inspect(llama, ids, "flexprefill", dense_layers=[1], **FLEX)
    assert found.layers[1].exact == "layer kept dense"
    assert found.layers[1].heads == ()
    assert (found.layers[1].density, found.layers[1].recall, found.layers[1].error) == (1, 1, 0)
    short = sparse_patch.inspect(llama, ids, "flexprefill", min_length=1000, **FLEX)
    assert {view.exact for view in short.layers} == {"short"}
    assert short.kl == pytest.approx(0, abs=1e-6)
    none = sparse_patch.inspect(llama, ids, "a_shape")  # a window of 4k holds it all
    assert {view.exact for view in none.layers} == {"method"}


def test_the_method_of_a_patched_model_is_the_default_and_the_model_is_left_alone(llama, ids):
    seen = []
    with sparse_patch.patch(llama, "flexprefill", min_length=0, **FLEX) as handle:
        found = sparse_patch.inspect(llama, {"input_ids": ids}, on_layer=seen.append)
        assert handle.report().calls == 0
        assert found.method == repr(handle.method)
    assert seen == [0, 1, 2, 3]
    assert llama.config._attn_implementation != "sparse_patch"
    with pytest.raises(ValueError, match=r"name a method, or call sparse_patch\.patch"):
        sparse_patch.inspect(llama, ids)


def test_it_prints_and_is_json(found):
    text = str(found)
    assert text.startswith("FlexPrefill(")
    assert "next token:" in text
    assert "\n    3 " in text
    content = json.loads(json.dumps(found.to_dict()))
    assert content["layers"][2]["heads"][1]["recall"] == found.layers[2].heads[1].recall
    assert content["seconds"]["dense"] > 0


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (torch.ones(2, 9, dtype=torch.long), {}, "one sequence"),
        (torch.ones(9, dtype=torch.long), {}, "one sequence"),
        (torch.ones(1, 0, dtype=torch.long), {}, r"at least one token; got \[1, 0\]"),
        (
            {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.tensor([[0, 1, 1]])},
            {},
            "without its padding",
        ),
        (torch.ones(1, 9, dtype=torch.long), {"rows": -1}, "rows=-1"),
        (torch.ones(1, 9, dtype=torch.long), {"gama": 1}, "gama"),
    ],
)
def test_bad_input_is_refused(llama, inputs, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sparse_patch.inspect(llama, inputs, "flexprefill", **options)
