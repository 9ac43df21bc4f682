"""The kernel that keeps the largest entries within a limit, against the plain function."""

import pytest
import torch
from sparse_patch_kernels.estimators.threshold import largest_within

from tests.kernels.interpreted import poison_empty, require_interpreter

threshold = require_interpreter("estimators.threshold.kernel")


def rows_of(kind):
    torch.manual_seed(0)
    peaked = (torch.randn(3, 900) * 3).softmax(-1)
    return {
        "peaked": peaked,
        # Eighths add up without rounding, and equals are many.
        "equals": torch.randint(0, 4, (4, 70)).float() / 8,
        "zeros": peaked.masked_fill(torch.rand(3, 900) < 0.7, 0.0),
        "one": torch.ones(2, 1),
    }[kind]


@pytest.mark.parametrize("kind", ["peaked", "equals", "zeros", "one"])
@pytest.mark.parametrize("limit", [0.0, 0.4, 0.8125, 5.0, 1e9])
def test_keeps_what_the_plain_function_keeps(kind, limit, monkeypatch):
    mass = rows_of(kind)
    want = largest_within.plain(mass, limit)
    poison_empty(monkeypatch)
    got = threshold.largest_within(mass, limit)
    assert got.dtype == torch.bool
    assert torch.equal(got, want)


def test_more_than_a_tile_of_entries():
    torch.manual_seed(1)
    mass = torch.rand(2, 5000)
    assert torch.equal(threshold.largest_within(mass, 1000.0), largest_within.plain(mass, 1000.0))
