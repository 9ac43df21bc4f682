"""What a tuning found, as text: on the prompts that it was made on, and on held-out ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparse_patch import Profile
from sparse_patch.profiles import Share
from sparse_patch_eval.base.markdown import table
from sparse_patch_eval.tuning.choice import Measured

# Heads that a report names.
_WORST = 5


@dataclass(frozen=True)
class Held:
    """A choice on prompts: what it was made on, or others.

    Attributes:
        density, recall: means over layers and heads.
        kl: KL(dense || sparse) of the next token, nats, mean over positions and prompts.
        singles: density at which one setting of a method for all heads has the same recall; None
            where none has.
    """

    density: float
    recall: float
    kl: float
    singles: dict[str, float | None]


def held_of(measured: Measured, choice: Tensor, kl: float) -> Held:
    density, recall = measured.of(choice)
    names = dict.fromkeys(one.name for one in measured.candidates)
    return Held(density, recall, kl, {name: measured.single(name, recall) for name in names})


def profile_report(target: str, held: dict[str, Held], found: Profile) -> str:
    shares = (
        (name, *(f"{value:.4f}" for value in (one.density, one.recall, one.kl)))
        for name, one in held.items()
    )
    lines = [f"# Profile for {target}", ""]
    lines += table(("prompts", "density", "recall", "KL, nats"), "lrrr", shares)
    lines += ["", "One setting of one method for all heads, at the same recall:", ""]
    singles = (
        (name, *(_reached(one.singles[name]) for one in held.values()))
        for name in held["tuned on"].singles
    )
    head = ("method", *(f"density, {name}" for name in held))
    lines += table(head, "l" + "r" * len(held), singles)
    layers = ((layer, _methods(shares)) for layer, shares in sorted(found.layers.items()))
    lines += ["", *table(("layer", "methods (heads)"), "rl", layers)]
    gap = held["held out"].recall - held["tuned on"].recall
    lines += ["", f"Held out, recall differs by {gap:+.4f} from what was tuned on."]
    return "\n".join(lines) + "\n"


def _reached(density: float | None) -> str:
    return "not reached" if density is None else f"{density:.4f}"


def _methods(shares: Sequence[Share]) -> str:
    """Methods of a layer, with how many heads run each."""
    heads: Counter[str] = Counter()
    for share in shares:
        heads[share.name] += len(share.heads)
    return ", ".join(f"{name} ({count})" for name, count in heads.items())


def failures(
    kind: str, aim: float, held_out: Held, tuning: Measured, unseen: Measured, choice: Tensor
) -> str:
    """What the target is worth on unseen prompts, and the heads that fell furthest there."""
    if kind == "speedup":
        lines = ["", "Speed was timed on the first prompt that was tuned on, and on no other."]
    else:
        got = held_out.recall if kind == "recall" else held_out.kl
        short = (aim - got if kind == "recall" else got - aim) / aim
        what = "met" if short <= 0 else f"missed by {short:.2%} of it"
        lines = ["", f"Held out, the target is {what}: {kind} {got:.4f}, wanted {aim:g}."]
    before, after = tuning.heads(choice)[1], unseen.heads(choice)[1]
    fall = before - after
    lines += ["", "Heads whose recall fell most where held out:", ""]
    rows = []
    for place in fall.flatten().argsort(descending=True)[:_WORST].tolist():
        layer, head = divmod(place, fall.shape[1])
        one = tuning.candidates[int(choice[layer, head])]
        recalls = (f"{x[layer, head]:.4f}" for x in (before, after))
        rows.append((tuning.layers[layer], head, one.name, *recalls))
    lines += table(("layer", "head", "method", "tuned on", "held out"), "rrlrr", rows)
    return "\n".join(lines) + "\n"
