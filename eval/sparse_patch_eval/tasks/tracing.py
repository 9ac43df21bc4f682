"""RULER's variable tracking (arXiv:2404.06654, section 3.2): a chain of assignments in noise.

"VAR A = 12345", "VAR B = VAR A", ... stand in this order anywhere in the noise, and all variables
of the chain are asked for. A solved example with shorter names comes first, as in RULER, where it
has up to 500 tokens: with its ten lines of noise, the shortest prompts have some 700 tokens.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from itertools import pairwise

from sparse_patch_eval.tasks.problem import Draw, Growth, Problem, Series, one_replaced
from sparse_patch_eval.tasks.values import NOISE, insert, letters

_PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
# "assgined" is RULER's spelling; the prompts are RULER's.
_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables "
    "are assgined the value {value}, they are:"
)
_EXAMPLE_LINES = 10
_EXAMPLE_LETTERS = 3
_LETTERS = 5


@dataclass(frozen=True)
class Tracing:
    """RULER's parameters, by its names.

    Attributes:
        num_chains: chains in the noise; the first is asked for.
        num_hops: assignments of a chain that pass its value on.
        tokens_to_generate: tokens kept free for the answer.
    """

    num_chains: int = 1
    num_hops: int = 4
    tokens_to_generate: int = 30

    def grow(self, draw: Draw) -> Growth:
        """Draw example and chains; the statements of a chain stay in order."""
        numbers = draw.random("numbers").sample(range(10**4, 10**5), 2 * self.num_chains)
        shown = self._chains(draw.random("example"), _EXAMPLE_LETTERS, numbers[self.num_chains :])
        chains = self._chains(draw.random("chains"), _LETTERS, numbers)
        asked = chains[0]
        example = (
            f"{shown[0].question(_text(shown, _EXAMPLE_LINES))} {shown[0].prefix} "
            f"{' '.join(shown[0].names)}\n\n"
        )
        wrong = one_replaced(asked.names, asked.names, draw.random("wrong"))

        def build(units: int) -> Problem:
            return Problem(
                input=example + asked.question(_text(chains, units)),
                gen_prefix=asked.prefix,
                outputs=tuple(asked.names),
                answer=" ".join(asked.names),
                wrong=tuple(map(" ".join, wrong)),
                depth=round(units * asked.depths[0]) / units,
            )

        return Growth(build, least=self.num_hops + 1, most=draw.length)

    def _chains(self, rng: random.Random, size: int, numbers: list[int]) -> list[_Chain]:
        length = self.num_hops + 1
        names = Series(letters(string.ascii_uppercase, size, rng)).first(self.num_chains * length)
        return [
            _Chain(
                names[n * length : (n + 1) * length],
                numbers[n],
                sorted(rng.random() for _ in range(length)),
            )
            for n in range(self.num_chains)
        ]


@dataclass(frozen=True)
class _Chain:
    names: list[str]
    value: int
    depths: list[float]

    @property
    def statements(self) -> list[str]:
        hops = [f"VAR {later} = VAR {earlier}" for earlier, later in pairwise(self.names)]
        return [f"VAR {self.names[0]} = {self.value}", *hops]

    @property
    def prefix(self) -> str:
        return _PREFIX.format(count=len(self.names), value=self.value)

    def question(self, context: str) -> str:
        return _PROMPT.format(context=context, value=self.value)


def _text(chains: list[_Chain], units: int) -> str:
    cuts = [round(units * depth) for chain in chains for depth in chain.depths]
    statements = [statement for chain in chains for statement in chain.statements]
    return "\n".join(insert([NOISE] * units, cuts, statements))
