"""Rows in words: a verdict for each family, and the page for users."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sparse_patch_eval.base.markdown import table
from sparse_patch_eval.base.rows import Row

from compat.compare import NOT_BUILT, REFUSED, RIGHT, WRONG

# What is made lies between these, alone on their lines.
BEGIN = "<!-- from here on made by scripts/compatibility.py -->"
END = "<!-- up to here made by scripts/compatibility.py -->"

# Reasons for exact calls, as the library counts them, for one who reads a table.
WORDS = {
    "sliding window": "sliding window",
    "mask": "a mask of its own kind",
    "position bias": "a bias by position",
    "layer kept dense": "kept dense",
    "not called": "not called",
    "not causal": "not causal",
}

# Beginnings of what `patch` says when it refuses, without the name of the class.
_REFUSALS = {
    "does not look its attention up": "attention code of its own, which nothing can take the place "
    "of",
    "found no causal self-attention": "no causal self-attention in its decoder that could be "
    "patched",
    "is an encoder-decoder": "an encoder-decoder",
    "selects keys itself": "selects keys itself",
}


def verdict(row: Row) -> str:
    """A line without the family's name."""
    status = str(row["status"])
    if status == RIGHT:
        return f"{status}, {layers(row)}"
    return f"{status}: {row['reason'] if 'reason' in row else wrong(row)}"


def wrong(row: Row) -> str:
    """What is wrong, comparisons that say the same together."""
    names: dict[str, list[str]] = {}
    for text in row["wrong"]:
        name, _, what = text.partition(": ")
        names.setdefault(what, []).append(name)
    return "; ".join(f"{', '.join(x)}: {what}" for what, x in names.items())


def layers(row: Row) -> str:
    """How many of a family's attention layers ran sparse, and why the others did not."""
    text = f"{row['sparse']} of {row['patched']} attention layers sparse"
    reasons = exact(row["exact"])
    return f"{text} ({reasons})" if reasons else text


def exact(reasons: dict[str, int]) -> str:
    """`2 sliding window, 1 not causal`"""
    return ", ".join(f"{n} {WORDS.get(why, why)}" for why, n in reasons.items())


def summary(rows: Iterable[Row]) -> dict[str, int]:
    """How many families of each kind."""
    rows = list(rows)
    right = [row for row in rows if row["status"] == RIGHT]
    return {
        "right, and sparse": sum(row["sparse"] > 0 for row in right),
        "right, never sparse": sum(row["sparse"] == 0 for row in right),
        **{
            kind: sum(row["status"] == kind for row in rows) for kind in (REFUSED, WRONG, NOT_BUILT)
        },
    }


def page(text: str, results: dict[str, Any]) -> str:
    """The page with what stands between its markers made anew.

    Raises:
        ValueError: a marker is missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"the page needs two lines, {BEGIN!r} and {END!r}")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{markdown(results)}\n{END}{after}"


def markdown(results: dict[str, Any]) -> str:
    """All tables, the largest first.

    Args:
        results: what `results/compatibility.json` holds.
    """
    rows = sorted(results["families"], key=lambda row: row["family"])
    right = [row for row in rows if row["status"] == RIGHT]
    of = {kind: [row for row in rows if row["status"] == kind] for kind in SECTIONS}
    exact_only = {name: cell for name, cell in COLUMNS.items() if name != "sparse"}
    parts = [
        f"Transformers {results['transformers']}, torch {results['torch']}, on a CPU, commit "
        f"{', '.join(results['commits'])}: {len(rows)} families, of which "
        + ", ".join(f"{n} {kind}" for kind, n in summary(rows).items() if n)
        + ".\n",
        _section("Sparse", [row for row in right if row["sparse"]], COLUMNS),
        _section("Right, but never sparse", [x for x in right if not x["sparse"]], exact_only),
        *(_section(title, of[kind], column) for kind, (title, column) in SECTIONS.items()),
    ]
    return "\n".join(part for part in parts if part)


def refusal(reason: str) -> str:
    """What `patch` said, in a few words; all of it where that is not known."""
    for begins, words in _REFUSALS.items():
        if begins in reason:
            return words
    return reason


def _of_all(row: Row) -> str:
    total = row.get("layers")
    more = total is not None and total > row["patched"]
    return f"{row['patched']} of {total} layers" if more else str(row["patched"])


def _wide(row: Row) -> str:
    wide = row.get("wide")
    if not wide:
        return ""
    reasons = exact(wide["exact"])
    return f"{wide['sparse']} sparse" + (f", {reasons}" if reasons else "")


def _own(row: Row) -> str:
    return "; ".join(f"{name}: {text}" for name, text in row["own"].items())


Columns = dict[str, Callable[[Row], str]]
"""What stands in a table, by heading."""

COLUMNS: Columns = {
    "attention layers": _of_all,
    "sparse": lambda row: str(row["sparse"]),
    "exact": lambda row: exact(row["exact"]),
    "with wider windows": _wide,
    "its own": _own,
}
SECTIONS: dict[str, tuple[str, Columns]] = {
    REFUSED: ("Refused", {"why": lambda row: refusal(row["reason"])}),
    WRONG: ("Wrong", {"what": wrong}),
    NOT_BUILT: ("Not checked", {"why no tiny model runs": lambda row: row["reason"]}),
}
"""Title and columns of families that are not right."""


def _section(title: str, rows: list[Row], columns: Columns) -> str:
    """A heading and a table with a line for each family; nothing without rows."""
    if not rows:
        return ""
    cells = ((f"`{row['family']}`", *(_cell(of(row)) for of in columns.values())) for row in rows)
    lines = table(("family", *columns), "l" * (len(columns) + 1), cells)
    return "\n".join([f"## {title}", "", *lines, ""])


def _cell(text: str) -> str:
    """Of one line, with nothing that ends the cell or begins a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
