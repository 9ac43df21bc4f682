r"""A method with its parameters as text: `NAME`, or `NAME:key=value,key=value`.

Values are Python literals (`0.9`, `512`, `None`, `True`, `(0.9,0.8)`), or YAML's `true` and
`false`; anything else is a string, in which `\,` is a comma. `preset=NAME` is one of the method's
presets.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["join_list", "literal", "spec_of", "split_list", "split_method"]

_COMMA = re.compile(r"(?<!\\),")
# A comma that is not inside brackets: `pbs:tau=(0.9,0.8),segment=256`.
_BARE_COMMA = re.compile(_COMMA.pattern + r"(?![^()\[\]]*[)\]])")


def split_method(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and parameters, the preset among them; whether there are such is not checked.

    Raises:
        ValueError: the form is wrong.
    """
    name, _, rest = spec.partition(":")
    params: dict[str, Any] = {}
    for part in split_list(rest, _BARE_COMMA):
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise ValueError(
                f"method {spec!r}: {part!r} must be key=value, as in flexprefill:gamma=0.9; "
                "write a comma inside a value as \\,"
            )
        params[key.strip()] = literal(value.strip())
    return name.strip(), params


def spec_of(name: str, params: Mapping[str, Any]) -> str:
    """The inverse of `split_method`."""
    texts = {
        key: value.replace(",", "\\,") if isinstance(value, str) else str(value).replace(" ", "")
        for key, value in params.items()
    }
    pairs = ",".join(f"{key}={text}" for key, text in texts.items())
    return f"{name}:{pairs}" if pairs else name


def split_list(text: str, comma: re.Pattern[str] = _COMMA) -> list[str]:
    r"""The texts between commas, stripped; `\,` is a comma that does not separate."""
    parts = (part.strip().replace("\\,", ",") for part in comma.split(text))
    return [part for part in parts if part]


def join_list(parts: Iterable[str]) -> str:
    """The inverse of `split_list`."""
    return ",".join(part.replace(",", "\\,") for part in parts)


def literal(value: str) -> Any:
    """The value of a text: a Python literal, YAML's `true` or `false`, or else the text."""
    if value in ("true", "false"):
        return value == "true"
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
