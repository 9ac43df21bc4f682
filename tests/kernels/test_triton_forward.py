"""The Triton kernel equals the reference, run by Triton's interpreter on the CPU."""

import dataclasses
import sys

import pytest
import torch
from sparse_patch_kernels import BlockPlan, RunList, block_sparse_attention
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.interpreted import poison_empty, require_interpreter
from tests.kernels.test_backends import SHAPES, assert_same, inputs, more_logits, variants

forward = require_interpreter("triton.forward")
layout = require_interpreter("triton.layout")
launch = require_interpreter("triton.launch")
schedule = require_interpreter("triton.schedule")
tiles = require_interpreter("triton.tiles")

# The interpreter takes a log of 0 for a row that sees nothing, as the GPU does in silence.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_empty(monkeypatch)


def both(q, k, v, plan, **more):
    """Output and log-sum-exp of the kernel, and of the reference."""
    return (
        block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True, **more)
        for backend in ("triton", "reference")
    )


NAMES = sorted(variants(SHAPES[0]))
WIDE = pytest.mark.wide  # of what the interpreter takes seconds for, a smaller one is beside it


@pytest.mark.parametrize("name", NAMES)
def test_every_plan(name):
    """A list per head, with ragged ends and an offset."""
    shape = (4, 2, 37, 92, 16, 24, 16, 8)
    assert_same(*both(*inputs(shape), variants(shape)[name]), 5e-6)


@pytest.mark.wide
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "lists"), [(SHAPES[1], None), (SHAPES[7], SHAPES[7][1]), (SHAPES[2], 1)], ids=str
)
def test_every_plan_of_longer_sequences(name, shape, lists):
    """A list per head; one per KV group; one for all heads."""
    assert_same(*both(*inputs(shape), variants(shape, lists)[name]), 5e-6)


@pytest.mark.parametrize("name", ["blocks", "ranked+sink+window", "pyramid+order"])
@pytest.mark.parametrize("lists", [2, 1])
def test_lists_that_heads_share(name, lists):
    """One per KV group; one for all heads."""
    shape = (4, 2, 37, 53, 8, 24, 16, 16)
    assert_same(*both(*inputs(shape), variants(shape, lists)[name]), 5e-6)


@pytest.mark.parametrize("name", ["blocks", pytest.param("order+sink+window", marks=WIDE)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, name):
    assert_same(*both(*inputs(shape), variants(shape)[name]), 5e-6)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256, (192, 128), (64, 24), 20])
def test_every_head_dim(dim):
    dim, v_dim = dim if isinstance(dim, tuple) else (dim, dim)
    shape = (2, 1, 50, 70, dim, v_dim, 32, 32)
    q, k, v = inputs(shape, torch.float16)
    plan = variants(shape)["blocks"]
    want = block_sparse_attention(
        *(x.float() for x in (q, k, v)), plan, backend="reference", return_lse=True
    )
    out, lse = block_sparse_attention(q, k, v, plan, backend="triton", return_lse=True)
    assert out.dtype == torch.float16
    assert_same((out.float(), lse), want, 2e-3)


@pytest.mark.parametrize(
    ("block_q", "block_k", "window", "length"),
    [
        (200, 64, 0, 310),
        (96, 128, 0, 310),
        (5, 2, 3, 40),
        pytest.param(5, 2, 3, 310, marks=WIDE),
        (64, 2, 40, 90),
        pytest.param(64, 2, 40, 310, marks=WIDE),
        (300, 4, 7, 310),
        (32, 48, 0, 130),
        (128, 160, 0, 310),
    ],
)
def test_blocks_that_are_no_tile(block_q, block_k, window, length):
    """More rows than a tile, or no power of two; runs of one key, and of more than a tile."""
    shape = (2, 1, length, length + 20, 16, 16, block_q, block_k)
    q, *kv = inputs(shape)
    # Huge numbers past the last key: who reads them overflows, which is an error here.
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 512), value=3e38)[:, : length + 20] for x in kv)
    plan = dataclasses.replace(variants(shape)["blocks"], sink=window, window=window)
    assert_same(*both(q, k, v, plan), 5e-6)


