"""A-shape: sink and window, to the token."""

import pytest
import torch

from sparse_patch import get_method


@pytest.mark.parametrize("offset", [0, 7, 90])
def test_keeps_sink_and_window_to_the_token(offset):
    q, k = torch.randn(2, 70, 8), torch.randn(1, 70 + offset, 8)
    method = get_method("a_shape", sink=5, window=11, block_size=16)
    mask = method.plan(q, k, scale=1.0, q_offset=offset).to_dense_mask()[0]
    row, key = torch.arange(70)[:, None] + offset, torch.arange(70 + offset)
    assert torch.equal(mask, (key <= row) & ((key < 5) | (row - key < 11)))


def test_a_sequence_inside_the_window_is_exact():
    q, k = torch.randn(2, 64, 8), torch.randn(1, 64, 8)
    assert get_method("a_shape", window=64).plan(q, k, scale=1.0, q_offset=0) is None
