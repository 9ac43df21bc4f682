"""Exact attention for every call that is not sparse: padding, soft caps, sinks, windows, any mask.

Own code rather than Transformers' SDPA wrapper, because that one raises on a soft cap, ignores
sinks and sliding windows, and aligns queries to the first keys when they are fewer than the keys.
Differentiable; memory is bounded by working through the query rows in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores, or mask entries, of one chunk of query rows, in elements.
_CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Exact:
    """What a model asks of attention beyond softmax(scale * q k^T) v.

    Attributes:
        scale: factor on the logits; None is 1 / sqrt(head_dim).
        causal: key j is hidden from row i when j > i; the rows are the last of the keys.
        window: key j is hidden when i - j >= window (sliding window), or None.
        softcap: logits become softcap * tanh(logits / softcap), or None.
        sinks: `[heads]` extra logits that take part in the softmax and carry no value, or None.
        bias: `[batch or 1, heads or 1, q_len, kv_len]` added to the logits, or None.
        dropout: probability of dropping a weight.
    """

    scale: float | None = None
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            q: `[batch, heads, q_len, dim]`.
            k, v: `[batch, kv_heads, kv_len, dim]`, `[batch, kv_heads, kv_len, v_dim]`.
            mask: `[batch, heads or 1, q_len, kv_len]`, bool (True: visible) or float (added to the
                logits); it replaces `causal` and `window`.

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
        windowed = mask is None and self.window is not None and self.window < kv_len
        if plain and not windowed and (not hidden or q_len == kv_len):
            return self._sdpa(q, k, v, mask, is_causal=hidden)
        step = max(1, _CHUNK_ELEMENTS // (kv_len * (1 if plain else q.shape[0] * q.shape[1])))
        parts = []
        for start in range(0, q_len, step):
            rows = slice(start, min(start + step, q_len))
            seen = mask[:, :, rows] if mask is not None else self._visible(rows, q_len, kv_len, q)
            if plain:
                parts.append(self._sdpa(q[:, :, rows], k, v, seen))
            else:
                bias = None if self.bias is None else self.bias[..., rows, :kv_len]
                parts.append(self._explicit(q[:, :, rows], k, v, seen, bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _visible(self, rows: slice, q_len: int, kv_len: int, like: Tensor) -> Tensor | None:
        """bool `[rows, kv_len]` from `causal` and `window`; None when all is visible."""
        if not self.causal and self.window is None:
            return None
        row = torch.arange(rows.start, rows.stop, device=like.device)[:, None] + kv_len - q_len
        key = torch.arange(kv_len, device=like.device)
        seen = key <= row if self.causal else torch.ones_like(key <= row)
        return seen if self.window is None else seen & (row - key < self.window)

    def _sdpa(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        is_causal: bool = False,
    ) -> Tensor:
        group = q.shape[1] // k.shape[1]
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
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None
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
        if self.sinks is not None:
            sink = self.sinks.to(acc).view(1, -1, 1, 1).expand(batch, heads, rows, 1)
            probs = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            blind = scores.detach().amax(-1, keepdim=True) == float("-inf")
            probs = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
        if self.dropout:
            probs = F.dropout(probs, self.dropout)
        out = probs.reshape(batch, kv_heads, -1, scores.shape[-1]) @ v.to(acc)
        return out.view(batch, heads, rows, -1).to(q.dtype)
