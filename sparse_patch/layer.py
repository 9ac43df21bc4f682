"""A patched layer: each sequence of a call is decided on, run and recorded, in this order.

    attend_batch   a whole call, sequence by sequence
    run_sparse     one sequence: plan -> op
    record         count the result

Padding is removed and packed sequences are split, so that every sequence gets the answer it would
get alone.
"""

from __future__ import annotations

import secrets
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sparse_patch_kernels import (
    BackendUnavailable,
    BlockPlan,
    block_sparse_attention,
)
from torch import Tensor

from .budget import Bill
from .call import Call
from .costs import keeps_all
from .decoding import Memories
from .diagnostics import recall
from .registry import Method
from .routing import Options, checksum, decodes_sparsely, waits, why_exact, why_sequence_exact
from .sequences import Span, spans_of, visible_to_last


@dataclass
class Run:
    """The result of one sequence.

    Attributes:
        reason: why it ran exact, a key of routing.REASONS; None if it ran sparse.
        plan: the method's plan, if it made one.
        out: `[heads, q_len, v_dim]`, if the plan was run.
        planning, attending, exact: seconds of each, on the CPU; None if it did not run.
        density: kept / causal of a plan that was run, mean over heads.
        recall: attention mass kept, if it is measured.
        decodes: is it a decode step?
    """

    reason: str | None = None
    plan: BlockPlan | None = None
    out: Tensor | None = None
    planning: float | None = None
    attending: float | None = None
    exact: float | None = None
    density: float | Tensor = 0.0
    recall: float | None = None
    decodes: bool = False


@dataclass
class LayerStats:
    """Counts of one layer; a call is one sequence in one forward. `sparse` is prefill only.

    Sums of densities stay on their device, because reading them would wait for it.
    """

    sparse: int = 0
    density: float | Tensor = 0.0
    decode: int = 0
    decode_density: float | Tensor = 0.0
    recall: float = 0.0
    measured: int = 0
    exact: Counter[str] = field(default_factory=Counter)

    def record(self, run: Run) -> None:
        """Count a sequence."""
        if run.reason is not None:
            self.exact[run.reason] += 1
        elif run.decodes:
            self.decode += 1
            self.decode_density = self.decode_density + run.density
        else:
            self.sparse += 1
            self.density = self.density + run.density
            if run.recall is not None:
                self.recall += run.recall
                self.measured += 1


# Handles are random, so that one in a graph saved by another process matches no layer here.
_HANDLE_BITS = 62

# Gets a layer, the q, k, v and call of a sequence, and the method's result; returns the output to
# go on with.
Observer = Callable[["LayerState", Tensor, Tensor, Tensor, Call, Run], Tensor]

_by_handle: weakref.WeakValueDictionary[int, LayerState] = weakref.WeakValueDictionary()


