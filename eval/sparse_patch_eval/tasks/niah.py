"""RULER's eight needle-in-a-haystack tasks (arXiv:2404.06654, section 3.1).

Statements "One of the special magic numbers for KEY is: VALUE." hide in a haystack, and the values
of some keys are asked for. Prompts and parameters are RULER's. Its essays are prose of our own
(`text.long_text`), its sentence splitter a plain rule, and the requested needle takes all 40 depths
in turn over the samples, where RULER draws each anew: 40 samples are spread evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparse_patch_eval.tasks.problem import CANDIDATES, Draw, Growth, Problem, Series, one_replaced
from sparse_patch_eval.tasks.values import (
    DEPTHS,
    LEAST_WORDS,
    NOISE,
    ValueType,
    distinct,
    insert,
    listed,
    prose,
)

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?"
)
_ONE_PREFIX = "The special magic {kind} for {query} mentioned in the provided text is"
_SOME = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
_SOME_PREFIX = "The special magic {kind} for {query} mentioned in the provided text are"


@dataclass(frozen=True)
class Niah:
    """RULER's parameters, by its names.

    Attributes:
        type_haystack: "noise" (one line repeated), "essay" (prose) or "needle" (statements about
            other keys).
        type_needle_k: what keys are.
        type_needle_v: what values are.
        num_needle_k: keys in the haystack (at least `num_needle_q`).
        num_needle_v: values of each key.
        num_needle_q: keys that are asked for.
        tokens_to_generate: tokens kept free for the answer.
    """

    type_haystack: Literal["noise", "essay", "needle"]
    type_needle_k: ValueType = "words"
    type_needle_v: ValueType = "numbers"
    num_needle_k: int = 1
    num_needle_v: int = 1
    num_needle_q: int = 1
    tokens_to_generate: int = 128

    def grow(self, draw: Draw) -> Growth:
        """Draw keys, values and their places; the first keys are the ones asked for."""
        keys = Series(distinct(self.type_needle_k, draw.random("keys")))
        values = Series(distinct(self.type_needle_v, draw.random("values")))
        number = max(self.num_needle_k, self.num_needle_q) * self.num_needle_v
        asked = self.num_needle_q * self.num_needle_v
        rng = draw.random("needles")
        depths = [draw.depth]
        depths += rng.sample([depth for depth in DEPTHS if depth != draw.depth], number - 1)
        # The answer lists the values of a key in the order of the prompt.
        order = sorted(range(asked), key=lambda n: (n // self.num_needle_v, depths[n]))
        gold = [values.first(asked)[n] for n in order]
        if asked == 1:
            # The next values are those of other needles, if there are any.
            wrong = values.first(CANDIDATES)[1:]
        else:
            wrong = [listed(answer) for answer in one_replaced(gold, gold, rng)]
        holders = keys.first(number)
        needles = [
            self._statement(holders[n // self.num_needle_v], value)
            for n, value in enumerate(values.first(number))
        ]
        window = prose(draw) if self.type_haystack == "essay" else None
        kind = self.type_needle_v.removesuffix("s") if asked == 1 else self.type_needle_v
        query = listed(keys.first(self.num_needle_q))
        prompt, prefix = (_ONE, _ONE_PREFIX) if asked == 1 else (_SOME, _SOME_PREFIX)

        def context(units: int) -> str:
            if window is not None:
                cuts = [window.cut(units, depth) for depth in depths]
                return " ".join(insert(window.words[:units], cuts, needles))
            lines = [NOISE] * units
            if self.type_haystack == "needle":
                pairs = zip(keys.first(number + units), values.first(number + units), strict=True)
                lines = [self._statement(key, value) for key, value in pairs][number:]
            return "\n".join(insert(lines, [int(units * depth) for depth in depths], needles))

        def build(units: int) -> Problem:
            return Problem(
                input=prompt.format(kind=kind, query=query, context=context(units)),
                gen_prefix=prefix.format(kind=kind, query=query),
                outputs=tuple(values.first(asked)),
                answer=listed(gold),
                wrong=tuple(wrong),
                depth=draw.depth,
            )

        if window is not None:
            return Growth(build, least=LEAST_WORDS, most=len(window.words))
        return Growth(build, least=CANDIDATES, most=draw.length)

    def _statement(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.type_needle_v, key=key, value=value)
