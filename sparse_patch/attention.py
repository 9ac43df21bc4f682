"""The attention function that a patched model calls; in a recorded graph it is one op.

It knows tensors and a module's `LayerState`, not Transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .call import Call, as_sdpa_gets_them
from .layer import LayerState, attend_batch
from .paged import attend_requests, is_paged

# The attribute of a patched attention module that holds its LayerState.
STATE = "_sparse_patch"
_NO_LAYER = torch.tensor(-1, device="cpu")


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """AttentionInterface entry: sparse where the patch allows it, else exact.

    Args:
        query: `[batch, heads, q_len, dim]` after RoPE.
        key, value: `[batch, kv_heads, kv_len, dim]` after the cache.
        attention_mask: what `masks.mask_function` returns, or a 4-D mask of the user's own.

    Returns:
        `[batch, q_len, heads, v_dim]`, and no weights.

    Raises:
        ValueError: the mask is of a form that could be misread, or the tensors differ in dtype.
        RuntimeError: see `Call.read` and `refuse_tracing`.
    """
    refuse_tracing()
    state: LayerState | None = getattr(module, STATE, None)
    if is_paged(kwargs):
        out = attend_requests(state, module, query, key, value, scaling, dropout, kwargs)
        return out, None
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    compiling, recorded = torch.compiler.is_compiling(), is_recorded(query)
    q, k, v = as_sdpa_gets_them(query, key, value)
    call = Call.read(module, q, k, attention_mask, scaling, dropout, kwargs)
    if compiling and needs_grad:
        return _outside_the_graph(state, q, k, v, attention_mask, call), None
    if recorded and not needs_grad:
        layer = _NO_LAYER if state is None else state.handle
        if not compiling:  # recorded by a mode, which takes tensors made under it
            layer = torch.tensor(-1 if state is None else state.number, device="cpu")
            if state is not None:
                state.asked += 1  # the mode may not run the op
        return _attend_op(q, k, v, attention_mask, layer, **call.as_arguments()), None
    return attend_batch(state, q, k, v, attention_mask, call), None


def refuse_tracing() -> None:
    """Raise a RuntimeError under torch.jit.trace, which records neither choices nor our kernels."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "sparse_patch: this model is being traced (torch.jit.trace; OpenVINO, Core ML and the "
            "older ONNX exporter do that), but the choice of keys depends on values, which a "
            "trace does not hold. Call sparse_patch.unpatch(model) before you convert it."
        )


def is_recorded(x: Tensor | None) -> bool:
    """Are operations (on `x`) recorded, or run without values, so that attention must be one op?

    True in a compiled or exported graph, under make_fx, AOTAutograd and other dispatch modes, and
    with fake and meta tensors.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    if x is None:
        return False
    return x.device.type == "meta" or type(x).__torch_dispatch__ is not _PLAIN_DISPATCH


_PLAIN_DISPATCH = Tensor.__torch_dispatch__


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the op below has no gradients
def _outside_the_graph(*arguments: Any) -> Tensor:
    return attend_batch(*arguments)


# One node of a compiled graph: attention reads values, keeps counts and chooses sizes, which
# neither a graph nor a CUDA graph can hold.
@torch.library.custom_op(
    "sparse_patch::attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _attend_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layer: Tensor,
    scale: float,
    causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    training: bool,
) -> Tensor:
    call = Call(scale, causal, softcap, sinks, bias, dropout, training)
    state = None if int(layer) < 0 else LayerState.of_handle(int(layer))
    return attend_batch(state, q, k, v, mask, call)


@_attend_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_rest: object, **_more: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
