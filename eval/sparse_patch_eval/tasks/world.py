"""Paragraphs about invented people, towns, novels, ships, bridges and firms.

They stand in for the paragraphs of SQuAD and HotpotQA, which need a network. A `Mint` never gives a
name, date or number twice, so no two paragraphs share an answer. Paragraphs differ in kind, in
their facts, and in the order and wording of these. Words and wordings are in `world.json`.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DATA = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
_WORDS: dict[str, list[str]] = {name: words.split() for name, words in _DATA["words"].items()}


class Mint:
    """Names, dates and numbers, none twice.

    Args:
        rng: random generator for all of them.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._seen = rng, set[str]()

    def make(self, kind: str) -> str:
        """A new value: a "person", "town", "title", "ship", "bridge", "firm", "date" or "count"."""
        while True:
            value: str = getattr(self, f"_{kind}")()
            if value not in self._seen:
                self._seen.add(value)
                return value

    def _pick(self, words: str) -> str:
        return self._rng.choice(_WORDS[words])

    def _stem(self) -> str:
        onset = self._pick("onsets")
        return onset + "".join(self._rng.choices(_WORDS["middles"], k=self._rng.choice((1, 2, 2))))

    def _surname(self) -> str:
        return self._stem() + self._pick("surnames")

    def _person(self) -> str:
        return f"{self._pick('first_names')} {self.make('surname')}"

    def _town(self) -> str:
        return self._stem() + self._pick("towns")

    def _title(self) -> str:
        adjective, noun = self._pick("adjectives"), self._pick("nouns")
        forms = (
            f"The {adjective} {noun} of {self.make('town')}",
            f"A {noun} for {self.make('person')}",
            f"The {noun} and the {adjective} {self._pick('nouns')}",
            f"{self.make('person')} and the {adjective} {noun}",
        )
        return self._rng.choice(forms)

    def _ship(self) -> str:
        return " ".join(map(self._pick, ("adjectives", "nouns", "numerals")))

    def _bridge(self) -> str:
        return f"{self.make('town')} {self._rng.choice(('Bridge', 'Viaduct'))}"

    def _firm(self) -> str:
        return f"{self.make('surname')} {self._pick('trades')}"

    def _date(self) -> str:
        day, month = self._rng.randint(1, 28), self._pick("months")
        return f"{day} {month} {self._rng.randint(1702, 1968)}"

    def _count(self) -> str:
        return f"{self._rng.randrange(1_000, 100_000):,}"


@dataclass(frozen=True)
class Fact:
    """Something that paragraphs of a kind may state.

    Attributes:
        value: kind of the value (see `Mint.make`).
        question: asks for the value, with {name}.
        wordings: sentences with {it} or {It}, and {value}.
        role: phrase for the value by its relation to {name}, if it can have a paragraph of its own.
    """

    value: str
    question: str
    wordings: tuple[str, ...]
    role: str = ""


@dataclass(frozen=True)
class Kind:
    """Material of paragraphs about one kind of thing.

    Attributes:
        name: kind of the name (see `Mint.make`).
        openings: first sentences, with {name} and {noun}.
        nouns: nouns for the thing.
        facts: that a paragraph may state.
        asides: sentences without any such fact.
    """

    name: str
    openings: tuple[str, ...]
    nouns: tuple[str, ...]
    facts: tuple[Fact, ...]
    asides: tuple[str, ...]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph, the name and kind of its subject, and its facts with values."""

    name: str
    kind: str
    facts: tuple[tuple[Fact, str], ...]
    text: str


def _kind(data: dict[str, Any]) -> Kind:
    lists = {name: tuple(data[name]) for name in ("openings", "nouns", "asides")}
    facts = (Fact(**{**fact, "wordings": tuple(fact["wordings"])}) for fact in data["facts"])
    return Kind(name=data["name"], facts=tuple(facts), **lists)


KINDS = {data["name"]: _kind(data) for data in _DATA["kinds"]}
"""All kinds of paragraphs by the kind of their subject's name."""

# Number of facts in a paragraph, besides an aside.
_FACTS = 4


def paragraph(
    kind: Kind,
    mint: Mint,
    rng: random.Random,
    *,
    name: str | None = None,
    required: Fact | None = None,
) -> Paragraph:
    """Write a paragraph.

    Args:
        kind: what it is about.
        mint: gives the values, and the name if there is none.
        rng: chooses facts, order and wording.
        name: its subject.
        required: a fact of `kind` that it must state.
    """
    subject = name or mint.make(kind.name)
    noun = rng.choice(kind.nouns)
    facts = rng.sample(
        [fact for fact in kind.facts if fact != required], _FACTS - (required is not None)
    )
    if required is not None:
        facts.insert(rng.randint(0, len(facts)), required)
    values = tuple((fact, mint.make(fact.value)) for fact in facts)
    sentences = [_worded(fact, value, subject, kind, noun, rng) for fact, value in values]
    sentences.insert(rng.randint(0, len(sentences)), rng.choice(kind.asides))
    opening = rng.choice(kind.openings).format(name=subject, noun=noun)
    return Paragraph(subject, kind.name, values, " ".join([opening, *sentences]))


def _worded(fact: Fact, value: str, subject: str, kind: Kind, noun: str, rng: random.Random) -> str:
    """A sentence that calls the subject by its name, or by its noun."""
    short = f"the {noun.split(' in ')[0].split(' of ')[0]}"
    quoted = f'"{subject}"' if kind.name == "title" else subject
    it = rng.choice((short, short, quoted))
    return rng.choice(fact.wordings).format(it=it, It=it[0].upper() + it[1:], value=value)
