"""Exact attention for every call that is not sparse: soft caps, sinks, windows, biases, any mask.

Not Transformers' SDPA wrapper, which raises on a soft cap, ignores sinks and sliding windows, and
aligns queries to the first keys when they are fewer than the keys. Differentiable; memory is
bounded by working through the query rows in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores, or mask entries, of one chunk of query rows, in elements.
_CHUNK_ELEMENTS = 1 << 26
# Bounds on the query rows per chunk where each row sees few keys.
_LEAST_ROWS, _MOST_ROWS = 64, 1024


@dataclass(frozen=True)
class Exact:
    """What a model asks of attention beyond softmax(scale * q k^T) v.

    Attributes:
        scale: factor on the logits; None is 1 / sqrt(head_dim).
        causal: key j is hidden from row i when j > i; the rows are the last of the keys.
        softcap: logits become softcap * tanh(logits / softcap), or None.
        sinks: `[heads]`, or `[batch, heads, q_len]`: extra logits that take part in the softmax and
            carry no value, or None.
        bias: `[batch or 1, heads or 1, q_len, kv_len]` added to the logits, or None.
        dropout: probability of dropping a weight.
    """

    scale: float | None = None
    causal: bool = True
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        first: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: `[batch, heads, q_len, dim]`.
            k, v: `[batch, kv_heads, kv_len, dim]`, `[batch, kv_heads, kv_len, v_dim]`.
            mask: `[batch, heads or 1, q_len, kv_len]`, bool (True: visible) or float (added to the
                logits); it replaces `causal`.
            first: int64 `[q_len]`, on the CPU: the first key that each row sees (of a sliding
                window, say), from there to itself. Time and memory grow with the keys seen.

        Returns:
            `[batch, heads, q_len, v_dim]`; rows that see nothing are 0.
        """
        if mask is not None:
            mask = mask[..., : k.shape[2]]
        plain = self.softcap is None and self.sinks is None and self.bias is None
        q_len, kv_len = q.shape[2], k.shape[2]
        hidden = mask is None and self.causal and q_len > 1
        if hidden and kv_len < q_len:
            raise ValueError(
                f"causal attention of {q_len} queries over {kv_len} keys: queries are the last rows"
            )
        if plain and first is None and (not hidden or q_len == kv_len):
            return self._sdpa(q, k, v, mask, is_causal=hidden)
        parts = []
        for rows in self._chunks(q, kv_len, first, plain):
            keys, visible = slice(0, kv_len), None
            if mask is not None:
                visible = mask[:, :, rows]
            elif self.causal:
                keys, visible = _causal(rows, q_len, kv_len, first, q.device)
            part = q[:, :, rows], k[:, :, keys], v[:, :, keys]
            if plain:
                parts.append(self._sdpa(*part, visible))
                continue
            bias, sinks = self.bias, self.sinks
            if bias is not None:
                bias = bias.expand(-1, -1, q_len, -1)[:, :, rows, keys]
            if sinks is not None and sinks.ndim > 1:
                sinks = sinks[:, :, rows]
            parts.append(self._explicit(*part, visible, bias, sinks))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _chunks(self, q: Tensor, kv_len: int, first: Tensor | None, plain: bool) -> Iterator[slice]:
        """Query rows to work through at once, so that memory stays bounded."""
        q_len, keys, most = q.shape[2], kv_len, q.shape[2]
        if first is not None:
            # As many rows as each sees keys, so that at most twice the keys of a row are loaded.
            widest = int((torch.arange(kv_len - q_len, kv_len) - first).max()) + 1
            most = max(_LEAST_ROWS, min(widest, _MOST_ROWS))
            keys = min(kv_len, widest + most)
        fit = _CHUNK_ELEMENTS // (keys * (1 if plain else q.shape[0] * q.shape[1]))
        step = max(1, min(most, fit))
        for start in range(0, q_len, step):
            yield slice(start, min(start + step, q_len))

    def _sdpa(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        is_causal: bool = False,
    ) -> Tensor:
        group = q.shape[1] // k.shape[1]
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        # On a GPU, grouped heads with a mask or unequal head sizes drop SDPA to its slow kernel.
        native = q.device.type == "cpu" or (mask is None and k.shape[-1] == v.shape[-1] <= 256)
        if group > 1 and not native:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout,
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=group > 1 and native,
        )

    def _explicit(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        acc = torch.promote_types(q.dtype, torch.float32)
        batch, heads, rows, dim = q.shape
        kv_heads = k.shape[1]
        grouped = q.to(acc).reshape(batch, kv_heads, -1, dim)
        scores = (grouped @ k.to(acc).mT).view(batch, heads, rows, -1)
        scores = scores * (dim**-0.5 if self.scale is None else self.scale)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if bias is not None:
            scores = scores + bias
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        elif mask is not None:
            scores = scores + mask
        if sinks is not None:
            sinks = sinks.to(acc) if sinks.ndim > 1 else sinks.to(acc)[:, None]
            sink = sinks.expand(batch, heads, rows)[..., None]
            probs = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            blind = scores.detach().amax(-1, keepdim=True) == float("-inf")
            probs = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
        if self.dropout:
            probs = F.dropout(probs, self.dropout)
        out = probs.reshape(batch, kv_heads, -1, scores.shape[-1]) @ v.to(acc)
        return out.view(batch, heads, rows, -1).to(q.dtype)


def _causal(
    rows: slice, q_len: int, kv_len: int, first: Tensor | None, device: torch.device
) -> tuple[slice, Tensor]:
    """The keys that any of these rows sees, and bool `[rows, keys]`: which row sees which."""
    end = kv_len - q_len + rows.stop
    begin = 0 if first is None else int(first[rows].min())
    row = torch.arange(end - (rows.stop - rows.start), end, device=device)[:, None]
    key = torch.arange(begin, end, device=device)
    visible = key <= row
    if first is not None:
        visible = visible & (key >= first[rows].to(device)[:, None])
    return slice(begin, end), visible
