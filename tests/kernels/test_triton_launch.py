"""The door through which kernels are launched, without a GPU behind it."""

import contextlib
import types

import pytest
import torch
from sparse_patch_kernels import block_sparse_attention

from tests.kernels.interpreted import require_interpreter
from tests.kernels.test_backends import assert_same, inputs, variants

launch = require_interpreter("triton.launch")
forward = require_interpreter("triton.forward")
triton = pytest.importorskip("triton")


class Kernel:
    """Notes the launches of a kernel, and the device that was current."""

    fn = types.SimpleNamespace(__name__="noted")

    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda **arguments: self.log.append((grid, arguments))


@pytest.fixture
def gpu(monkeypatch):
    """As on a GPU: launches go to the kernel, and which device is current is noted."""
    log = []

    @contextlib.contextmanager
    def device(which):
        log.append(("enter", which))
        yield
        log.append(("leave", which))

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch, "get_device_module", lambda _: types.SimpleNamespace(device=device))
    launch._tuned.cache_clear()
    yield log
    launch._tuned.cache_clear()


def config(n, warps):
    return triton.Config({"N": n}, num_warps=warps, num_stages=3)


def tuned_to_the_last(configs):
    """What stands for `triton.autotune(configs, ...)`: the kernel, with the last as the best."""

    def wrap(kernel):
        kernel.best_config = configs[-1]
        return kernel

    return wrap


def test_the_device_of_the_tensors_is_current_during_a_launch(gpu):
    x = torch.zeros(3)
    launch.launch(Kernel(gpu), (2, 1), {"n": 3, "x": x}, [config(16, 4)], [])
    enter, (grid, arguments), leave = gpu
    assert (enter, leave) == (("enter", x.device), ("leave", x.device))
    assert grid == (2, 1)
    assert arguments == {"n": 3, "x": x, "N": 16, "num_warps": 4, "num_ctas": 1, "num_stages": 3}


def test_several_configurations_are_measured_and_no_other(gpu, monkeypatch):
    seen = []

    def autotune(configs, key, **options):
        seen.append((configs, key, options))
        return tuned_to_the_last(configs)

    monkeypatch.setattr(triton, "autotune", autotune)
    kernel, configs = Kernel(gpu), [config(16, 4), config(32, 8)]
    for _ in range(2):
        launch.launch(kernel, (1,), {"x": torch.zeros(3)}, configs, ["D"])
    assert seen == [(configs, ["D"], {"cache_results": True})]  # once, not per launch
    assert [arguments.keys() for _, arguments in gpu[1::3]] == [{"x"}, {"x"}]


def test_watching_says_what_each_shape_class_runs_with(gpu, monkeypatch):
    monkeypatch.setattr(triton, "autotune", lambda configs, *_, **__: tuned_to_the_last(configs))
    several, one = [config(16, 4), config(32, 8)], [config(64, 4)]
    x = torch.zeros(3)
    launch.launch(Kernel(gpu), (1,), {"x": x, "D": 16}, several, ["D"])  # nobody watches yet
    with launch.watching() as chosen:
        for dim in (64, 64, 128):
            launch.launch(Kernel(gpu), (1,), {"x": x, "D": dim}, several, ["D"])
        launch.launch(Kernel(gpu), (1,), {"x": x, "D": 64}, one, [])
        with launch.recording():
            launch.launch(Kernel(gpu), (1,), {"x": x, "D": 256}, several, ["D"])
    launch.launch(Kernel(gpu), (1,), {"x": x, "D": 32}, several, ["D"])
    assert chosen == {
        launch.ShapeClass("noted", (("D", "64"),)): several[1],
        launch.ShapeClass("noted", (("D", "128"),)): several[1],
        launch.ShapeClass("noted", ()): one[0],
    }


def test_a_forced_configuration_runs_and_nothing_is_tuned(gpu, monkeypatch):
    monkeypatch.setattr(triton, "autotune", None)  # whoever calls it fails
    configs = [config(16, 4), config(32, 8), config(64, 8)]

    def launched():
        del gpu[:]
        with launch.watching() as chosen:
            launch.launch(Kernel(gpu), (1,), {"x": torch.zeros(3), "D": 64}, configs, ["D"])
        (only,) = chosen.values()
        assert gpu[1][1]["N"] == only.kwargs["N"]
        return configs.index(only)

    with launch.forcing(1):
        assert launched() == 1
        with launch.forcing(7):
            assert launched() == 2  # the last
        assert launched() == 1
    with pytest.raises(TypeError, match="not callable"):  # no longer forced: it would tune
        launched()


def test_a_recording_launches_nothing_and_says_for_which_chip(gpu):
    small = launch.Chip("hip", 65536)
    x = torch.zeros(3, device="meta")
    with launch.recording(small) as outer:
        assert launch.chip_of(x) == small
        with launch.recording() as inner:
            assert launch.chip_of(x) == launch.HOPPER
            launch.launch(Kernel(gpu), (1,), {"x": x}, [config(16, 4)], [])
    assert not outer
    assert not gpu
    assert inner == [launch.Launch(inner[0].kernel, (1,), {"x": x}, (config(16, 4),))]


def test_triton_s_autotuner_takes_what_is_launched(gpu, monkeypatch):
    """The real tuner, with the interpreter for a GPU and made-up times: a class is tuned once."""
    tuners, timed = [], []

    def times(call, quantiles):
        call()
        timed.append(len(timed))
        return [-len(timed)] * 3  # the last configuration is the fastest

    def autotune(configs, key, cache_results, make=triton.autotune):
        def wrap(kernel):
            tuners.append(make(configs, key, do_bench=times, cache_results=cache_results)(kernel))
            return tuners[-1]

        return wrap

    monkeypatch.setattr(triton, "autotune", autotune)
    monkeypatch.setattr(launch, "chip_of", lambda _: launch.HOPPER)
    monkeypatch.setattr(forward, "chip_of", lambda _: launch.HOPPER)
    for n in (70, 90):
        shape = (2, 1, n, n, 16, 16, 32, 16)
        q, k, v = inputs(shape)
        plan = variants(shape)["blocks+sink+window"]
        got = forward.block_sparse_attention(q, k, v, plan, 0.25)
        want = block_sparse_attention(
            q, k, v, plan, scale=0.25, backend="reference", return_lse=True
        )
        assert_same(got, want, 5e-6)
    (tuner,) = tuners
    assert len(timed) == len(tuner.configs) > 1
    (chosen,) = tuner.cache.values()
    assert chosen == tuner.configs[-1]
