"""From how many keys on sparse pays where calls cannot be timed as they go by."""

from types import SimpleNamespace

import pytest
import torch
from sparse_patch_kernels import BackendUnavailable

import sparse_patch
from sparse_patch import routing
from sparse_patch.break_even import Kind, keys_to_pay
from sparse_patch.budget import Budget

KIND = Kind(4, 2, 16, 8, torch.float32, torch.device("cpu"))
METHOD = sparse_patch.get_method("mean_pool", block_size=32)


def clock(times):
    """Runs calls, and says that they took these seconds: exact, op, plan; exact, op, plan; ..."""
    remaining = iter(times)

    def seconds(call):
        call()
        return next(remaining)

    return seconds


@pytest.mark.parametrize(
    ("times", "want"),
    [
        ([10, 4, 4], 128),
        ([10, 4, 5.6, 40, 10, 10], 256),  # 4 % saved is not enough
        ([10, 9, 9, 40, 30, 30, 160, 100, 20], 512),
        ([10, 9, 9, 40, 30, 30, 160, 100, 100], 1024),  # as if it paid at twice the longest
    ],
)
def test_the_first_length_at_which_plan_and_op_save_enough(times, want):
    found = keys_to_pay(METHOD, KIND, "reference", (128, 256, 512), clock(times))
    assert found == want


def test_a_method_that_makes_no_plan_at_a_length_does_not_pay_there():
    method = sparse_patch.get_method("mean_pool", block_size=32, min_budget=200)
    assert method.plan(*KIND.inputs(128)[:2], scale=1.0, q_offset=0) is None
    assert keys_to_pay(method, KIND, "reference", (128, 256), clock([10, 1, 1])) == 256


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Options of `min_length="auto"`, calls as a GPU makes them, and what is measured for them."""
    measured = []

    def measure(method, kind, backend):
        measured.append(kind)
        return 8192

    monkeypatch.setattr(routing, "keys_to_pay", measure)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    options = routing.Options(16384, 16, "auto", False, Budget(layers=2))

    def call(n, heads=4):
        def x(heads):
            shape = (1, heads, n, 64)
            return SimpleNamespace(shape=shape, dtype=torch.half, device=torch.device("cuda"))

        return METHOD, x(heads), x(2), x(2)

    return options, call, measured


def test_a_gpu_measures_once_per_kind_of_call_and_nothing_for_short_ones(on_a_gpu):
    options, call, measured = on_a_gpu
    assert options.least_keys(*call(100)) == 16384
    assert measured == []
    assert [options.least_keys(*call(n)) for n in (5000, 9000, 5000)] == [8192] * 3
    assert len(measured) == 1
    options.least_keys(*call(5000, heads=8))
    assert [kind.heads for kind in measured] == [4, 8]


def test_nothing_is_timed_while_a_graph_is_captured(on_a_gpu, monkeypatch):
    options, call, measured = on_a_gpu
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert options.least_keys(*call(5000)) == 16384
    assert measured == []


@pytest.mark.parametrize("error", [BackendUnavailable, torch.OutOfMemoryError])
def test_where_nothing_can_be_timed_the_usual_length_holds(on_a_gpu, monkeypatch, error):
    options, call, _ = on_a_gpu

    def fails(*_):
        raise error("as here")

    monkeypatch.setattr(routing, "keys_to_pay", fails)
    assert options.least_keys(*call(5000)) == 16384
    assert list(options.measured.values()) == [16384]


def test_a_number_of_tokens_stays_that_number(on_a_gpu):
    _, call, measured = on_a_gpu
    options = routing.Options(2048, 16, "auto", False)
    assert options.least_keys(*call(9000)) == 2048
    assert measured == []
