"""Question answering over many documents, in the form of RULER's two tasks (arXiv:2404.06654, 3.4).

RULER takes questions and paragraphs from SQuAD (one paragraph answers) and HotpotQA (two must be
combined). Both need a network, so here they come from `world`: these tasks stand in for RULER's,
and their scores do not compare with published ones. Prompts are RULER's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from sparse_patch_eval.tasks.problem import CANDIDATES, Draw, Growth, Problem, Series
from sparse_patch_eval.tasks.values import insert
from sparse_patch_eval.tasks.world import KINDS, Fact, Mint, Paragraph, paragraph

_PROMPT = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nQuestion: {query}"
)
_LINKS = [(kind, fact) for kind in KINDS.values() for fact in kind.facts if fact.role]


@dataclass(frozen=True)
class Qa:
    """Documents, and a question that some of them answer.

    Attributes:
        hops: documents that must be combined, 1 or 2. With 2 the first names who or what the second
            is about, and documents bear titles, as HotpotQA's do.
        tokens_to_generate: tokens kept free for the answer.
    """

    hops: int
    tokens_to_generate: int = 32

    def grow(self, draw: Draw) -> Growth:
        """Draw the question; other documents are drawn as needed."""
        rng = draw.random("documents")
        mint = Mint(rng)
        fact, needed, query = (_one_hop if self.hops == 1 else _two_hops)(mint, rng)
        answer = dict(needed[-1].facts)[fact]
        spare = [mint.make(fact.value) for _ in range(CANDIDATES - 1)]
        others = Series(self._others(mint, rng))
        # The document with the answer is at the requested depth, the linking one anywhere.
        depths = [draw.depth, draw.random("depths").random()]

        def build(units: int) -> Problem:
            around = others.first(units)
            cuts = [int(units * depth) for depth in depths[: self.hops]]
            documents = insert(around, cuts, needed[::-1])
            context = "\n\n".join(
                f"Document {number}:\n{self._page(page)}"
                for number, page in enumerate(documents, 1)
            )
            return Problem(
                input=_PROMPT.format(context=context, query=query),
                gen_prefix="Answer:",
                outputs=_spellings(fact, answer),
                answer=answer,
                wrong=tuple([*_rivals(fact, answer, needed, around), *spare][: CANDIDATES - 1]),
                depth=draw.depth,
            )

        return Growth(build, least=4, most=draw.length)

    def _others(self, mint: Mint, rng: random.Random) -> Iterator[Paragraph]:
        """Documents without the answer, linked in pairs if the question needs two."""
        while True:
            yield from (_one_hop if self.hops == 1 else _two_hops)(mint, rng)[1]

    def _page(self, page: Paragraph) -> str:
        return page.text if self.hops == 1 else f"{page.name}\n{page.text}"


def _one_hop(mint: Mint, rng: random.Random) -> tuple[Fact, list[Paragraph], str]:
    """A fact to ask for, the document that tells it, and the question."""
    kind = rng.choice(list(KINDS.values()))
    fact = rng.choice(kind.facts)
    needed = paragraph(kind, mint, rng, required=fact)
    return fact, [needed], fact.question.format(name=needed.name)


def _two_hops(mint: Mint, rng: random.Random) -> tuple[Fact, list[Paragraph], str]:
    """A fact whose subject the question names only by its role in a first document."""
    kind, link = rng.choice(_LINKS)
    first = paragraph(kind, mint, rng, required=link)
    middle = KINDS[link.value]
    fact = rng.choice(middle.facts)
    second = paragraph(middle, mint, rng, name=dict(first.facts)[link], required=fact)
    query = fact.question.format(name=link.role.format(name=first.name))
    return fact, [first, second], query


def _rivals(fact: Fact, answer: str, needed: list[Paragraph], around: list[Paragraph]) -> list[str]:
    """Values of the answer's kind in the documents, nearest to the question first."""
    near = [v for page in needed for f, v in page.facts if f.value == fact.value and v != answer]
    facts = [pair for page in around for pair in page.facts]
    same = [value for other, value in facts if other == fact]
    alike = [value for other, value in facts if other.value == fact.value and other != fact]
    names = [page.name for page in around if page.kind == fact.value]
    return list(dict.fromkeys(near + same + alike + names))  # linked documents share a name


def _spellings(fact: Fact, answer: str) -> tuple[str, ...]:
    """The answer as in the document, and its other accepted spelling."""
    if fact.value == "count":
        return answer, answer.replace(",", "")
    if fact.value == "date":
        day, month, year = answer.split()
        return answer, f"{month} {day}, {year}"
    return (answer,)
