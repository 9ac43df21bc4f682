"""Parts of a text that share nothing, each enough for one prompt."""

from __future__ import annotations

import random

__all__ = ["no_room", "parts"]

# Characters set aside for a token: prose and code have about 4, so a part never comes out short.
_CHARACTERS = 6


def parts(text: str, length: int, seed: int = 0, *, held_back: bool = False) -> list[str]:
    """Disjoint parts of a text, each enough for a prompt of `length` tokens, in random order.

    The order depends on `seed` only, so that the first prompts stay the same when more are taken.
    A quarter of the parts is held back, for tuning: never given without `held_back`.
    """
    size = _CHARACTERS * length
    found = [text[n : n + size] for n in range(0, len(text) - size + 1, size)]
    random.Random(f"parts-{seed}").shuffle(found)
    kept = len(found) - len(found) // 4
    return found[kept:] if held_back else found[:kept]


def no_room(
    what: str, text: str, length: int, found: int, fewer: str, *, held_back: bool = False
) -> ValueError:
    """The error where a text has fewer `parts` than are wanted.

    Args:
        what: which text, for the message.
        length: tokens of a prompt.
        found: how many parts there are.
        fewer: how to ask for no more than there is: `--limit 3 or less`.
        held_back: see `parts`.
    """
    if found:
        return ValueError(
            f"{what} has room for {found} prompts of {length} tokens that share nothing: give a "
            f"longer text, a smaller length, or {fewer}"
        )
    least = _CHARACTERS * length * (4 if held_back else 1)
    return ValueError(
        f"{what} is too short for a prompt of {length} tokens: it has {len(text):,} characters of "
        f"the {least:,} that are set aside; give a longer text or a smaller length"
    )
