"""What goes wrong in the middle of a forward stays there: the next one works, and undo is exact.

Also what a long-lived process does: patching from threads, and a thousand times.
"""

import copy
import ctypes
import gc
import signal
import threading

import pytest
import torch
from sparse_patch_kernels.cpu import native

import sparse_patch
from sparse_patch import layer
from sparse_patch.methods.flexprefill import FlexPrefill
from sparse_patch.methods.hip import Hip
from tests.robustness.real import SPARSE, part_of, states

pytestmark = pytest.mark.network


@pytest.fixture(autouse=True)
def heeds_interrupts():
    """What a shell starts in the background (`.ci/run &`) ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Accident(Exception):
    """None of those that anybody handles."""


def accidents():
    def interrupt(*_, **__):
        signal.raise_signal(signal.SIGINT)  # as Ctrl-C does
        raise AssertionError("nobody was interrupted")

    def failing(error):
        def fail(*_, **__):
            raise error

        return fail

    return {
        KeyboardInterrupt: interrupt,
        torch.OutOfMemoryError: failing(torch.OutOfMemoryError("CUDA out of memory")),
        MemoryError: failing(MemoryError("no memory")),
        Accident: failing(Accident("what?")),
    }


def on_call(number, accident, function):
    """`function`, but at its call `number` the accident happens instead."""
    calls = 0

    def either(*args, **kwargs):
        nonlocal calls
        calls += 1
        return (accident if calls == number else function)(*args, **kwargs)

    return either


STAGES = {
    "before planning": (layer, "why_sequence_exact"),
    "plan": (FlexPrefill, "plan"),
    "op": (layer, "block_sparse_attention"),
    "after the op": (layer.LayerState, "record"),
}


@pytest.mark.parametrize("error", accidents(), ids=lambda e: e.__name__)
@pytest.mark.parametrize("stage", STAGES)
def test_an_accident_comes_through_and_leaves_nothing(smollm2, monkeypatch, stage, error):
    owner, name = STAGES[stage]
    ids = smollm2.ids(200)
    with smollm2.patch("flexprefill", layers=[0, 2]) as handle:
        want = states(smollm2.model, ids)
        counted = handle.report()
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, on_call(2, accidents()[error], getattr(owner, name)))
            with pytest.raises(error):
                states(smollm2.model, ids)
        before = handle.report()
        assert torch.equal(states(smollm2.model, ids), want)
        after = handle.report()
    assert counted.sparse_calls == 2
    assert after.sparse_calls == before.sparse_calls + 2
    assert not after.exact  # an accident is no reason to run exact


def test_the_kernel_out_of_memory_is_an_error(smollm2, monkeypatch):
    if native._kernel() is None:
        pytest.skip("no compiler")
    ids = smollm2.ids(300)
    with smollm2.patch("flexprefill"):
        want = states(smollm2.model, ids)
        with monkeypatch.context() as patched:
            patched.setattr(native, "_kernel", lambda: lambda _: ctypes.c_int(1))
            with pytest.raises(MemoryError, match="no memory"):
                states(smollm2.model, ids)
        assert torch.equal(states(smollm2.model, ids), want)


@pytest.mark.parametrize("stage", [(Hip, "decode"), (layer, "block_sparse_attention")])
def test_an_interrupted_answer_can_be_asked_for_again(smollm2, monkeypatch, stage):
    """In the middle of sparse decoding, where methods remember earlier steps."""
    options = {"do_sample": False, "max_new_tokens": 6}
    with smollm2.patch("hip", layers=[1, 3]):
        want = smollm2.model.generate(smollm2.ids(300), **options)
        with monkeypatch.context() as patched:
            interrupt = accidents()[KeyboardInterrupt]
            patched.setattr(*stage, on_call(6, interrupt, getattr(*stage)))
            with pytest.raises(KeyboardInterrupt):
                smollm2.model.generate(smollm2.ids(300), **options)
        assert torch.equal(smollm2.model.generate(smollm2.ids(300), **options), want)


def test_an_accident_ends_the_patch_of_a_with_block(smollm2, monkeypatch):
    monkeypatch.setattr(layer, "block_sparse_attention", accidents()[torch.OutOfMemoryError])

    def run():
        with smollm2.patch("flexprefill"):
            states(smollm2.model, smollm2.ids(300))

    with pytest.raises(torch.OutOfMemoryError):
        run()
    assert smollm2.is_as_loaded(smollm2.model)


def test_threads_that_patch_two_models_do_not_meet(smollm2):
    methods = ["flexprefill", "hip"]
    models = [part_of(smollm2, 2) for _ in methods]
    ids = [smollm2.ids(250, start) for start in (0, 200)]
    plain = [states(model, text) for model, text in zip(models, ids, strict=True)]

    def answer(i):
        params = SPARSE[methods[i]]
        with sparse_patch.patch(models[i], methods[i], min_length=0, dense_layers=0, **params):
            return states(models[i], ids[i])

    serial = [answer(i) for i in range(2)]
    wrong = []
    together = threading.Barrier(2)

    def work(i):
        try:
            together.wait(timeout=60)
            for turn in range(20):
                if not torch.equal(answer(i), serial[i]):
                    wrong.append((i, turn, "sparse"))
                if not torch.equal(states(models[i], ids[i]), plain[i]):
                    wrong.append((i, turn, "undone"))
        except BaseException as error:
            wrong.append((i, repr(error)))
            raise

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not torch.equal(serial[0], plain[0])
    assert not torch.equal(serial[1], plain[1])


def resident():
    """KiB of this process in memory; None where the system does not say."""
    try:
        with open("/proc/self/status") as file:
            (line,) = (line for line in file if line.startswith("VmRSS"))
    except OSError:
        return None
    return int(line.split()[1])


def test_a_thousand_patches_leave_no_memory_behind(smollm2):
    model, ids = part_of(smollm2, 1), smollm2.ids(70)

    def cycles(n):
        for i in range(n):
            with sparse_patch.patch(model, "flexprefill", min_length=0, **SPARSE["flexprefill"]):
                if i % 20 == 0:
                    states(model, ids)
        gc.collect()
        return len(gc.get_objects()), resident()

    cycles(50)  # caches fill
    (objects, memory), (objects_after, memory_after) = cycles(50), cycles(1000)
    assert objects_after - objects < 50
    if memory is not None:
        assert memory_after - memory < 8 * 1024  # 8 KiB a patch


def test_a_copy_may_be_thrown_away_while_patched(smollm2):
    model = part_of(smollm2, 1)
    gc.collect()
    before = len(layer._by_handle)
    sparse_patch.patch(model, "flexprefill")
    clone = copy.deepcopy(model)
    assert len(layer._by_handle) == before + 2
    del clone, model
    gc.collect()
    assert len(layer._by_handle) == before
