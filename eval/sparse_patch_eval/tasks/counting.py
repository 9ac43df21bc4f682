"""RULER's aggregation tasks (arXiv:2404.06654, section 3.3): common and frequent words.

Common words: a numbered list in which ten words come more often than all others. Frequent words: a
text of made-up words whose frequencies follow a zeta distribution, of which the second to fourth
most frequent are asked for (the first is written as dots).
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from sparse_patch_eval.tasks.problem import Draw, Growth, Problem, Series, one_replaced
from sparse_patch_eval.tasks.values import distinct, letters, vocabulary

_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
_COMMON_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_FREQUENT_PREFIX = (
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
_DOTS = "..."


@dataclass(frozen=True)
class Frequencies:
    """Occurrences of common and of other words, and (for the example) the number of words."""

    freq_cw: int
    freq_ucw: int
    num_words: int = 0


@dataclass(frozen=True)
class CommonWords:
    """RULER's parameters, by its names.

    Attributes:
        num_cw: common words.
        freq_cw: occurrences of each common word.
        freq_ucw: occurrences of every other word.
        example: frequencies of the solved example before the list.
        short_below: prompts below this length use the next two instead.
        short: frequencies of a short prompt.
        short_example: of its example.
        tokens_to_generate: tokens kept free for the answer.
    """

    num_cw: int = 10
    freq_cw: int = 30
    freq_ucw: int = 3
    example: Frequencies = Frequencies(freq_cw=10, freq_ucw=3, num_words=40)
    short_below: int = 4096
    short: Frequencies = Frequencies(freq_cw=6, freq_ucw=1)
    short_example: Frequencies = Frequencies(freq_cw=3, freq_ucw=1, num_words=20)
    tokens_to_generate: int = 120

    def grow(self, draw: Draw) -> Growth:
        """Draw the words of the example and of the list; units are words of the list."""
        is_short = draw.length < self.short_below
        often = self.short if is_short else Frequencies(self.freq_cw, self.freq_ucw)
        shown = self.short_example if is_short else self.example
        words = Series(endless_words(draw.random("words")))
        common = words.first(self.num_cw)
        others = words.first(2 * self.num_cw)[self.num_cw :]
        wrong = one_replaced(common, others, draw.random("wrong"))
        example = self._example(draw, shown)

        def build(units: int) -> Problem:
            entries = _entries(words.first(units), self.num_cw, often, draw.random("order"))
            return Problem(
                input=f"{example}\n{_COMMON.format(context=_numbered(entries))}",
                gen_prefix=_COMMON_PREFIX,
                outputs=tuple(common),
                answer=_numbered(common),
                wrong=tuple(map(_numbered, wrong)),
                depth=None,
            )

        return Growth(build, least=2 * self.num_cw, most=draw.length)

    def _example(self, draw: Draw, often: Frequencies) -> str:
        words = Series(endless_words(draw.random("example words"))).first(often.num_words)
        entries = _entries(words, self.num_cw, often, draw.random("example order"))
        question = _COMMON.format(context=_numbered(entries))
        return f"{question} {_COMMON_PREFIX} {_numbered(words[: self.num_cw])}"


def endless_words(rng: random.Random) -> Iterator[str]:
    """All words of the vocabulary in random order, then pairs of words (past 100k tokens)."""
    words = vocabulary("noun", "adjective", "verb")
    yield from chain(rng.sample(words, len(words)), distinct("words", rng))


def _entries(words: list[str], num_cw: int, often: Frequencies, rng: random.Random) -> list[str]:
    entries = words[:num_cw] * often.freq_cw + words[num_cw:] * often.freq_ucw
    rng.shuffle(entries)
    return entries


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


@dataclass(frozen=True)
class FrequentWords:
    """RULER's parameters, by its names.

    Attributes:
        alpha: the k-th most frequent word comes in proportion to k ** -alpha.
        coded_wordlen: letters of a word.
        tokens_per_word: tokens of the length per word of the vocabulary.
        tokens_to_generate: tokens kept free for the answer.
    """

    alpha: float = 2.0
    coded_wordlen: int = 6
    tokens_per_word: int = 50
    tokens_to_generate: int = 50

    def grow(self, draw: Draw) -> Growth:
        """Draw the vocabulary; units are the words of the text before rounding."""
        size = max(draw.length // self.tokens_per_word, _LEAST_VOCABULARY)
        coded = letters(string.ascii_lowercase, self.coded_wordlen, draw.random("words"))
        words = [_DOTS, *Series(coded).first(size - 1)]
        top, next_best = words[1:4], words[4:7]
        wrong = one_replaced(top, next_best, draw.random("wrong"))

        def build(units: int) -> Problem:
            counts = zeta_counts(units, size, self.alpha)
            text = list(chain.from_iterable(map(repeat, words, counts)))
            draw.random("order").shuffle(text)
            return Problem(
                input=_FREQUENT.format(context=" ".join(text)),
                gen_prefix=_FREQUENT_PREFIX,
                outputs=tuple(top),
                answer=", ".join(top),
                wrong=tuple(", ".join(answer) for answer in wrong),
                depth=None,
            )

        return Growth(build, least=_LEAST_CODED, most=2 * draw.length)


# The seventh word must occur, and the fourth less often than the third: wrong answers use words
# that occur.
_LEAST_CODED = 100
_LEAST_VOCABULARY = 10


def zeta_counts(number: int, size: int, alpha: float) -> list[int]:
    """Occurrences of each of `size` words: number * k**-alpha / zeta(alpha), rounded down."""
    from scipy.special import zeta

    return [int(number * rank**-alpha / zeta(alpha)) for rank in range(1, size + 1)]
