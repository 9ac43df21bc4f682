"""Every method on every family: exact when it keeps everything, blind to padding when it does not.

The batch has two rows; the first is short by 13 left pads.
"""

import functools

import pytest
import torch

import sparse_patch
from tests.methods.examples import KEEP_ALL, SPARSE
from tests.zoo import (
    CHUNKED_LAYERS,
    FAMILIES,
    LAYERS,
    PADS,
    SPARSE_LAYERS,
    batch,
    logits,
    tiny_model,
)

LENGTH = 150


@functools.cache  # a patch leaves no trace: tests/test_matrix.py holds that for every family
def model_of(family):
    return tiny_model(family)


@functools.cache
def eager(family):
    return logits(model_of(family), **batch(LENGTH))


def patch(model, name, params):
    options = {"min_length": 0, "min_queries": 0, "dense_layers": 0}
    return sparse_patch.patch(model, name, **options, **params)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=sparse_patch.list_methods())
def name(request):
    return request.param


def test_keeping_everything_equals_eager(family, name):
    with patch(model_of(family), name, KEEP_ALL[name]):
        got = logits(model_of(family), **batch(LENGTH))
    real = batch(LENGTH)["attention_mask"].bool()
    assert (got - eager(family))[real].abs().max() <= 1e-5


def test_a_padded_row_chooses_as_the_row_alone(family, name):
    inputs = batch(LENGTH)
    model = model_of(family)
    with patch(model, name, SPARSE[name]) as handle:
        padded = logits(model, **inputs)[0, PADS:]
        report = handle.report()
        alone = logits(model, input_ids=inputs["input_ids"][:1, PADS:])[0]
    assert bool(torch.isfinite(padded).all())
    assert (padded - alone).abs().max() <= 1e-5
    sparse = [layer for layer in report.layers if layer.sparse_calls]
    all_of_them = SPARSE_LAYERS.get(family, LAYERS)  # but a chunk may be too short for a method
    assert all_of_them - CHUNKED_LAYERS.get(family, 0) <= len(sparse) <= all_of_them
    if sparse and name != "dense":
        assert report.density < 1
        different = (padded - eager(family)[0, PADS:]).abs().max()
        assert different > 1e-5  # something was dropped, and it shows
