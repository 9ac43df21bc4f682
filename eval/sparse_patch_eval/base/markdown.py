"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["table"]

_RULES = {"l": "---", "r": "---:"}


def table(head: Sequence[str], align: str, rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a table; cells are not escaped.

    Args:
        align: one letter per column: `l` for words, `r` for numbers.
    """
    rules = [_RULES[letter] for letter in align]
    return [f"| {' | '.join(map(str, cells))} |" for cells in (head, rules, *rows)]
