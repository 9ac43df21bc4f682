"""The tasks that `sparse-patch tasks` lists; needs no package of `wanted`, which makes them."""

from __future__ import annotations

from sparse_patch_eval.tasks import OFFLINE
from sparse_patch_eval.tasks.hub.benchmarks import HUB

PERPLEXITY = "perplexity"
# Texts of plain `perplexity`. Source code has long-range structure.
PERPLEXITY_TEXTS = ("kjv", "stdlib")


def described() -> list[tuple[str, str, str, str]]:
    """Name, origin, whether it takes lengths, and one line, of every known task."""
    ours = [(name, "offline", "yes", entry.summary) for name, entry in OFFLINE.items()]
    texts = ", ".join(PERPLEXITY_TEXTS)
    ours.append(
        (
            PERPLEXITY,
            "offline",
            "yes",
            f"NLL and KL to dense on {texts}; perplexity_TEXT for another text or file",
        )
    )
    hub = [
        (name, "hub", "yes" if entry.lengths else "no", entry.summary)
        for name, entry in HUB.items()
        if name == entry.name
    ]
    return ours + hub