@dataclass
class LayerState:
    """State of a patched attention module; method None keeps the layer dense.

    `asked` counts the calls that reached this layer's attention. `number` names this object in
    recorded graphs, which hold only tensors and numbers; compiled graphs hold it as the tensor
    `handle`, since a number would be a constant and every layer a graph of its own. A copy gets a
    new number.
    """

    layer: int
    method: Method | None
    options: Options
    stats: LayerStats = field(default_factory=LayerStats)
    memories: Memories = field(default_factory=Memories, repr=False, compare=False)
    asked: int = field(default=0, compare=False)
    observer: Observer | None = field(default=None, repr=False, compare=False)
    number: int = field(init=False, repr=False, compare=False)
    handle: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.number = secrets.randbits(_HANDLE_BITS)
        self.handle = torch.tensor(self.number, device="cpu")
        _by_handle[self.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @staticmethod
    def of_handle(handle: int) -> LayerState:
        """The object of that handle.

        Raises:
            RuntimeError: the graph outlived the patch it was compiled with.
        """
        state = _by_handle.get(handle)
        if state is None:
            raise RuntimeError(
                "sparse_patch: this compiled graph belongs to a removed patch; compile the model "
                "again, after patching"
            )
        return state

    @property
    def sparse_decode(self) -> bool:
        return decodes_sparsely(self.method)

    def record(self, run: Run) -> None:
        """Count the result of a sequence, and warn of exact calls that a user may not expect."""
        self.stats.record(run)
        if run.reason is not None:
            self.options.warn_once(run.reason)

    def clock(self, device: torch.device) -> Callable[[], float]:
        """A clock in seconds; with an observer it waits for the device first."""
        if self.observer is None or device.type != "cuda":
            return time.perf_counter

        def clock() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return clock


def attend_batch(
    state: LayerState | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call
) -> Tensor:
    """A whole call.

    Args:
        state: the layer's; None: all exact, and not counted.
        q: `[batch, heads, q_len, dim]`; k, v: `[batch, kv_heads, kv_len, ...]`.
        mask: `[batch, kv_len]` (see `sequences`) or 4-D; None: causal, nothing else.

    Returns:
        `[batch, q_len, heads, v_dim]`; padded rows are 0.
    """
    # Methods and kernels choose their precision themselves.
    with torch.autocast(q.device.type, enabled=False):
        return _attend_batch(state, q, k, v, mask, call)


def _attend_batch(
    state: LayerState | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call
) -> Tensor:
    if state is not None:
        state.asked += 1
        reason = why_exact(state.options, state.method, q, k, v, mask, call)
        if reason is not None:
            for _ in range(max(1, len(q))):
                state.record(Run(reason))
            state = None
    batch, _, q_len, _ = q.shape
    if state is None and (mask is None or mask.ndim == 4 or q_len == 1 or batch == 0):
        if mask is not None and mask.ndim == 2:
            mask = visible_to_last(mask)  # all rows at once
        return call.attend(q, k, v, mask).transpose(1, 2).contiguous()
    rows = []
    for row, spans in enumerate(spans_of(mask, batch, q_len)):
        if not spans and state is not None:
            state.record(Run("all padding"))
        outs = [_attend_span(state, q[row], k[row], v[row], call, span, row) for span in spans]
        if len(outs) == 1 and outs[0].shape[1] == q_len:
            rows.append(outs[0].transpose(0, 1))
            continue
        whole = q.new_zeros(q_len, q.shape[1], v.shape[3])
        for span, out in zip(spans, outs, strict=True):
            whole[span.queries] = out.transpose(0, 1)
        rows.append(whole)
    return rows[0][None].contiguous() if len(rows) == 1 else torch.stack(rows)


def _attend_span(
    state: LayerState | None, q: Tensor, k: Tensor, v: Tensor, call: Call, span: Span, row: int
) -> Tensor:
    """`[heads, queries, v_dim]` of one sequence in a row: decide, run, record."""
    call = call.of(row, span, q.shape[1])
    q, k, v = q[:, span.queries], k[:, span.keys], v[:, span.keys]
    if state is None or span.first is not None:
        if state is not None:
            state.record(Run("sliding window"))
        return call.attend(q[None], k[None], v[None], first=span.first)[0]
    bill = state.options.bill(state.layer, q, k, v, call)
    decodes, step = q.shape[1] == 1 and state.sparse_decode, state.memories.step
    memory = step.memory(row, k.shape[1]) if decodes else None
    new = k if memory is None else k[:, -1:]  # earlier steps have checked the earlier keys
    least = state.options.least_keys(state.method, q, k, v)
    run = Run(why_sequence_exact(state.options, q, k, new, bill, least))
    if run.reason is None:
        run, memory = run_sparse(state, q, k, v, call, bill, memory, decodes)
        if decodes:
            step.after[row] = k.shape[1], memory
    out = run.out if run.out is not None else _run_exact(run, q, k, v, call, bill)
    state.record(run)
    if bill is not None:
        bill.settle(run.planning, run.attending, run.exact)
    return out


def run_sparse(
    state: LayerState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    bill: Bill | None = None,
    memory: Any = None,
    decodes: bool = False,
) -> tuple[Run, Any]:
    """Choose keys, and attend to them.

    Methods choose by the plain logits: a soft cap keeps their order, and sinks scale all keys of a
    row alike. On a GPU, q and k have not been checked for finite values: if any is not finite, the
    whole output becomes NaN, so that the error shows.

    Args:
        q: `[heads, q_len, dim]`; k, v: `[kv_heads, kv_len, ...]`; one causal sequence.
        bill: may find that the plan does not pay.
        memory: of the previous decode step; `decodes`: this is a decode step.

    Returns:
        The result, and the memory for the next step.
    """
    method, options = state.method, state.options
    assert method is not None
    clock = state.clock(q.device) if bill is None else bill.clock
    started = clock()
    if decodes:
        plan, memory = method.decode(q, k, scale=call.scale, memory=memory)
    else:
        plan = method.plan(q, k, scale=call.scale, q_offset=k.shape[1] - q.shape[1])
    run = Run(plan=plan, decodes=decodes)
    if bill is not None:
        run.reason = bill.why_not(plan)
    elif plan is None:
        run.reason = "method"
    planned = clock()
    run.planning = planned - started
    if plan is None or run.reason is not None:
        return run, memory
    try:
        run.out = _run_plan(q, k, v, plan, call, options.backend)
    except BackendUnavailable:
        if options.backend != "auto":
            raise
        options.without_backend.add(q.device)
        return Run("no backend"), None
    if waits(q):
        total = checksum(q, k)
        run.out += (total - total).to(run.out.dtype)  # 0, or NaN if anything was not finite
    run.attending = clock() - planned
    run.density = plan.head_density().mean() if bill is None else bill.density
    if options.measure_recall and not decodes:
        rows = None if options.measure_recall is True else int(options.measure_recall)
        kept = recall(q, k, plan, scale=call.scale, rows=rows, softcap=call.softcap)
        run.recall = float(kept.mean())
    if state.observer is not None:
        run.out = state.observer(state, q, k, v, call, run)
    return run, memory


def _run_exact(run: Run, q: Tensor, k: Tensor, v: Tensor, call: Call, bill: Bill | None) -> Tensor:
    """`[heads, q_len, v_dim]`; with a bill, by the faster of two ways, and timed."""
    clock = time.perf_counter if bill is None else bill.clock
    started = clock()
    if bill is not None and bill.exact_by_op:
        plan = keeps_all(q.shape[1], k.shape[1])
        out = _run_plan(q, k, v, plan, call, "cpu")
    else:
        out = call.attend(q[None], k[None], v[None])[0]
    run.exact = clock() - started
    return out


def _run_plan(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, call: Call, backend: str) -> Tensor:
    return block_sparse_attention(
        q,
        k,
        v,
        plan,
        scale=call.scale,
        backend=backend,
        softcap=call.softcap,
        sinks=call.sinks,
    )
