"""Whole prefills: a model for every length, and prompts of its own for every round."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sparse_patch_eval.inputs.models import load_for_lengths
from sparse_patch_eval.inputs.text import passkey_prompt
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

DENSE = "dense SDPA"
WARM_UP_TOKENS = 1536


class Prefills:
    """The model of a benchmark at ascending lengths.

    Attributes:
        model, tokenizer: of the length that was last asked for.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __init__(self, name: str, lengths: Iterable[int], text: str, **options: Any) -> None:
        """text: what prompts are of. options: of `load`."""
        self._loaded = load_for_lengths(name, set(lengths), **options)
        self._length, self._text = 0, text

    def at(self, length: int, warm_up: Callable[[], None]) -> None:
        """Go on to a length; a model that is new is warmed up."""
        known = getattr(self, "model", None)
        while self._length != length:
            self._length, self.model, self.tokenizer = next(self._loaded)
        if self.model is not known:
            warm_up()

    def prompt(self, length: int, seed: int) -> Tensor:
        """Token ids `[1, length]`, where the model is; another seed shares nothing with it."""
        prompt = passkey_prompt(self.tokenizer, length, text=self._text, seed=seed)
        return prompt.input_ids.to(self.model.device)
