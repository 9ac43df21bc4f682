"""Material of the tasks: words, numbers, UUIDs and windows of a long text.

Words come from the package `wonderwords`, as in RULER, without the few that are not plain
lower-case letters: another release of that package may give other samples.
"""

from __future__ import annotations

import random
import re
import uuid
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from sparse_patch_eval.inputs.text import long_text
from sparse_patch_eval.tasks.problem import Draw, Item

ValueType = Literal["words", "numbers", "uuids"]

DEPTHS = tuple(round(100 * step / 39) / 100 for step in range(40))
"""RULER's 40 positions of a needle: 0 to 100 %, rounded to whole per cent."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""Filler of the passkey task (arXiv:2305.16300), which RULER's noise haystack repeats too."""

LEAST_WORDS = 40
"""Minimum words of prose in a haystack."""

_SENTENCE_END = re.compile(r"[.?!][\"')\]\u2019\u201d]*$")


def distinct(kind: ValueType, rng: random.Random) -> Iterator[str]:
    """Endless random values of a kind, none twice: adjective-noun, seven digits, or UUID 4."""
    seen: set[str] = set()
    while True:
        value = _value(kind, rng)
        if value not in seen:
            seen.add(value)
            yield value


def _value(kind: ValueType, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(vocabulary('adjective'))}-{rng.choice(vocabulary('noun'))}"


def letters(alphabet: str, size: int, rng: random.Random) -> Iterator[str]:
    """Endless random strings of `size` letters, none twice."""
    seen: set[str] = set()
    while True:
        value = "".join(rng.choices(alphabet, k=size))
        if value not in seen:
            seen.add(value)
            yield value


@cache
def vocabulary(*categories: str) -> tuple[str, ...]:
    """All words of some categories ("noun", "adjective", "verb"), sorted.

    Raises:
        ImportError: `wonderwords` is not installed.
    """
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise ImportError(
            'this task needs the words of wonderwords: pip install "sparse-patch[eval]"'
        ) from error
    return tuple(sorted(set(RandomWord().filter(include_categories=categories, regex="[a-z]+"))))


@dataclass(frozen=True)
class Prose:
    """Some words of a text in their order.

    Attributes:
        words: the words; any white space between them counts as one blank.
        starts: indices of the words that begin a sentence, ascending, the first is 0.
    """

    words: tuple[str, ...]
    starts: tuple[int, ...]

    def cut(self, count: int, depth: float) -> int:
        """Index of the word before which a needle goes among the first `count`, as in RULER."""
        sentences = bisect_left(self.starts, count)
        place = int(sentences * depth)
        return self.starts[place] if place < sentences else count


def prose(draw: Draw) -> Prose:
    """A window of a text for one sample, from a random sentence on, never repeated.

    It has `draw.length` words (a word takes a token or more), or is the whole text if that has
    fewer.
    """
    words, starts = _text(draw.haystack)
    last = bisect_right(starts, max(0, len(words) - draw.length))
    begin = draw.random("prose").choice(starts[:last])
    end = begin + draw.length
    inside = starts[bisect_left(starts, begin) : bisect_left(starts, end)]
    return Prose(words[begin:end], tuple(start - begin for start in inside))


@cache
def _text(name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    words = tuple(long_text(name, option="haystack").split())
    ends = (n + 1 for n, word in enumerate(words[:-1]) if _SENTENCE_END.search(word))
    return words, (0, *ends)


def insert(units: Sequence[Item], cuts: Sequence[int], needles: Sequence[Item]) -> list[Item]:
    """`units`, with each needle before the unit of its cut; at equal cuts in the given order."""
    pieces: list[Item] = []
    last = 0
    for cut, needle in sorted(zip(cuts, needles, strict=True), key=lambda pair: pair[0]):
        pieces += [*units[last:cut], needle]
        last = cut
    return [*pieces, *units[last:]]


def listed(items: list[str]) -> str:
    """The items as `one, two, and three`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"
