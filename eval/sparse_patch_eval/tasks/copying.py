"""Needles in copy wording: the prompt ends with the needle's own words, up to the number.

The statements and the question are those of `text.passkey_prompt`: a small model answers them where
it fails RULER's question. Used by `sp_needle` (one number), `sp_needle_multi` (eight) and the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparse_patch_eval.inputs.text import QUESTION, STATEMENT, WORDS
from sparse_patch_eval.tasks.problem import CANDIDATES, Draw, Growth, Problem, Series
from sparse_patch_eval.tasks.values import LEAST_WORDS, distinct, insert, prose


@dataclass(frozen=True)
class Copying:
    """Numbers for some words in prose; the number of one word is asked for.

    Attributes:
        keys: words with a number, at most 8; all but the one asked for stand anywhere.
        tokens_to_generate: tokens kept free for the answer.
    """

    keys: int = 1
    tokens_to_generate: int = 16

    def grow(self, draw: Draw) -> Growth:
        """Draw words, numbers and places; needles may stand between any two words of prose."""
        rng = draw.random("needles")
        names = rng.sample(WORDS, self.keys)
        numbers = Series(distinct("numbers", draw.random("values"))).first(CANDIDATES)
        depths = [draw.depth, *(rng.random() for _ in names[1:])]
        statements = [STATEMENT.format(word=name) for name in names]
        needles = [
            f"\n{statement} {number}.\n"
            for statement, number in zip(statements, numbers, strict=False)
        ]
        window = prose(draw)

        def build(units: int) -> Problem:
            cuts = [round(units * depth) for depth in depths]
            return Problem(
                input=" ".join(insert(window.words[:units], cuts, needles))
                + QUESTION.format(word=names[0]),
                gen_prefix=statements[0],
                outputs=(numbers[0],),
                answer=numbers[0],
                wrong=tuple(numbers[1:]),
                depth=draw.depth,
            )

        return Growth(build, least=LEAST_WORDS, most=len(window.words))
