"""What a CUDA graph can hold: plans and the op without a look at what is on the GPU.

On the meta device there is nothing to look at: `item`, `tolist`, `bool`, `int`, `nonzero`, a mask
as an index, and whatever else takes its shape from values, raise. What does not raise is a copy
from the CPU, which a graph cannot hold either and a GPU waits for: those are counted.
"""

import pytest
import torch
from sparse_patch_kernels import dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_patch
from tests.kernels.interpreted import require_interpreter

forward = require_interpreter("triton.forward")
launch = require_interpreter("triton.launch")

CAPTURABLE = [
    "a_shape", "dhsa", "flashprefill", "flexprefill", "hip", "mean_pool", "pbs", "proxyattn",
    "sparge", "strided", "xattention",
]  # fmt: skip
WITH_PRESETS = [
    (name, preset) for name in CAPTURABLE for preset in (None, *sparse_patch.describe(name).presets)
]


class Copies(TorchDispatchMode):
    """Operations that bring more than one number from the CPU to the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = (
            [x for x in tree_leaves(some) if isinstance(x, torch.Tensor)]
            for some in ((args, kwargs), result)
        )
        from_cpu = any(x.device.type == "cpu" and x.ndim for x in given)
        if from_cpu and any(x.device.type == "meta" for x in (*given, *made)):
            self.names.append(func.overloadpacket.__name__)
        return result


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "uses_triton", lambda x: x.device.type == "meta")


def empty(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def plan_and_attend(method, q, k):
    plan = method.plan(q, k, scale=0.125, q_offset=k.shape[1] - q.shape[1])
    assert plan is not None
    forward.block_sparse_attention(q, k, k, plan, 0.125)


@pytest.mark.parametrize(("name", "preset"), WITH_PRESETS)
@pytest.mark.parametrize("q_len", [8192, 2100])
def test_a_plan_and_the_op_look_at_nothing_and_copy_nothing(name, preset, q_len):
    method = sparse_patch.get_method(name, **({"preset": preset} if preset else {}))
    q, k = empty(8, q_len, 64), empty(2, 8192, 64)
    with launch.recording() as launches:
        plan_and_attend(method, q, k)  # tables that are kept from call to call
        first = [one.kernel for one in launches]
        launches.clear()
        with Copies() as copies:
            plan_and_attend(method, q, k)
    assert copies.names == []
    # The same kernels each time: a graph replays what it has seen.
    assert [one.kernel for one in launches] == first
    assert forward.block_sparse_forward in first


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: int(x.max()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
    ],
)
def test_a_look_at_a_value_would_be_seen(look):
    with pytest.raises((RuntimeError, NotImplementedError)):
        look(empty(4))


def test_a_copy_from_the_cpu_would_be_seen():
    with Copies() as copies:
        torch.arange(3).to("meta")
        empty(4)[torch.arange(3)]
    assert len(copies.names) == 2
