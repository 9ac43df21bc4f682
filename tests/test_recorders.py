"""Whatever records a patched model holds its attention, or says that it cannot."""

import io
import warnings

import pytest
import torch
from torch._functorch.aot_autograd import aot_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_patch
from tests.zoo import tiny_model

SHAPE = {"sink": 1, "window": 9}


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.fixture
def whole():
    return Logits(tiny_model("llama", "sdpa")).eval()


@pytest.fixture
def inputs():
    ids = torch.randint(6, 128, (2, 80), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 80).long()
    mask[0, :13] = 0
    return ids, mask


@pytest.mark.parametrize("min_length", [0, 1000])
@pytest.mark.parametrize("exporter", ["torch.jit.trace", "the older ONNX exporter"])
def test_tracers_are_refused(whole, inputs, exporter, min_length):
    trace = {
        "torch.jit.trace": torch.jit.trace,
        "the older ONNX exporter": lambda m, x: torch.onnx.export(m, x, io.BytesIO(), dynamo=False),
    }[exporter]
    with sparse_patch.patch(whole.model, "a_shape", min_length=min_length, **SHAPE):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            with pytest.raises(RuntimeError, match=r"sparse_patch: .*unpatch\(model\) before"):
                trace(whole, inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(whole, inputs)
        torch.testing.assert_close(traced(*inputs), whole(*inputs), atol=1e-5, rtol=0)


RECORDERS = {
    "make_fx": lambda model, x: make_fx(model)(*x),
    "AOTAutograd": lambda model, x: aot_module(model, fw_compiler=lambda graph, _: graph),
    "torch.export": lambda model, x: torch.export.export(model, x).module(),
    "torch.export, strict": lambda model, x: torch.export.export(model, x, strict=True).module(),
    "torch.compile": lambda model, x: torch.compile(model, backend="aot_eager"),
}


@pytest.mark.parametrize("min_length", [0, 1000])
@pytest.mark.parametrize("recorder", RECORDERS)
def test_graphs_hold_attention(whole, inputs, recorder, min_length):
    """On other tokens and other padding than what was recorded, too."""
    others = inputs[0].flip(0, 1), inputs[1].flip(0)
    with sparse_patch.patch(whole.model, "a_shape", min_length=min_length, **SHAPE) as handle:
        with torch.no_grad():
            want = [whole(*x) for x in (inputs, others)]
            calls = handle.report().sparse_calls
            graph = RECORDERS[recorder](whole, inputs)
            got = [graph(*x) for x in (inputs, others)]
        for a, b, (_, mask) in zip(got, want, (inputs, others), strict=True):
            torch.testing.assert_close(a[mask.bool()], b[mask.bool()], atol=1e-4, rtol=0)
        if recorder in ("make_fx", "torch.compile"):
            assert handle.report().sparse_calls in (2 * calls, 2 * calls + calls // 2)
    torch._dynamo.reset()


def test_a_graph_of_another_process_is_not_taken_for_ours(whole, inputs, monkeypatch):
    from sparse_patch import layer

    with sparse_patch.patch(whole.model, "a_shape", min_length=0, **SHAPE), torch.no_grad():
        graph = torch.export.export(whole, inputs).module()
    with sparse_patch.patch(whole.model, "dense", min_length=0), torch.no_grad():
        assert len(layer._by_handle) >= 4
        with pytest.raises(RuntimeError, match="belongs to a removed patch"):
            graph(*inputs)


def test_a_mode_that_watches_operations_sees_one_for_attention(whole, inputs):
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with sparse_patch.patch(whole.model, "a_shape", min_length=0, **SHAPE), torch.no_grad():
        want = whole(*inputs)
        with Watch():
            got = whole(*inputs)
    assert torch.equal(got, want)
    assert seen.count("sparse_patch.attention.default") == 4


def test_a_model_without_values_has_shapes(whole, inputs):
    meta = Logits(tiny_model("llama", "sdpa")).to("meta")
    with sparse_patch.patch(meta.model, "a_shape", min_length=0, **SHAPE), torch.no_grad():
        assert meta(*(x.to("meta") for x in inputs)).shape == (2, 80, 128)
