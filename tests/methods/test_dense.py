"""Dense keeps everything."""

import pytest
import torch

from sparse_patch import get_method


@pytest.mark.parametrize("offset", [0, 1, 50])
@pytest.mark.parametrize("block", [1, 16, 128])
def test_keeps_every_causal_key(offset, block):
    q, k = torch.randn(2, 70, 8), torch.randn(1, 70 + offset, 8)
    plan = get_method("dense", block_size=block).plan(q, k, scale=1.0, q_offset=offset)
    causal = torch.ones(70, 70 + offset, dtype=torch.bool).tril(offset)
    assert torch.equal(plan.to_dense_mask()[0], causal)
    assert plan.density == 1.0
