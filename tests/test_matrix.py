"""Every family, patched with a method that keeps everything, answers as it does unpatched.

The batch has two rows; the first is short by 13 left pads. What may differ is float noise: the
logits are of magnitude 1, and the weights large enough that a wrong mask moves them by tenths.
"""

import pytest
import torch

import sparse_patch
from tests.zoo import (
    CHUNK,
    CHUNKED_LAYERS,
    FAMILIES,
    LAYERS,
    PADS,
    SPARSE_LAYERS,
    batch,
    logits,
    snapshot,
    tiny_model,
)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return tiny_model(family)


def patch(model, **options):
    return sparse_patch.patch(model, "dense", block_size=16, min_length=0, min_queries=0, **options)


def test_logits_equal_eager(model, family):
    inputs = batch()
    want = logits(model, **inputs)
    with patch(model) as handle:
        got = logits(model, **inputs)
    real = inputs["attention_mask"].bool()
    assert (got - want)[real].abs().max() <= 5e-6
    report = handle.report()
    sparse = [layer for layer in report.layers if layer.sparse_calls]
    assert len(sparse) == SPARSE_LAYERS.get(family, LAYERS)
    chunks = -(-40 // CHUNK) + -(-(40 - PADS) // CHUNK)
    calls = sorted(layer.sparse_calls for layer in sparse)
    chunked = CHUNKED_LAYERS.get(family, 0)
    assert calls == [2] * (len(sparse) - chunked) + [chunks] * chunked
    assert not any(layer.exact for layer in sparse)


def test_a_padded_row_equals_the_row_alone(model):
    inputs = batch()
    with patch(model):
        padded = logits(model, **inputs)[0, PADS:]
        alone = logits(model, input_ids=inputs["input_ids"][:1, PADS:])[0]
    assert (padded - alone).abs().max() <= 5e-6


def test_undo_is_bit_exact(model):
    inputs = batch()
    before, state = logits(model, **inputs), snapshot(model)
    patch(model)
    logits(model, **inputs)
    sparse_patch.unpatch(model)
    assert snapshot(model) == state
    assert torch.equal(logits(model, **inputs), before)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 16},
        {"num_beams": 2},
    ],
    ids=["dynamic", "static", "chunked", "beams"],
)
def test_generate_equals_eager(model, options):
    inputs = batch()
    del inputs["position_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    want = model.generate(**inputs, **options)
    with patch(model):
        got = model.generate(**inputs, **options)
    assert torch.equal(got, want)


@torch.no_grad()
def two_turns(model):
    inputs = batch()
    first = model(**inputs, use_cache=True)
    more = torch.randint(6, 128, (2, 21), generator=torch.Generator().manual_seed(8))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    positions = inputs["position_ids"][:, -1:] + 1 + torch.arange(21)
    return model(
        input_ids=more,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=first.past_key_values,
    ).logits


def test_second_turn_equals_eager(model, family):
    want = two_turns(model)
    with patch(model) as handle:
        got = two_turns(model)
    assert (got - want).abs().max() <= 5e-6
    sparse = [layer for layer in handle.report().layers if layer.sparse_calls >= 4]
    assert len(sparse) == SPARSE_LAYERS.get(family, LAYERS)
