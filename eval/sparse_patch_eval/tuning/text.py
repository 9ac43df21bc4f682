"""The report of a tuning, on its own prompts and on held-out ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparse_patch import Profile
from sparse_patch.profiles import Share
from sparse_patch_eval.base.markdown import table
from sparse_patch_eval.tuning.choice import Measured

# Number of heads that a report names.
_WORST = 5


@dataclass(frozen=True)
class Held:
    """Measurements of a choice on tuning or held-out prompts.

    Attributes:
        density, recall: means over layers and heads.
        kl: KL(dense || sparse) of the next token, nats, mean over positions and prompts.
        singles: density at which one setting of a method for all heads has the same recall; None
            where no setting has.
    """

    density: float
    recall: float
    kl: float
    singles: dict[str, float | None]


def held_of(measured: Measured, choice: Tensor, kl: float) -> Held:
    density, recall = measured.of(choice)
    names = dict.fromkeys(candidate.name for candidate in measured.candidates)
    return Held(density, recall, kl, {name: measured.single(name, recall) for name in names})


def profile_report(target: str, results: dict[str, Held], profile: Profile) -> str:
    shares = (
        (name, *(f"{value:.4f}" for value in (result.density, result.recall, result.kl)))
        for name, result in results.items()
    )
    lines = [f"# Profile for {target}", ""]
    lines += table(("prompts", "density", "recall", "KL, nats"), "lrrr", shares)
    lines += ["", "One setting of one method for all heads, at the same recall:", ""]
    singles = (
        (name, *(_reached(result.singles[name]) for result in results.values()))
        for name in results["tuned on"].singles
    )
    head = ("method", *(f"density, {name}" for name in results))
    lines += table(head, "l" + "r" * len(results), singles)
    layers = ((layer, _methods(shares)) for layer, shares in sorted(profile.layers.items()))
    lines += ["", *table(("layer", "methods (heads)"), "rl", layers)]
    gap = results["held out"].recall - results["tuned on"].recall
    lines += ["", f"On held-out prompts, recall differs by {gap:+.4f} from the tuning prompts."]
    return "\n".join(lines) + "\n"


def _reached(density: float | None) -> str:
    return "not reached" if density is None else f"{density:.4f}"


def _methods(shares: Sequence[Share]) -> str:
    """Methods of a layer, with the number of heads of each."""
    heads: Counter[str] = Counter()
    for share in shares:
        heads[share.name] += len(share.heads)
    return ", ".join(f"{name} ({count})" for name, count in heads.items())


def failures(
    kind: str, aim: float, held_out: Held, tuning: Measured, unseen: Measured, choice: Tensor
) -> str:
    """Whether held-out prompts meet the target, and the heads whose recall fell most there."""
    if kind == "speedup":
        lines = ["", "Speed was timed only on the first tuning prompt."]
    else:
        got = held_out.recall if kind == "recall" else held_out.kl
        short = (aim - got if kind == "recall" else got - aim) / aim
        verdict = "met" if short <= 0 else f"missed by {short:.2%} of it"
        lines = [
            "",
            f"On held-out prompts, the target is {verdict}: {kind} {got:.4f}, target {aim:g}.",
        ]
    before, after = tuning.heads(choice)[1], unseen.heads(choice)[1]
    fall = before - after
    lines += ["", "Heads whose recall fell most on held-out prompts:", ""]
    rows = []
    for place in fall.flatten().argsort(descending=True)[:_WORST].tolist():
        layer, head = divmod(place, fall.shape[1])
        candidate = tuning.candidates[int(choice[layer, head])]
        recalls = (f"{x[layer, head]:.4f}" for x in (before, after))
        rows.append((tuning.layers[layer], head, candidate.name, *recalls))
    lines += table(("layer", "head", "method", "tuned on", "held out"), "rrlrr", rows)
    return "\n".join(lines) + "\n"
