"""A pass key in filler (Mohtashami and Jaggi, arXiv:2305.16300), in that paper's wording."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import cycle, islice

from sparse_patch_eval.tasks.problem import CANDIDATES, Draw, Growth, Problem
from sparse_patch_eval.tasks.values import NOISE, insert

_PROMPT = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n\n{context}\n\n"
    "What is the pass key?"
)
_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
_SENTENCES = re.findall(r"[^.]+\.", NOISE.replace(". ", "."))


@dataclass(frozen=True)
class Passkey:
    """One five-digit number, stated twice, between the sentences of the filler.

    Attributes:
        tokens_to_generate: tokens kept free for the answer.
    """

    tokens_to_generate: int = 16

    def grow(self, draw: Draw) -> Growth:
        """Draw the key and seven other numbers, which are not in the prompt."""
        key, *others = map(str, draw.random("values").sample(range(10**4, 10**5), CANDIDATES))

        def build(units: int) -> Problem:
            filler = list(islice(cycle(_SENTENCES), units))
            cut = round(units * draw.depth)
            text = " ".join(insert(filler, [cut], [_NEEDLE.format(key=key)]))
            return Problem(
                input=_PROMPT.format(context=text),
                gen_prefix="The pass key is",
                outputs=(key,),
                answer=key,
                wrong=tuple(others),
                depth=draw.depth,
            )

        return Growth(build, least=len(_SENTENCES), most=draw.length)
