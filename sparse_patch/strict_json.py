"""JSON files of unknown origin: read as data, and refused where JSON is ambiguous."""

from __future__ import annotations

import codecs
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["decode_text", "parse_json", "read_json"]

MOST_BYTES = 64 << 20
# Longer marks come first: the mark of UTF-32 begins like that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_json(path: str | Path, *, nan: bool = False) -> Any:
    """The value in a JSON file.

    Args:
        nan: allow NaN and Infinity, as Python writes them.

    Raises:
        ValueError: longer than MOST_BYTES, not UTF-8, not JSON, nested too deeply for Python, a key
            twice in one object, half of a surrogate pair, or a number that is not finite. The
            message names the fault, not the file, which callers add.
        OSError: the file cannot be read.
    """
    with open(os.path.expanduser(path), "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"longer than {MOST_BYTES:,} bytes")
    return parse_json(decode_text(content), nan=nan)


def decode_text(content: bytes) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
        ValueError: the content is not UTF-8; says how to convert it.
    """
    for mark, kind in _MARKS.items():
        if content.startswith(mark):
            raise ValueError(f"not UTF-8 but {kind}: convert it with `iconv -f {kind} -t UTF-8`")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 ({error.reason} at byte {error.start}): if it is text, convert it with "
            "`iconv -f ITS_ENCODING -t UTF-8`"
        ) from error


def parse_json(text: str, *, nan: bool = False) -> Any:
    """The value of a JSON text; see `read_json`.

    Raises:
        ValueError: see `read_json`.
    """
    options: dict[str, Any] = {"object_pairs_hook": _unique}
    if not nan:
        options |= {"parse_constant": _finite, "parse_float": _finite}
    try:
        value = json.loads(text, **options)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair is not valid text") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} appears twice")
    return result


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number
