"""JSON files of unknown origin: read as data, and refused where JSON leaves room for doubt."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20


def read_json(path: str | Path, *, nan: bool = False) -> Any:
    """The value that a file holds.

    Args:
        nan: take NaN and Infinity, as Python writes them, for numbers.

    Raises:
        ValueError: longer than MOST_BYTES, not UTF-8, not JSON, nested too deeply for Python, a key
            twice in one object, half of a surrogate pair, or a number that is not finite. Names
            what, not the file: callers know better what it should have been.
        OSError: it cannot be read.
    """
    with Path(path).expanduser().open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"longer than {MOST_BYTES:,} bytes")
    return parse_json(content.decode("utf-8"), nan=nan)


def parse_json(text: str, *, nan: bool = False) -> Any:
    """The value of a JSON text; see `read_json`.

    Raises:
        ValueError: see `read_json`.
    """
    options: dict[str, Any] = {"object_pairs_hook": _unique}
    if not nan:
        options |= {"parse_constant": _finite, "parse_float": _finite}
    try:
        found = json.loads(text, **options)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair is no text") from error
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number
