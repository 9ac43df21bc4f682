"""The attention function a patched model calls: sparse where it can be, exact where it must.

It knows tensors and a module's `LayerState`, not Transformers. Padding is taken out row by row, so
that every sequence gets the answer it would get alone.
"""

from __future__ import annotations

from typing import Any

import torch
from sparse_patch_kernels import block_sparse_attention
from torch import Tensor, nn

from .budget import Bill
from .costs import keeps_all
from .exact import Exact
from .routing import Call, LayerState

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
        attention_mask: what `mask_function` returns, or a 4-D mask of the user's own.

    Returns:
        `[batch, q_len, heads, v_dim]`, and no weights.

    Raises:
        ValueError: the mask is of a form that could be misread.
        RuntimeError: see `Call.read`.
    """
    call = Call.read(module, query.shape[-1], scaling, dropout, kwargs)
    state: LayerState | None = getattr(module, STATE, None)
    if not torch.compiler.is_compiling():
        return _attend(query, key, value, attention_mask, call, state), None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return _outside_the_graph(query, key, value, attention_mask, call, state), None
    layer = _NO_LAYER if state is None else state.handle
    return _attend_op(query, key, value, attention_mask, layer, **call.as_arguments()), None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call, state: LayerState | None
) -> Tensor:
    _check_mask(mask, q, k)
    if mask is not None:
        mask = mask.as_subclass(Tensor)  # what a subclass indexes becomes one, q and k too
    if state is not None:
        if q.shape[2] != 1:
            state.steps.clear()
        reason = state.why_exact(q, k, v, mask, call)
        if reason is None:
            return _row_by_row(q, k, v, mask, call, state)
        state.count_exact(reason, max(1, q.shape[0]))
    if mask is not None and mask.ndim == 2:
        if q.shape[2] == 1 and call.window is None:  # hides the same keys, all rows at once
            mask = mask[:, None, None]
            return exact_of(call)(q, k, v, mask).transpose(1, 2).contiguous()
        return _row_by_row(q, k, v, mask, call, None)
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
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    dropout: float,
) -> Tensor:
    call = Call(scale, causal, training, window, softcap, sinks, bias, dropout)
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
        window=call.window,
        softcap=call.softcap,
        sinks=call.sinks,
        bias=call.bias,
        dropout=call.dropout,
    )


def _row_by_row(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, call: Call, state: LayerState | None
) -> Tensor:
    """Each sequence without its padding, so that it gets the answer it would get alone.

    Args:
        padding: bool `[batch, kv_len]`, True at real tokens, or None.
        state: decides sparse or exact per row; None: all exact.

    Returns:
        `[batch, q_len, heads, v_dim]`; padded rows are 0.
    """
    rows = []
    for row in range(q.shape[0]):
        keys, queries = _real_tokens(padding, row, q.shape[2])
        real = slice(None) if queries is None else queries
        q_row = q[row][:, real]
        if q_row.shape[1] == 0:
            out = None
            if state is not None:
                state.count_exact("all padding")
        else:
            out = _one_row(q_row, k[row][:, keys], v[row][:, keys], call, state, row)
        if queries is not None:
            whole = q.new_zeros(q.shape[2], q.shape[1], v.shape[3])
            if out is not None:
                whole[queries] = out.transpose(0, 1)
            rows.append(whole)
        elif out is not None:
            rows.append(out.transpose(0, 1))
    return rows[0][None].contiguous() if len(rows) == 1 else torch.stack(rows)


def _one_row(
    q: Tensor, k: Tensor, v: Tensor, call: Call, state: LayerState | None, row: int
) -> Tensor:
    """`[heads, q_len, v_dim]` of one unpadded sequence."""
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


def _real_tokens(
    padding: Tensor | None, row: int, q_len: int
) -> tuple[slice | Tensor, slice | Tensor | None]:
    """Which keys and which queries of one row are real; None for "all queries"."""
    if padding is None:
        return slice(None), None
    real = padding[row].bool()
    return _compact(real.nonzero()[:, 0]), _compact(real[-q_len:].nonzero()[:, 0])


def _compact(index: Tensor) -> slice | Tensor:
    """An ascending index as a slice where it is one: slicing needs no copy."""
    n = index.numel()
    if n == 0:
        return slice(0, 0)
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == n else index
