"""The attention function a patched model calls: sparse where it can be, exact where it must.

It knows tensors and a module's `LayerState`, not Transformers. Padding is taken out and packed
sequences are taken apart, so that every sequence gets the answer it would get alone.
"""

from __future__ import annotations

from typing import Any

import torch
from sparse_patch_kernels import block_sparse_attention
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .budget import Bill
from .costs import keeps_all
from .exact import Exact
from .routing import Call, LayerState
from .sequences import Span, spans_of, visible_to_last

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
    q, k, v, mask = *_as_under_autocast(query, key, value), attention_mask
    call = Call.read(module, q, k, mask, scaling, dropout, kwargs)
    state: LayerState | None = getattr(module, STATE, None)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if torch.compiler.is_compiling() and needs_grad:
        return _outside_the_graph(q, k, v, mask, call, state), None
    if is_recorded(q) and not needs_grad:
        layer = _NO_LAYER if state is None else state.handle
        if not torch.compiler.is_compiling():  # but by a mode, which takes tensors made under it
            layer = torch.tensor(-1 if state is None else state.number, device="cpu")
            if state is not None:
                state.asked += 1  # it may do without running the op
        return _attend_op(q, k, v, mask, layer, **call.as_arguments()), None
    return _attend(q, k, v, mask, call, state), None


def refuse_tracing() -> None:
    """Raise a RuntimeError under torch.jit.trace, which records neither choices nor our kernels."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "sparse_patch: this model is being traced (torch.jit.trace; OpenVINO, Core ML and the "
            "older ONNX exporter do that), but which keys are chosen depends on values, which a "
            "trace does not hold. Call sparse_patch.unpatch(model) before you convert it."
        )


def is_recorded(x: Tensor | None) -> bool:
    """Is what happens (to `x`) recorded, or done without values, so that we must be one op in it?

    So it is in a compiled or exported graph, under make_fx, AOTAutograd and whatever else sees
    PyTorch's operations as they are dispatched, and with fake and meta tensors.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    if x is None:
        return False
    return x.device.type == "meta" or type(x).__torch_dispatch__ is not _PLAIN_DISPATCH


_PLAIN_DISPATCH = Tensor.__torch_dispatch__


def _as_under_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors in the dtype in which autocast lets SDPA have them.

    Raises:
        ValueError: they differ in dtype.
    """
    if _autocasts(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"sparse_patch: query, key and value are {q.dtype}, {k.dtype} and {v.dtype}; attention "
            "takes one dtype, unpatched too. Run the model under torch.autocast, or in one dtype: "
            "model.to(torch.bfloat16)."
        )
    return q, k, v


def _autocasts(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call, state: LayerState | None
) -> Tensor:
    if _autocasts(q):  # methods and kernels choose their precision themselves
        with torch.autocast(q.device.type, enabled=False):
            return _attend(q, k, v, mask, call, state)
    _check_mask(mask, q, k)
    if state is not None:
        state.asked += 1
        reason = state.why_exact(q, k, v, mask, call)
        if reason is None:
            return _span_by_span(q, k, v, mask, call, state)
        state.count_exact(reason, max(1, q.shape[0]))
    if mask is not None and mask.ndim == 2:
        if q.shape[2] != 1:
            return _span_by_span(q, k, v, mask, call, None)
        mask = visible_to_last(mask)  # all rows at once
    return exact_of(call)(q, k, v, mask).transpose(1, 2).contiguous()


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the op below has no gradients
def _outside_the_graph(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call, state: LayerState | None
) -> Tensor:
    return _attend(q, k, v, mask, call, state)


# What a compiled graph sees of attention: it looks at values, keeps counts and has sizes of its
# own, none of which a graph, still less a CUDA graph, could hold.
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
    training: bool,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    dropout: float,
) -> Tensor:
    call = Call(scale, causal, training, softcap, sinks, bias, dropout)
    state = None if int(layer) < 0 else LayerState.of_handle(int(layer))
    return _attend(q, k, v, mask, call, state)


@_attend_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_rest: object, **_more: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _check_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    """A model may build masks of its own: one we would misread must not pass."""
    if mask is None or mask.ndim == 4:
        return
    if mask.shape != (q.shape[0], k.shape[2]) or mask.dtype.is_floating_point:
        raise ValueError(
            f"sparse_patch: an attention mask of shape {tuple(mask.shape)} and {mask.dtype} is "
            f"neither 4-D nor boolean padding [batch, kv_len] = {(q.shape[0], k.shape[2])}; call "
            "sparse_patch.unpatch(model)"
        )


def exact_of(call: Call) -> Exact:
    """Exact attention as a call asks for it."""
    return Exact(
        scale=call.scale,
        causal=call.causal,
        softcap=call.softcap,
        sinks=call.sinks,
        bias=call.bias,
        dropout=call.dropout,
    )


def _span_by_span(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call, state: LayerState | None
) -> Tensor:
    """Each sequence without padding and neighbours, so that it gets the answer it would get alone.

    Args:
        mask: `[batch, kv_len]`, see `sequences`; None: nothing but causality hides keys.
        state: decides sparse or exact per sequence; None: all exact.

    Returns:
        `[batch, q_len, heads, v_dim]`; padded rows are 0.
    """
    q_len, rows = q.shape[2], []
    for row, spans in enumerate(spans_of(mask, *q.shape[:3:2])):
        if not spans and state is not None:
            state.count_exact("all padding")
        outs = [
            _one_span(
                q[row][:, span.queries],
                k[row][:, span.keys],
                v[row][:, span.keys],
                call.of(row, span, q_len),
                span,
                state,
                row,
            ).transpose(0, 1)
            for span in spans
        ]
        if len(outs) == 1 and len(outs[0]) == q_len:
            rows.append(outs[0])
            continue
        whole = q.new_zeros(q_len, q.shape[1], v.shape[3])
        for span, out in zip(spans, outs, strict=True):
            whole[span.queries] = out
        rows.append(whole)
    return rows[0][None].contiguous() if len(rows) == 1 else torch.stack(rows)


def _one_span(
    q: Tensor, k: Tensor, v: Tensor, call: Call, span: Span, state: LayerState | None, row: int
) -> Tensor:
    """`[heads, q_len, v_dim]` of one sequence."""
    if span.first is not None:
        if state is not None:
            state.count_exact("sliding window")
        return exact_of(call)(q[None], k[None], v[None], first=span.first)[0]
    bill = None
    if state is not None:
        bill = state.bill(q, k, v, call)
        out = state.attend(q, k, v, call, row, bill)
        if isinstance(out, Tensor):
            return out
        state.count_exact(out)
    if bill is None:
        return exact_of(call)(q[None], k[None], v[None])[0]
    return _exact_as_billed(q, k, v, call, bill)


def _exact_as_billed(q: Tensor, k: Tensor, v: Tensor, call: Call, bill: Bill) -> Tensor:
    """Exact causal attention of one sequence, in the faster of two ways, and timed."""
    bill.start()
    if bill.exact_by_op:
        out = block_sparse_attention(
            q,
            k,
            v,
            keeps_all(q.shape[1], k.shape[1]),
            scale=call.scale,
            backend="cpu",
            softcap=call.softcap,
            sinks=call.sinks,
        )
    else:
        out = exact_of(call)(q[None], k[None], v[None])[0]
    bill.finish_exact()
    return out
