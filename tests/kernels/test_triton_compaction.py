"""The kernel that compacts masks, in Triton's interpreter, against the plain function."""

import pytest
import torch
from sparse_patch_kernels import BlockPlan, RunList, dispatch
from sparse_patch_kernels.estimators.compaction import compact

from sparse_patch import get_method
from tests.kernels.interpreted import poison_empty, require_interpreter

compaction = require_interpreter("estimators.compaction.kernel")


def random_mask(*shape, share=0.4):
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) < share


def some_masks():
    mask = random_mask(2, 3, 1500)  # more than a tile
    mask[0, 0], mask[0, 1], mask[1, 2, 1024:] = False, True, False
    return {
        "long": mask,
        "whole tiles": random_mask(1, 2, 2048),
        "short": random_mask(3, 5, 9),
        "one column": random_mask(1, 4, 1),
        "heads last": random_mask(5, 40, 3).permute(2, 0, 1),
        "every other": random_mask(2, 3, 80)[..., ::2],
        "one for all": random_mask(1, 4, 33).expand(3, 4, 33),
    }


@pytest.mark.parametrize("name", some_masks())
def test_lists_what_the_plain_function_lists(name, monkeypatch):
    mask = some_masks()[name]
    want, want_count = compact.plain(mask)
    poison_empty(monkeypatch)
    index, count = compaction.compact(mask)
    assert (index.dtype, count.dtype) == (torch.int32, torch.int32)
    assert index.shape == mask.shape
    assert torch.equal(count, want_count)
    n = want.shape[2]
    holds = torch.arange(n) < count[..., None]
    assert torch.equal(index[..., :n].where(holds, -1), want.where(holds, -1))
    padding = torch.arange(mask.shape[2]) >= count[..., None]
    assert bool((index[padding] == 0).all())


def test_run_lists_and_plans_are_the_same(monkeypatch):
    mask = random_mask(2, 6, 11)
    want = BlockPlan.from_block_mask(mask, block_q=16, block_k=8, q_len=81, kv_len=85)
    poison_empty(monkeypatch)
    monkeypatch.setattr(dispatch, "uses_triton", lambda x: True)
    assert RunList.from_mask(mask, 8).start.shape == mask.shape  # so the kernel has run
    got = BlockPlan.from_block_mask(mask, block_q=16, block_k=8, q_len=81, kv_len=85)
    got.check()
    assert torch.equal(got.to_dense_mask(), want.to_dense_mask())


def test_a_method_plans_the_same(monkeypatch):
    method = get_method("tri_shape", sink=16, window=32, dense_rows=40, block_size=16)
    q, k = torch.zeros(2, 150, 16), torch.zeros(1, 150, 16)
    want = method.plan(q, k, scale=1.0, q_offset=0)
    poison_empty(monkeypatch)
    monkeypatch.setattr(dispatch, "uses_triton", lambda x: True)
    got = method.plan(q, k, scale=1.0, q_offset=0)
    got.check()
    assert torch.equal(got.to_dense_mask(), want.to_dense_mask())


def test_a_recorded_launch_reads_nothing():
    launch = require_interpreter("triton.launch")
    with launch.recording() as launches:
        index, count = compaction.compact(
            torch.empty(32, 512, 512, dtype=torch.bool, device="meta")
        )
    assert (index.shape, count.shape) == ((32, 512, 512), (32, 512))
    assert [(one.kernel.__name__, one.grid) for one in launches] == [("_compact", (512, 32))]
