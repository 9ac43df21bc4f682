"""The basis of the offline tasks: samples that grow until they fill a prompt of a given length.

A task draws the fixed part of a sample first (needles, keys, a question) and then builds the prompt
with any number of haystack units: words of prose, lines, list entries, paragraphs. `fit` finds the
number that fills the length. All random generators are seeded with text, so a sample is the same in
every process, and does not depend on the number of samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, Protocol, TypeVar

__all__ = ["CANDIDATES"]

CANDIDATES = 8
"""Answers that the likelihood score chooses from: the right one and seven others."""

# Steps guessed from the slope before the search bisects: a prompt's length is nearly linear in its
# units, so four are usually enough.
_GUESSES = 8

Item = TypeVar("Item")


@dataclass(frozen=True)
class Problem:
    """A prompt, the strings that an answer must contain, and the answers to score.

    Attributes:
        input: the prompt up to the answer prefix.
        gen_prefix: how the answer begins; the last part of the prompt.
        outputs: gold strings.
        answer: the whole right answer, as it would follow `gen_prefix` and a blank.
        wrong: seven whole answers that are not right.
        depth: position of the requested needle (the first, if several), 0 to 1; None where an
            answer is spread over the whole prompt.
    """

    input: str
    gen_prefix: str
    outputs: tuple[str, ...]
    answer: str
    wrong: tuple[str, ...]
    depth: float | None

    @property
    def context(self) -> str:
        """The whole prompt, joined as lm-eval joins it."""
        blank = "" if self.input[-1].isspace() else " "
        return f"{self.input}{blank}{self.gen_prefix}"


@dataclass(frozen=True)
class Draw:
    """The source of one sample.

    Attributes:
        key: names the sample: task, seed, length and index.
        length: tokens that prompt and answer may take.
        depth: position of the requested needle, 0 to 1.
        haystack: name of the text that prose comes from (`text.long_text`).
    """

    key: str
    length: int
    depth: float
    haystack: str

    def random(self, purpose: str) -> random.Random:
        """A generator for one purpose, the same on every call."""
        return random.Random(f"{self.key}-{purpose}")


@dataclass(frozen=True)
class Growth:
    """A sample that can be built with `least` to `most` haystack units."""

    build: Callable[[int], Problem]
    least: int
    most: int


class Generator(Protocol):
    """A task's definition: its parameters are the fields of the class."""

    @property
    def tokens_to_generate(self) -> int:
        """Tokens that are kept free for the answer."""
        ...

    def grow(self, draw: Draw) -> Growth:
        """Draw the fixed part of a sample."""
        ...


class TooShort(ValueError):
    """The smallest prompt is longer than the limit.

    Attributes:
        needed: tokens of the smallest prompt.
    """

    def __init__(self, needed: int) -> None:
        super().__init__(f"the smallest prompt has {needed} tokens")
        self.needed = needed


class Series(Generic[Item]):
    """Items of an endless iterator, drawn when first needed and kept."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items, self._drawn = items, list[Item]()

    def first(self, count: int) -> list[Item]:
        """The first `count` items."""
        self._drawn += islice(self._items, max(0, count - len(self._drawn)))
        return self._drawn[:count]


def fit(
    growth: Growth, count: Callable[[Problem], int], limit: int, slack: int
) -> tuple[Problem, int]:
    """The sample with the most units within `limit` tokens, and its number of units.

    Units are guessed from the slope so far, then by bisection. The search ends within `slack`
    tokens of the limit, because every try tokenises a whole prompt.

    Raises:
        TooShort: `limit` is too small for the smallest prompt.
    """
    units, beyond = growth.least, growth.most + 1
    best = growth.build(units)
    used = least = count(best)
    if used > limit:
        raise TooShort(used)
    guess, tries = units + 16, 0
    while beyond - units > 1 and limit - used > slack:
        guess = min(max(guess, units + 1), beyond - 1)
        sample = growth.build(guess)
        tokens = count(sample)
        slope = max((tokens - least) / (guess - growth.least), 0.01)
        if tokens <= limit:
            best, used, units = sample, tokens, guess
        else:
            beyond = guess
        tries += 1
        guess = (units + beyond) // 2
        if tries < _GUESSES:
            guess = units + int((limit - used) / slope)
    return best, units


def one_replaced(values: list[str], stand_ins: list[str], rng: random.Random) -> list[list[str]]:
    """Seven different copies of `values` with one value replaced by one of `stand_ins`."""
    swaps = [
        (place, other)
        for place in range(len(values))
        for other in stand_ins
        if other != values[place]
    ]
    return [
        [*values[:place], other, *values[place + 1 :]]
        for place, other in rng.sample(swaps, CANDIDATES - 1)
    ]
