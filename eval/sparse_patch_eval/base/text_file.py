"""Text files that the user names: read whole, or refused with option, path and fault."""

from __future__ import annotations

import os
from pathlib import Path

from sparse_patch.strict_json import decode_text

MOST_BYTES = 1 << 30


def read_text(path: str | Path, option: str) -> str:
    r"""The text of a UTF-8 file: without a byte-order mark, every line end as `\n`.

    Args:
        option: how the user named the file, for the errors: `--prompt`.

    Raises:
        ValueError: the file is missing, a folder, unreadable, longer than MOST_BYTES, not UTF-8
            text, or blank. Names option and path, and says what to do.
    """
    named = f"{option}: {path}"
    try:
        with open(os.path.expanduser(path), "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(
            f"{named} cannot be read ({error.strerror or error}); give the path of a text file"
        ) from error
    if len(content) > MOST_BYTES:
        raise ValueError(f"{named} is longer than {MOST_BYTES:,} bytes; give a part of it")
    try:
        text = decode_text(content)
    except ValueError as error:
        raise ValueError(f"{named} is {error}") from error
    if "\0" in text:
        raise ValueError(
            f"{named} holds NUL characters, which no text has; if it is UTF-16, convert it with "
            "`iconv -f UTF-16LE -t UTF-8`"
        )
    if not text.strip():
        fault = "holds white space only" if text else "is empty"
        raise ValueError(f"{named} {fault}; give a file with text in it")
    return text.replace("\r\n", "\n").replace("\r", "\n")
