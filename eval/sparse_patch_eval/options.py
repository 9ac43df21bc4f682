"""Command-line values that several commands take, read in one way."""

from __future__ import annotations

import ast
import re
from typing import Any

from sparse_patch import Method, get_method

# A comma that is not inside brackets: `pbs:tau=(0.9,0.8),segment=256`.
_COMMA = re.compile(r",(?![^()\[\]]*[)\]])")


def parse_method(spec: str) -> Method:
    """Read `NAME` or `NAME:key=value,key=value` into a method.

    Values are Python literals (`0.9`, `512`, `None`, `True`, `(0.9,0.8)`); anything else is a
    string. `preset=NAME` starts from one of the method's presets.

    Raises:
        ValueError: the form is wrong, or the method or a parameter does not exist.
    """
    name, _, rest = spec.partition(":")
    params: dict[str, Any] = {}
    for part in filter(None, (item.strip() for item in _COMMA.split(rest))):
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise ValueError(
                f"--method {spec!r}: {part!r} must be key=value, as in flexprefill:gamma=0.9"
            )
        params[key.strip()] = _literal(value.strip())
    return get_method(name.strip(), **params)


def parse_lengths(text: str) -> list[int]:
    """Read `2048,4096` or `2k,4k` into token counts, ascending.

    Raises:
        ValueError: an entry is not a positive number of tokens.
    """
    lengths = set()
    for part in text.split(","):
        word = part.strip().lower()
        factor = 1024 if word.endswith("k") else 1
        digits = word.removesuffix("k")
        if not digits.isdecimal() or int(digits) == 0:
            raise ValueError(f"--lengths {text!r}: {part!r} is not a number of tokens (2048 or 2k)")
        lengths.add(int(digits) * factor)
    return sorted(lengths)


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
