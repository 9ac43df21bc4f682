"""What a ranking loses, against its definition."""

import pytest
import torch
from sparse_patch_kernels.estimators.token_scores import plain

from sparse_patch import held_out, selection


@pytest.mark.parametrize("offset", [0, 40, 37])
def test_ranking_loss_is_what_held_out_rows_miss(offset, monkeypatch):
    for module in (held_out, plain):
        monkeypatch.setattr(module, "TILE_ELEMENTS", 1)  # a tile of one query block
    n, block, stride = 200, 16, 8
    q, k = torch.randn(4, n - offset, 8), torch.randn(2, n, 8)
    scores = torch.randn(2, 13 - offset // block, 13)
    grid = selection.BlockGrid(n - offset, n, block, block, q.device)
    order = selection.rank(scores, grid.causal(), grid.forced(1, 1))
    got = held_out.ranking_loss(q, k, 0.5, order, block_q=block, block_k=block, stride=stride)
    logits = q @ k.repeat_interleave(2, 0).mT * 0.5
    row = torch.arange(offset, n)
    probs = logits.masked_fill(torch.arange(n) > row[:, None], float("-inf")).softmax(-1)
    blocks = torch.stack([c.sum(-1) for c in probs.split(block, -1)], -1)
    # Half a stride after the multiples; a block that has no such row gives its last one.
    taken = {int(r) for r in row if r % stride == stride // 2}
    ends = [min((b + 1) * block, n) - 1 for b in range(offset // block, 13)]
    taken |= {end for end in ends if not taken & set(range(end // block * block, end + 1))}
    for head in range(4):
        for count in range(1, 14):
            lost = []
            for r in sorted(taken):
                kept = order[head // 2, r // block - offset // block, :count]
                lost.append(1 - blocks[head, r - offset, kept].sum())
            want = torch.stack(lost).clamp(min=0).square().mean().sqrt()
            torch.testing.assert_close(got[head, count - 1], want, atol=1e-5, rtol=0)
