"""Methods as people write them, `NAME:key=value,...`: on a command line, in an engine's options."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .registry import Method, get_method

_COMMA = re.compile(r"(?<!\\),")
# A comma that is not inside brackets either: `pbs:tau=(0.9,0.8),segment=256`.
_BARE_COMMA = re.compile(_COMMA.pattern + r"(?![^()\[\]]*[)\]])")


def split_list(text: str, comma: re.Pattern[str] = _COMMA) -> list[str]:
    r"""What stands between commas, without blanks around it; `\,` is a comma, and parts none."""
    parts = (part.strip().replace("\\,", ",") for part in comma.split(text))
    return [part for part in parts if part]


def join_list(parts: Iterable[str]) -> str:
    """The inverse of `split_list`."""
    return ",".join(part.replace(",", "\\,") for part in parts)


def spec_of(name: str, params: Mapping[str, Any]) -> str:
    """`NAME:key=value,...`, as `parse_method` reads it."""
    texts = {
        key: value.replace(",", "\\,") if isinstance(value, str) else str(value).replace(" ", "")
        for key, value in params.items()
    }
    pairs = ",".join(f"{key}={text}" for key, text in texts.items())
    return f"{name}:{pairs}" if pairs else name


def parse_method(spec: str) -> Method:
    r"""Read `NAME` or `NAME:key=value,key=value` into a method.

    Values are Python literals (`0.9`, `512`, `None`, `True`, `(0.9,0.8)`); anything else is a
    string, in which `\,` is a comma. `preset=NAME` starts from one of the method's presets.

    Raises:
        ValueError: the form is wrong, or the method or a parameter does not exist.
    """
    name, params = split_method(spec)
    return get_method(name, **params)


def split_method(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and parameters of what `parse_method` takes.

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


def literal(value: str) -> Any:
    """A value of the command line: a Python literal, YAML's `true` or `false`, or else text."""
    if value in ("true", "false"):
        return value == "true"
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
