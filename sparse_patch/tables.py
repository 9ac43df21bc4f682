"""Tables with one entry per layer, read from a JSON file when a method is built."""

from __future__ import annotations

from typing import Any

from .strict_json import read_json


def read_layers(owner: str, path: str) -> list[Any]:
    """The list in a JSON file.

    Args:
        owner: `Method: parameter`, for the errors.

    Raises:
        ValueError: the file cannot be read or holds no list; the message names file and fault.
    """
    try:
        layers = read_json(path)
    except OSError as error:
        raise ValueError(
            f"{owner}: cannot read {path!r} ({error.strerror}); give the path of a JSON file"
        ) from error
    except ValueError as error:
        raise ValueError(f"{owner}: {path!r} is not JSON: {error}") from error
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"{owner}: {path!r} must hold a JSON list with one entry per layer")
    return layers


def entry_of(layers: list[Any], layer: int, owner: str, path: str) -> Any:
    """The entry of one layer.

    Raises:
        ValueError: the table has no such layer.
    """
    if not 0 <= layer < len(layers):
        raise ValueError(
            f"{owner}: {path!r} has layers 0 to {len(layers) - 1}, but the model has a layer "
            f"{layer}; give a table made for this model, or keep that layer exact (dense_layers=)"
        )
    return layers[layer]
