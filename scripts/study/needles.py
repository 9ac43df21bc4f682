"""Prompts that are read twice: how prose goes on, and which of several hidden numbers is asked for.

RULER's needles (arXiv:2404.06654) with one key or several, in the copy wording of `passkey_prompt`.
Question and the beginning of the answer are part of the prompt, so of the sparse prefill: with a
dense question most damage does not show. The last `scored` tokens of prose, just before the
question, hold no needle: there the next-token distribution of ordinary text is read off.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sparse_patch_eval.inputs.parts import no_room, parts
from sparse_patch_eval.inputs.text import QUESTION, STATEMENT, WORDS, bos, encode, window
from sparse_patch_eval.tasks.problem import CANDIDATES
from transformers import PreTrainedTokenizerBase

KEYS = (1, CANDIDATES)
"""Needles in a prompt: prompts take these by turns."""

# Steps of the golden ratio fill [0, 1) evenly, however many there are.
_GOLDEN = 0.618033988749895


@dataclass(frozen=True)
class NeedlePrompt:
    """A prompt and what to read off it.

    Attributes:
        input_ids: LongTensor [1, length].
        answer: the number asked for.
        others: seven other numbers; the values of the prompt's other keys first.
        keys: needles in the prompt.
        scored: positions whose next token is one of the last tokens of prose.
        text: name of the text the prose is from.
    """

    input_ids: torch.LongTensor
    answer: str
    others: tuple[str, ...]
    keys: int
    scored: slice
    text: str


def needle_prompt(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    text: str,
    keys: int,
    scored: int,
    depth: float = 0.5,
    seed: int = 0,
    name: str = "",
) -> NeedlePrompt:
    """Hide `keys` numbers in prose and ask for one of them.

    Args:
        tokenizer: of the model to be asked; its BOS token leads if it uses one.
        length: tokens of the whole prompt.
        text: where the prose comes from: one random window, never repeated.
        keys: needles, 1 to 8, with different words and numbers; all but the one that is asked for
            stand anywhere.
        scored: last tokens of prose, without a needle.
        depth: where the needle that is asked for stands in the prose before those, 0 to 1.
        seed: chooses words, numbers and window.
        name: name of the text.

    Raises:
        ValueError: `length` too short, `keys` or `depth` out of range, or `text` too short.
    """
    if not 1 <= keys <= CANDIDATES or not 0.0 <= depth <= 1.0:
        raise ValueError(f"keys={keys} must be 1 to {CANDIDATES} and depth={depth} 0 to 1")
    rng = random.Random(f"needles-{seed}")
    numbers = [str(n) for n in rng.sample(range(10**6, 10**7), CANDIDATES)]
    words = rng.sample(WORDS, keys)
    statements = [STATEMENT.format(word=word) for word in words]
    needles = [
        encode(tokenizer, f"\n{statement} {number}.\n")
        for statement, number in zip(statements, numbers, strict=False)
    ]
    start = bos(tokenizer)
    question = encode(tokenizer, QUESTION.format(word=words[0]) + statements[0])
    room = length - len(start) - sum(map(len, needles)) - len(question)
    if room <= scored:
        least = length - room + scored + 1
        raise ValueError(
            f"length {length} is too short: {keys} needles, question and {scored} tokens of prose "
            f"after them need {least} or more"
        )
    before = room - scored
    prose = window(tokenizer, text, room, rng)
    cuts = [round(depth * before), *(rng.randint(0, before) for _ in needles[1:])]
    ids = list(start)
    last = 0
    for cut, needle in sorted(zip(cuts, needles, strict=True)):
        ids += prose[last:cut] + needle
        last = cut
    ids += prose[last:]
    end = len(ids) - 1
    return NeedlePrompt(
        input_ids=torch.LongTensor([ids + question]),
        answer=numbers[0],
        others=tuple(numbers[1:]),
        keys=keys,
        scored=slice(end - scored, end),
        text=name,
    )


def needle_prompts(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    *,
    texts: Mapping[str, str],
    scored: int,
    seed: int = 0,
    held_back: bool = False,
) -> list[NeedlePrompt]:
    """`count` prompts: texts by turns, one needle and eight by turns, each on prose of its own.

    Args:
        held_back: take prose and numbers that prompts without this never take: for tuning.

    Raises:
        ValueError: a text has no room for so many prompts that share nothing.
    """
    available = {
        name: parts(text, length, seed, held_back=held_back) for name, text in texts.items()
    }
    names = list(texts)
    prompts = []
    for index in range(count):
        name = names[index % len(names)]
        turn = index // len(names)
        if turn >= len(available[name]):
            raise no_room(
                f"the text {name!r}", texts[name], length, len(available[name]),
                f"{index} prompts or fewer", held_back=held_back,
            )  # fmt: skip
        prompts.append(
            needle_prompt(
                tokenizer,
                length,
                text=available[name][turn],
                keys=KEYS[turn % len(KEYS)],
                scored=scored,
                depth=(0.5 + index * _GOLDEN) % 1,
                # Even to measure, odd to tune.
                seed=2 * (1_000_000 * seed + index) + held_back,
                name=name,
            )
        )
    return prompts
