"""What a model passes to attention besides the tensors: every keyword is handled or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .exact import Exact
from .sequences import CausalMask, Span

# Keywords that a model may pass to attention. Handled by `Call`:
_HANDLED = {"is_causal", "softcap", "s_aux", "sinks", "position_bias"}
# Handled before attention: the mask says what these hide (see `masks`).
_IN_THE_MASK = {"sliding_window", "max_length_q", "max_length_k", "cu_seq_lens_q", "cu_seq_lens_k"}
_IN_THE_MASK |= {"seq_idx"}
# Without effect on which keys are seen or what they weigh: kernel settings, positions that the
# rotary embeddings have used, further outputs, arguments of other parts of the model.
_ELSEWHERE = {
    "cache_position", "deterministic", "labels", "logits_to_keep", "mm_token_type_ids",
    "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits",
    "past_key_values", "position_embeddings", "position_ids", "return_dict", "token_type_ids",
    "use_cache",
}  # fmt: skip
_SELECTS_KEYS = {"indices", "block_indices"}


@dataclass(frozen=True)
class Call(Exact):
    """What a model asks of one attention call, besides its tensors.

    Attributes:
        training: is the model in training mode?
    """

    scale: float
    training: bool = False

    @classmethod
    def read(
        cls,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        dropout: float,
        kw: Mapping[str, Any],
    ) -> Call:
        """Read every keyword that a model passes.

        Raises:
            RuntimeError: a keyword is unknown, or asks for something unsupported.
            ValueError: the mask has a form that could be misread.
        """
        _check_mask(mask, q, k)
        _refuse_keywords(kw, mask)
        causal = True if isinstance(mask, CausalMask) else kw.get("is_causal")  # a mask has it
        sinks = kw.get("s_aux")
        sinks = kw.get("sinks") if sinks is None else sinks
        return cls(
            scale=q.shape[3] ** -0.5 if scaling is None else float(scaling),
            causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
            training=module.training,
            softcap=kw.get("softcap"),
            sinks=None if sinks is None else _sinks(sinks, q),
            bias=_bias(kw.get("position_bias"), q, k),
            dropout=float(dropout),
        )

    def of(self, row: int, span: Span, q_len: int) -> Call:
        """The call for one span of a row: sinks and bias are cut to its queries and keys."""
        bias, sinks = self.bias, self.sinks
        if bias is not None:
            row_bias = bias[row if bias.shape[0] > 1 else 0][None].expand(-1, -1, q_len, -1)
            bias = row_bias[:, :, span.queries][..., span.keys]
        if sinks is not None and sinks.ndim > 1:
            sinks = sinks[row][None][..., span.queries]
        return dataclasses.replace(self, bias=bias, sinks=sinks)

    def as_arguments(self) -> dict[str, Any]:
        """The fields by name, as they are: `dataclasses.asdict` would copy the tensors."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _refuse_keywords(kw: Mapping[str, Any], mask: Tensor | None) -> None:
    """Raise a RuntimeError for what would change the answer if it were left out."""
    for name, value in kw.items():
        if value is None or name in _HANDLED or name in _ELSEWHERE:
            continue
        if name in _SELECTS_KEYS:
            raise RuntimeError(
                f"sparse_patch: this model selects keys itself ({name} was passed to "
                "attention); patching would undo that. Call sparse_patch.unpatch(model)."
            )
        if name == "cache":
            raise RuntimeError(
                "sparse_patch: a paged cache reached attention without what continuous batching "
                "says of its requests (read_index, cu_seq_lens_q, ...). Use model.generate_batch "
                "or model.generate, or call sparse_patch.unpatch(model)."
            )
        if name not in _IN_THE_MASK and value is not False:
            raise RuntimeError(
                f"sparse_patch: unknown keyword {name}= reached attention; ignoring it could "
                "change the answer. If you passed it, leave it out of the call; if the model did, "
                "call sparse_patch.unpatch(model)."
            )
        packed = name == "cu_seq_lens_q" and len(value) > 2
        if packed and (mask is None or (mask.ndim == 2 and mask.dtype == torch.bool)):
            raise RuntimeError(
                "sparse_patch: cu_seq_lens_q= reached attention, but the model's mask was made "
                "without it (in a compiled graph, or because the decoder was not called as a "
                "module), so packed sequences would see one another. Call the model uncompiled, or "
                "one sequence at a time."
            )


def _sinks(sinks: Tensor, q: Tensor) -> Tensor:
    """`[heads]`, or `[batch, heads, q_len]`, from any shape that broadcasts to q's first axes."""
    batch, heads, q_len, _ = q.shape
    if sinks.numel() == heads:
        return sinks.reshape(heads)
    if sinks.ndim == 4 and sinks.shape[3] == 1:
        return sinks[..., 0].expand(batch, heads, q_len)
    raise RuntimeError(
        f"sparse_patch: attention sinks of shape {tuple(sinks.shape)} for {heads} heads and "
        f"{q_len} queries are not supported. Call sparse_patch.unpatch(model)."
    )


def _bias(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A position bias, cut to the keys.

    Raises:
        RuntimeError: it does not broadcast to the logits.
    """
    if bias is None:
        return None
    fits = bias.ndim == 4 and all(bias.shape[i] in (1, q.shape[i]) for i in range(3))
    if not fits or bias.shape[3] < k.shape[2]:
        raise RuntimeError(
            f"sparse_patch: a position bias of shape {tuple(bias.shape)} does not fit queries "
            f"{tuple(q.shape)} and keys {tuple(k.shape)}. Call sparse_patch.unpatch(model)."
        )
    return bias[..., : k.shape[2]]


def _check_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Refuse a mask of the model's own that we could misread."""
    if mask is None or mask.ndim == 4:
        return
    if mask.shape != (q.shape[0], k.shape[2]) or mask.dtype.is_floating_point:
        raise ValueError(
            f"sparse_patch: an attention mask of shape {tuple(mask.shape)} and {mask.dtype} is "
            f"neither 4-D nor boolean padding [batch, kv_len] = {(q.shape[0], k.shape[2])}; call "
            "sparse_patch.unpatch(model)"
        )


def as_sdpa_gets_them(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors in the dtype in which SDPA would get them: under autocast, autocast's dtype.

    Raises:
        ValueError: they differ in dtype.
    """
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"sparse_patch: query, key and value are {q.dtype}, {k.dtype} and {v.dtype}; attention "
            "takes one dtype, unpatched too. Run the model under torch.autocast, or in one dtype: "
            "model.to(torch.bfloat16)."
        )
    return q, k, v
