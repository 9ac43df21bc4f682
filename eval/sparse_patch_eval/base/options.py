"""Parsers of command-line values that several commands take."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from sparse_patch import Method, get_method

__all__ = [
    "choose_layers",
    "parse_layers",
    "parse_length",
    "parse_lengths",
    "parse_method",
    "spec_of",
    "split_list",
    "split_method",
]

_COMMA = re.compile(r"(?<!\\),")
# A comma that is not inside brackets: `pbs:tau=(0.9,0.8),segment=256`.
_BARE_COMMA = re.compile(_COMMA.pattern + r"(?![^()\[\]]*[)\]])")


def split_list(text: str, comma: re.Pattern[str] = _COMMA) -> list[str]:
    r"""The texts between commas, stripped; `\,` is a comma that does not separate."""
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
                f"--method {spec!r}: {part!r} must be key=value, as in flexprefill:gamma=0.9; "
                "write a comma inside a value as \\,"
            )
        params[key.strip()] = literal(value.strip())
    return name.strip(), params


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


def parse_length(text: str) -> int:
    """Read one length, as `parse_lengths` does.

    Raises:
        ValueError: not one positive number of tokens.
    """
    lengths = parse_lengths(text)
    if len(lengths) != 1:
        raise ValueError(f"--length {text!r}: give one length")
    return lengths[0]


def parse_layers(text: str) -> slice | tuple[int, ...]:
    """Read layers: indices (`0,5,-1`) or a slice of all layers as Python writes it (`::3`).

    Raises:
        ValueError: neither.
    """
    try:
        if ":" in text:
            bounds = [int(part) if part.strip() else None for part in text.split(":")]
            if len(bounds) <= 3 and bounds[2:] != [0]:
                return slice(*bounds)
        else:
            return tuple(int(part) for part in text.split(","))
    except ValueError:
        pass  # the one message below serves both forms
    raise ValueError(f"--layers {text!r} must be indices, as in 0,5,-1, or a slice, as in ::3")


def choose_layers(model: PreTrainedModel, layers: slice | tuple[int, ...]) -> list[int]:
    """The model's layer indices for a result of `parse_layers`, ascending.

    Raises:
        ValueError: the model has no such layer.
    """
    known = range(model.config.get_text_config().num_hidden_layers)
    try:
        chosen = known[layers] if isinstance(layers, slice) else {known[n] for n in layers}
    except IndexError as error:
        raise ValueError(f"--layers {layers}: this model has layers 0 to {known[-1]}") from error
    if not chosen:
        raise ValueError(f"--layers {layers} leaves none of {len(known)} layers")
    return sorted(chosen)


def leaves_folder(path: str) -> bool:
    """Does a path, of this or another system, lead out of the folder that it is relative to?"""
    parts = re.split(r"[/\\]", path)
    absolute = parts[0] == "" != path or parts[0].startswith("~") or re.match("[A-Za-z]:", path)
    return bool(absolute) or ".." in parts


def literal(value: str) -> Any:
    """A command-line value: a Python literal, YAML's `true` or `false`, or else text."""
    if value in ("true", "false"):
        return value == "true"
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
