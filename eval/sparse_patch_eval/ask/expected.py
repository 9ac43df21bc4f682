"""What a method will do at a length, before a model runs."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from sparse_patch import Method

__all__ = ["keeps_everything"]

# Longer prompts are not tried: a plan for them takes time.
_LONGEST = 8192
_DIM = 32


def keeps_everything(method: Method, length: int, config: PreTrainedConfig) -> bool:
    """Does a method leave a prompt of this length to exact attention, whatever is in it?

    Random queries and keys, in the model's numbers of heads, decide: a plan that is None for them
    is so because of the length. False where that cannot be tried.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if length > _LONGEST or heads is None:
        return False
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, length, _DIM, generator=generator) for n in (heads, kv_heads))
    try:
        plan = method.for_layer(method.dense_layers).plan(q, k, scale=_DIM**-0.5, q_offset=0)
    except ValueError:  # such as a table for other layers, which the run will say
        return False
    return plan is None
