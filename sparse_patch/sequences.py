"""The sequences in a batch: which keys each row sees, in one number per key.

A mask `[batch, kv_len]` has a value per key; the queries are the last keys:

    bool    True at a real token, False at padding;
    int64   the first key that a query at this place sees (it sees all from there to itself), or
            `kv_len` at padding.

The second form describes what hides keys besides causality and padding, without a square mask:
windows (i - w + 1), chunks (where i's chunk begins) and packed sequences (where i's sequence
begins).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# What other code may do to a mask on its way to attention, besides reading its attributes.
_HARMLESS = {
    Tensor.__getitem__, Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.contiguous, Tensor.clone,
    Tensor.detach, Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.as_subclass,
    Tensor.is_floating_point, torch.is_floating_point, Tensor.is_contiguous, Tensor.element_size,
    Tensor.data_ptr, Tensor.untyped_storage, Tensor.record_stream, Tensor.pin_memory,
    Tensor.__repr__, Tensor.__len__, Tensor.__deepcopy__, Tensor.__reduce_ex__,
}  # fmt: skip


class CausalMask(Tensor):
    """A mask `[batch, kv_len]` as above, that only our attention may read.

    Code that takes it for the usual 4-D mask would broadcast it, and let queries see the future. So
    it can be passed on, moved, and cut with the four indices of a 4-D mask (as Gemma 4's layers
    that share keys do; it does not depend on the query's index, so that cuts its own two axes);
    computing with it is an error. Converted to bool it is the padding: `generate` passes masks to
    models that take them for padding, and make a new one.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", repr(func))
        if func not in _HARMLESS and name != "__get__":
            raise _misused(name)
        if func is Tensor.__getitem__:
            args = (args[0], _two_indices(*args))
        out = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if isinstance(out, CausalMask) and out.dtype != args[0].dtype:
            if out.dtype != torch.bool:
                raise _misused(f"{name}({out.dtype})")
            return padding_of(args[0]).to(out.device).as_subclass(CausalMask)
        return out


def padding_of(mask: Tensor) -> Tensor:
    """bool `[batch, kv_len]`, True at real tokens, from a mask as above or one of 0 and 1."""
    plain = _plain(mask)
    if plain.dtype == torch.bool:
        return plain
    return plain <= torch.arange(plain.shape[1], device=plain.device)


def _plain(mask: Tensor) -> Tensor:
    """The mask as a plain tensor, since indexing keeps a subclass; others become bool."""
    return mask.as_subclass(Tensor) if isinstance(mask, CausalMask) else mask.bool()


def _two_indices(mask: Tensor, index: Any) -> Any:
    """The indices of the mask's two axes, from those of a 4-D mask.

    Raises:
        RuntimeError: keys are cut off an int64 mask, whose numbers count from the first key.
    """
    two = (index[0], index[3]) if isinstance(index, tuple) and len(index) == 4 else index
    keys = two[1] if isinstance(two, tuple) and len(two) > 1 else slice(None)
    whole = isinstance(keys, slice) and keys.indices(mask.shape[1]) == (0, mask.shape[1], 1)
    if mask.dtype != torch.bool and not whole:
        raise _misused(f"[{index}]")
    return two


def _misused(how: str) -> RuntimeError:
    return RuntimeError(
        f"sparse_patch: {how} on the attention mask of a patched model, which only sparse_patch "
        "can read: another library replaced a forward after the model was patched, or this model "
        "family computes with its mask. Call sparse_patch.unpatch(model)."
    )


@dataclass(frozen=True)
class Span:
    """Some queries of a batch row and the keys that they see: causal, the queries being the last.

    Attributes:
        keys: their indices in the row.
        queries: their indices among the row's queries.
        first: int64 `[queries]`, on the CPU: index into `keys` of the first key that each query
            sees; None: 0.
    """

    keys: slice | Tensor
    queries: slice | Tensor
    first: Tensor | None = None


_WHOLE = Span(slice(None), slice(None))
_SPANS = "_sparse_patch_spans"


def spans_of(mask: Tensor | None, batch: int, q_len: int) -> list[list[Span]]:
    """The spans of every row of a batch; none in a row that is all padding.

    Every packed sequence and every chunk is a span, but not a single query beyond its window. The
    layers of a forward share a mask, whose values are read once.

    Args:
        mask: `[batch, kv_len]` as above; None: causal, nothing else.
        q_len: number of queries, which are the last keys.
    """
    if mask is None:
        return [[_WHOLE]] * batch
    known: tuple[int, list[list[Span]]] | None = getattr(mask, _SPANS, None)
    if known is None or known[0] != q_len:
        known = q_len, [_spans_of_row(row, q_len, mask.device) for row in _plain(mask).cpu()]
        if isinstance(mask, CausalMask):  # its values never change
            setattr(mask, _SPANS, known)
    return known[1]


def requests_of(query_ends: Sequence[int], key_ends: Sequence[int]) -> list[Span]:
    """The requests of a row in which an engine has packed several, one after the other.

    Args:
        query_ends: 0, and where the queries of each request end.
        key_ends: 0, and where its keys end, those that came in earlier steps before its queries'.

    Returns:
        A span for each request that has queries; engines pad a batch with others.

    Raises:
        ValueError: the two are not of the same requests.
    """
    requests = []
    pairs = zip(pairwise(query_ends), pairwise(key_ends), strict=True)
    for (query, query_end), (key, key_end) in pairs:
        if query_end - query > key_end - key:
            raise ValueError(
                f"a request of {query_end - query} queries has {key_end - key} keys: "
                f"query_ends={list(query_ends)}, key_ends={list(key_ends)}"
            )
        if query < query_end:
            requests.append(Span(slice(key, key_end), slice(query, query_end)))
    return requests


def window_of(kv_len: int, window: int | None) -> CausalMask | None:
    """The mask `[1, kv_len]` of one sequence whose rows see `window` keys each; None: that, or that
    there is no window, hides nothing."""
    if window is None or kv_len <= window:
        return None
    first = (torch.arange(kv_len) - window + 1).clamp(min=0)
    mask: CausalMask = first[None].as_subclass(CausalMask)
    return mask


def visible_to_last(mask: Tensor) -> Tensor:
    """bool `[batch, 1, 1, kv_len]`: the keys that the last query of each row sees."""
    mask = _plain(mask)
    place = torch.arange(mask.shape[1], device=mask.device)
    visible = mask if mask.dtype == torch.bool else (mask <= place) & (place >= mask[:, -1:])
    return visible[:, None, None]


def _spans_of_row(row: Tensor, q_len: int, device: torch.device) -> list[Span]:
    """Spans of `row [kv_len]`, a CPU tensor; their indices are on `device`."""
    real = row if row.dtype == torch.bool else row <= torch.arange(len(row))
    keys, queries = real.nonzero()[:, 0], real[len(row) - q_len :].nonzero()[:, 0]
    n = len(queries)

    def span(some_keys: slice, some_queries: slice, first: Tensor | None = None) -> Span:
        of_keys, of_queries = keys[some_keys], queries[some_queries]
        return Span(_compact(of_keys, device), _compact(of_queries, device), first)

    if n == 0:
        return []
    if row.dtype == torch.bool:
        return [span(slice(None), slice(None))]
    rank = real.cumsum(0) - real.long()  # a key's place among the real ones
    first = rank[row[len(row) - q_len :][queries]]
    starts, lengths = torch.unique_consecutive(first, return_counts=True)
    own = len(keys) - n + lengths.cumsum(0) - lengths
    begin_with_themselves = bool((starts[1:] == own[1:]).all()) and 2 * len(starts) <= n + 1
    if n > 1 and begin_with_themselves:
        return [
            span(slice(start, at + length), slice(at - len(keys) + n, at - len(keys) + n + length))
            for start, at, length in zip(
                starts.tolist(), own.tolist(), lengths.tolist(), strict=True
            )
        ]
    return [span(slice(None), slice(None), first)]


def _compact(index: Tensor, device: torch.device) -> slice | Tensor:
    """An ascending index as a slice where it is one: slicing needs no copy."""
    first, last = int(index[0]), int(index[-1])
    if last - first + 1 == len(index):
        return slice(first, last + 1)
    return index.to(device)