@pytest.mark.parametrize(
    ("shape", "lists"),
    [
        ((4, 2, 37, 53, 16, 16, 16, 16), None),
        pytest.param(SHAPES[0], None, marks=WIDE),
        pytest.param(SHAPES[3], 1, marks=WIDE),
        ((4, 1, 17, 40, 40, 24, 16, 16), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["blocks+sink+window", "order", "rectified", "nothing"])
def test_softcap_and_sinks(name, shape, lists):
    q, k, v = inputs(shape)
    for more in more_logits(shape[0]):
        assert_same(*both(q, k, v, variants(shape, lists)[name], **more), 5e-6)


def test_heads_with_one_list_share_a_tile():
    """Three heads of 16 rows are 48 of a tile of 64; six heads of 32 rows would be too many."""
    assert layout.Tiling.of(16, 3, 128) == layout.Tiling(16, 1, 3, 64)
    assert layout.Tiling.of(32, 6, 128) == layout.Tiling(32, 1, 3, 128)
    assert layout.Tiling.of(128, 4, 128) == layout.Tiling(128, 1, 1, 128)
    assert layout.Tiling.of(200, 4, 128) == layout.Tiling(128, 2, 1, 128)
    assert layout.Tiling.of(1, 1, 128) == layout.Tiling(1, 1, 1, 16)
    for heads, kv_heads, block in ((3, 1, 16), (6, 1, 32), (8, 2, 16)):
        shape = (heads, kv_heads, 75, 107, 16, 16, block, 16)
        q, k, v = inputs(shape)
        assert_same(*both(q, k, v, variants(shape, kv_heads)["blocks+sink+window"]), 5e-6)


def test_runs_of_pages_far_apart_take_wide_offsets(monkeypatch):
    monkeypatch.setattr(forward, "FAR", 0)
    with launch.recording() as launches:
        forward.block_sparse_attention(*inputs(SHAPES[0]), variants(SHAPES[0])["blocks"], 0.25)
    assert launches[-1].arguments["INDEX"].primitive_bitwidth == 64
    q, k, v = inputs(SHAPES[0])
    assert_same(*both(q, k, v, variants(SHAPES[0])["blocks+sink+window"]), 5e-6)


def test_any_layout_of_the_inputs():
    q, k, v = inputs(SHAPES[0])
    plan = variants(SHAPES[0])["blocks+sink+window"]
    want = block_sparse_attention(q, k, v, plan, backend="reference", return_lse=True)
    for change in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack([x, x], 3).flatten(2)[..., ::2],
    ):
        got = block_sparse_attention(
            *map(change, (q, k, v)), plan, backend="triton", return_lse=True
        )
        assert_same(got, want, 5e-6)


@pytest.mark.parametrize("name", ["blocks+sink+window", "order", "pyramid", "rectified+order"])
def test_several_sequences_in_one_launch(name):
    """Each as it is alone; their lengths, offsets and numbers of listed runs differ."""
    parts, plans = [], []
    for seed, (q_len, kv_len) in enumerate([(70, 70), (5, 90), (33, 33), (64, 100)]):
        shape = (4, 2, q_len, kv_len, 16, 24, 32, 16)
        parts.append(inputs(shape, seed=seed))
        plans.append(variants(shape)[name])
    q, k, v = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    out, lse = forward.attend_packed(q, k, v, plans, 0.25)
    row = 0
    for (q_one, k_one, v_one), plan in zip(parts, plans, strict=True):
        rows = slice(row, row := row + plan.q_len)
        want = block_sparse_attention(
            q_one, k_one, v_one, plan, scale=0.25, backend="reference", return_lse=True
        )
        assert_same((out[:, rows], lse[:, rows]), want, 5e-6)


def test_sequences_of_one_launch_need_plans_of_one_form():
    one = variants(SHAPES[0])["blocks"]
    with pytest.raises(ValueError, match="window is 0 in plan 0 and 3 in plan 1"):
        layout.check_form([one, dataclasses.replace(one, window=3)])


def test_large_logits_stay_finite_and_nan_stays_where_it_is():
    q, k, v = inputs(SHAPES[0])
    plan = variants(SHAPES[0])["blocks+sink+window"]
    got = block_sparse_attention(q * 1e4, k, v, plan, backend="triton")
    assert bool(torch.isfinite(got).all())
    q[:, 5] = float("nan")
    got = block_sparse_attention(q, k, v, plan, backend="triton")
    assert bool(got[:, 5].isnan().all())
    assert not bool(got[:, 6:].isnan().any())


def test_longest_rows_start_first_and_a_kv_head_at_a_time():
    count = torch.tensor([[1, 4, 2], [0, 3, 3], [5, 1, 1], [2, 2, 9]], dtype=torch.int32)
    start = torch.arange(9, dtype=torch.int32).mul(16).expand(4, 3, 9).contiguous()
    plan = object.__new__(BlockPlan)  # runs past the end, which only this test wants
    for name, value in {
        "q_len": 96, "kv_len": 96, "block_q": 32, "runs": (RunList(start, count, 16),),
        "sink": 0, "window": 0, "key_order": None,
    }.items():  # fmt: skip
        object.__setattr__(plan, name, value)
    q, k, v = inputs((4, 2, 96, 96, 16, 16, 32, 16))
    lists = layout.key_lists(k, v, [plan])
    table = layout.block_table([plan], lists, q.device)
    tasks = schedule.schedule([plan], lists, table, 4, 2)
    work = count.flatten()[tasks.long()].view(2, 6)
    assert sorted(tasks.tolist()) == list(range(12))
    assert work.tolist() == [[4, 3, 3, 2, 1, 0], [9, 5, 2, 2, 1, 1]]


@pytest.mark.parametrize(("heads", "kv_heads", "lists", "blocks"), [(8, 2, 4, 50), (6, 3, 1, 7)])
def test_the_order_of_many_tasks_is_that_of_a_stable_sort(heads, kv_heads, lists, blocks):
    """More than a program places, with equals among them, lists of a group, a sink and a window."""
    generator = torch.Generator().manual_seed(blocks)
    count = torch.randint(0, 5, (lists, blocks), dtype=torch.int32, generator=generator)
    start = torch.zeros(lists, blocks, 4, dtype=torch.int32)
    one = layout.KeyList(start, count, 16, 1, False, start, start, None, None, (0,), False)
    plan = BlockPlan(blocks * 16, blocks * 16, 16, sink=20, window=33)
    table = layout.block_table([plan], [one, one], start.device)
    tasks = schedule.schedule([plan], [one, one], table, heads, kv_heads).view(kv_heads, -1)
    seen = (torch.arange(blocks) + 1).mul(16).clamp(max=53)
    work = (seen + 32 * count.repeat_interleave(heads // lists, 0)).reshape(kv_heads, -1)
    order = work.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(tasks, order.int() + torch.arange(kv_heads)[:, None] * work.shape[1])


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_scale_need_not_be_above_zero(scale, softcap):
    q, k, v = inputs(SHAPES[0])
    plan = variants(SHAPES[0])["blocks+sink+window"]
    assert_same(*both(q, k, v, plan, scale=scale, softcap=softcap), 5e-6)


class Dispatched(TorchDispatchMode):
    """Counts tensor operations that would start something on a GPU: views and `empty` do not."""

    FREE = (
        "view",
        "empty",
        "transpose",
        "select",
        "slice",
        "expand",
        "unsqueeze",
        "alias",
        "detach",
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not any(free in name for free in self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def python_calls(call):
    """Calls of Python functions that a call makes."""
    made = 0

    def count(_frame, event, _argument):
        nonlocal made
        made += event == "call"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return made


@pytest.mark.parametrize("name", ["blocks", "blocks+sink+window", "ranked"])
def test_a_call_starts_two_kernels_and_little_else_on_the_host(name, monkeypatch):
    """The GPU waits for the host where that takes longer: 0.2 ms a call are some 1,000 calls of
    Python functions, of which Triton's own launch takes a part."""
    monkeypatch.undo()  # `poisoned` fills what is only to be allocated
    q, k, v = inputs(SHAPES[0])
    plan = variants(SHAPES[0])[name]
    forward.block_sparse_attention(q, k, v, plan, 0.25)  # what is kept from call to call
    with launch.recording() as launches, Dispatched() as dispatched:
        forward.block_sparse_attention(q, k, v, plan, 0.25)
    assert [one.kernel for one in launches] == [
        schedule.longest_first,
        forward.block_sparse_forward,
    ]
    assert dispatched.names == []
    with launch.recording():
        made = python_calls(lambda: forward.block_sparse_attention(q, k, v, plan, 0.25))
    assert made < 200


def test_a_launch_is_recorded_and_reads_nothing():
    """The meta device has nothing to read: a launcher that waits for the GPU would raise."""
    shape = SHAPES[0]
    for plan in variants(shape).values():
        runs = tuple(
            dataclasses.replace(run, start=run.start.to("meta"), count=run.count.to("meta"))
            for run in plan.runs
        )
        order = None if plan.key_order is None else plan.key_order.to("meta")
        plan = dataclasses.replace(plan, runs=runs, key_order=order)
        with launch.recording(launch.Chip("cuda", 99 * 1024)) as launches:
            q, k, v = (x.to("meta") for x in inputs(shape, torch.bfloat16))
            out, lse = forward.block_sparse_attention(q, k, v, plan, 0.25)
        assert (out.shape, lse.shape) == (q.shape, q.shape[:2])
        order, one = launches
        assert order.kernel is schedule.longest_first
        assert one.kernel is forward.block_sparse_forward
        assert all("BLOCK_N" in config.kwargs for config in one.configs)


@pytest.mark.parametrize("dim", [64, 80, 128, 192, 256, 512])
@pytest.mark.parametrize("chip", [("hip", 64), ("cuda", 99), ("cuda", 163), ("cuda", 227)])
def test_some_configuration_fits_every_chip(dim, chip):
    columns = 2 * sum(tiles.split_dim(dim))
    for itemsize in (2,) if dim > 256 else (2, 4):
        rows = forward.most_rows(columns, itemsize)
        assert forward.configs(
            rows, columns, itemsize, (128,), launch.Chip(chip[0], chip[1] * 1024)
        )
