"""Disjoint parts of a text, each long enough for one prompt."""

from __future__ import annotations

import random

__all__ = ["no_room", "parts"]

# Characters reserved per token: prose and code have about 4, so a part is always long enough.
_CHARACTERS = 6


def parts(text: str, length: int, seed: int = 0, *, held_back: bool = False) -> list[str]:
    """Disjoint parts of a text, each long enough for a prompt of `length` tokens, in random order.

    The order depends on `seed` only, so the first prompts stay the same when more are taken. A
    quarter of the parts is reserved for tuning, and returned only with `held_back`.
    """
    size = _CHARACTERS * length
    pieces = [text[n : n + size] for n in range(0, len(text) - size + 1, size)]
    random.Random(f"parts-{seed}").shuffle(pieces)
    kept = len(pieces) - len(pieces) // 4
    return pieces[kept:] if held_back else pieces[:kept]


def no_room(
    name: str, text: str, length: int, count: int, fewer: str, *, held_back: bool = False
) -> ValueError:
    """The error for a text with fewer `parts` than needed.

    Args:
        name: the text, for the message.
        length: tokens per prompt.
        count: number of parts in the text.
        fewer: how to ask for no more than that: `--limit 3 or less`.
        held_back: see `parts`.
    """
    if count:
        return ValueError(
            f"{name} has room for {count} disjoint prompts of {length} tokens: give a "
            f"longer text, a smaller length, or {fewer}"
        )
    least = _CHARACTERS * length * (4 if held_back else 1)
    return ValueError(
        f"{name} is too short for a prompt of {length} tokens: it has {len(text):,} characters, "
        f"and {least:,} are needed; give a longer text or a smaller length"
    )
