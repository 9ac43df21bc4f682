"""One attention layer of an engine's model: which sequences of a step run sparse, and those run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call
from ..layer import LayerState, Run, run_sparse
from ..routing import why_exact, why_sequence_exact
from .batch import Piece
from .pages import Pages


@dataclass
class EngineLayer:
    """What is known of a layer before any step.

    Attributes:
        state: method, options and counts, as in a patched model.
        call: what the layer asks of attention.
        kv_heads: how many heads keys and values have.
        window: keys that a row sees, itself the last; None: all.
        always_exact: a reason (of `routing.REASONS`) why this layer runs exact.
        has_own_keys: are the keys of a step those that its tokens bring? A layer that shares
            another's cache reads them there.
    """

    state: LayerState
    call: Call
    kv_heads: int
    window: int | None = None
    always_exact: str | None = None
    has_own_keys: bool = True

    def attend(
        self,
        pieces: Sequence[Piece],
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        pages: Pages | None,
        out: Tensor,
        why_all_exact: str | None = None,
    ) -> list[Piece]:
        """Attend for the sequences that run sparse; count all of them.

        Args:
            pieces: the sequences of the step.
            q: `[tokens, heads, dim]`; k, v: `[tokens, kv_heads, dim]`, of the step's tokens.
            pages: the cache, these tokens included; None: it cannot be read.
            out: `[tokens, heads, dim]`, filled in where a sequence ran sparse.
            why_all_exact: a reason that holds in this step.

        Returns:
            The sequences that are left to the engine.
        """
        left = []
        for piece in pieces:
            run = self._run(piece, q, k, v, pages, why_all_exact)
            self.state.record(run)
            if run.out is None:
                left.append(piece)
            else:
                out[piece.start : piece.stop] = run.out.transpose(0, 1)
        return left

    def _run(
        self,
        piece: Piece,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        pages: Pages | None,
        why_all_exact: str | None,
    ) -> Run:
        rows = slice(piece.start, piece.stop)
        own = q[rows].transpose(0, 1)
        reason = self._why_exact(piece, own) or why_all_exact
        if reason is not None:
            return Run(reason)
        if piece.is_fresh and self.has_own_keys and k is not None and v is not None:
            keys, values = k[rows].transpose(0, 1), v[rows].transpose(0, 1)
        elif pages is not None:
            keys, values = pages.read(piece.index, piece.kv_len)
        else:
            return Run("cache")
        options = self.state.options
        reason = why_sequence_exact(options, own, keys, keys, None, options.min_length)
        if reason is not None:
            return Run(reason)
        with torch.no_grad():
            run, _ = run_sparse(self.state, own, keys, values, self.call)
        return run

    def _why_exact(self, piece: Piece, q: Tensor) -> str | None:
        """The reason why a sequence runs exact, judged before any key is read."""
        if piece.q_len == 1:
            return "decode"  # also of methods that choose keys for it: the engine is fast there
        shape = q.new_empty(()).expand(1, self.kv_heads, piece.kv_len, q.shape[2])
        with torch.no_grad():
            reason = why_exact(
                self.state.options, self.state.method, q[None], shape, shape, None, self.call
            )
        if reason is None:
            reason = self.always_exact
        if reason is None and self.window is not None and self.window < piece.kv_len:
            reason = "sliding window"
        return reason
