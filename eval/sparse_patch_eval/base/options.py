"""Command-line values that several commands take, read in one way."""

from __future__ import annotations

import re

from transformers import PreTrainedModel


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
    """The indices that `parse_layers` means for a model, ascending.

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
    """Does a path, of this system or of another, lead out of the folder that it is read in?"""
    parts = re.split(r"[/\\]", path)
    absolute = parts[0] == "" != path or parts[0].startswith("~") or re.match("[A-Za-z]:", path)
    return bool(absolute) or ".." in parts
