"""From measured choices to a profile: which method each head of each layer runs, and how far.

Every candidate, a method at one setting of its knob, is planned on q and k of calibration prompts,
and judged per head: density, and recall against the true mass of blocks on a sample of rows. A
choice for a price per lost attention then falls apart into heads: each takes the candidate with the
least `density + price * (1 - recall)`, and the price is turned until all heads together meet the
target. No single setting for all heads can keep less at the same recall, on what was measured; what
it does on other text is for held-out prompts to tell.

Layers with several methods pay for planning with each. So a layer takes few of them: those whose
best choices cost least together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_patch import BlockPlan, Method, Profile, describe, get_method
from sparse_patch.mixing import common_form
from sparse_patch.profiles import Share
from sparse_patch.specs import spec_of
from sparse_patch_eval.ask.capture import Attention
from sparse_patch_eval.ask.judge import plan_of
from sparse_patch_eval.ask.true_attention import block_mass

# Prices between which the right one lies: at the first recall is worth nothing.
_CHEAPEST, _DEAREST = 1e-3, 1e4
# Prices of which one is so much larger, in logarithms, are the same.
_CLOSE = 0.01


@dataclass(frozen=True)
class Candidate:
    """A method at one setting."""

    name: str
    params: Mapping[str, Any]

    @property
    def method(self) -> Method:
        return get_method(self.name, **self.params)

    @property
    def spec(self) -> str:
        return spec_of(self.name, self.params)


@dataclass(frozen=True, eq=False)
class Measured:
    """Candidates on the heads of some layers, means over prompts.

    Attributes:
        candidates: what was measured.
        layers: indices of the layers.
        density, recall: float64 `[candidates, layers, heads]`; 1 where a candidate runs exact.
    """

    candidates: Sequence[Candidate]
    layers: Sequence[int]
    density: Tensor
    recall: Tensor

    def choose(self, price: float, most_methods: int) -> Tensor:
        """int64 `[layers, heads]`: the candidate of each head."""
        cost = self.density + price * (1 - self.recall)
        names = list(dict.fromkeys(one.name for one in self.candidates))
        best = torch.zeros(cost.shape[1:], dtype=torch.long)
        least = torch.full((cost.shape[1],), math.inf, dtype=cost.dtype)
        for some in itertools.combinations(names, min(most_methods, len(names))):
            mine = [i for i, one in enumerate(self.candidates) if one.name in some]
            costs, index = cost[mine].min(0)
            better = costs.sum(-1) < least
            least = torch.where(better, costs.sum(-1), least)
            best = torch.where(better[:, None], torch.tensor(mine)[index], best)
        return best

    def heads(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Density and recall `[layers, heads]` of a choice `[layers, heads]`."""
        density, recall = (x.gather(0, choice[None])[0] for x in (self.density, self.recall))
        return density, recall

    def of(self, choice: Tensor) -> tuple[float, float]:
        """Mean density and recall of a choice `[layers, heads]`."""
        density, recall = self.heads(choice)
        return float(density.mean()), float(recall.mean())

    def single(self, name: str, recall: float) -> float | None:
        """Density at which one setting of a method for all heads reaches a recall.

        Between two settings, on the straight line; None if none of them reaches it.
        """
        mine = [i for i, one in enumerate(self.candidates) if one.name == name]
        points = sorted((float(self.recall[i].mean()), float(self.density[i].mean())) for i in mine)
        enough = [point for point in points if point[0] >= recall]
        if not enough:
            return None
        above = min(enough, key=lambda point: point[1])
        below = [point for point in points if point[0] < recall and point[1] < above[1]]
        if not below:
            return above[1]
        low = max(below)
        share = (recall - low[0]) / (above[0] - low[0])
        return low[1] + share * (above[1] - low[1])


def choose_until(
    measured: Measured, good: Callable[[Tensor], bool], most_methods: int, *, most_recall: bool
) -> Tensor:
    """The choice at the edge of what is good.

    Args:
        good: does a choice meet the target?
        most_recall: then the choice of most recall that is good (less never makes it worse), of a
            target like speed; else that of least density (more recall never makes it worse).

    Raises:
        ValueError: no choice is good.
    """
    # Places on the logarithm of the price: at `sure` a choice is good if any is.
    sure, wanted = math.log(_CHEAPEST), math.log(_DEAREST)
    if not most_recall:
        sure, wanted = wanted, sure
    best = measured.choose(math.exp(sure), most_methods)
    if not good(best):
        density, recall = measured.of(best)
        raise ValueError(
            f"--target: no choice meets it: the {'least' if most_recall else 'most'} that these "
            f"candidates keep is density {density:.3f}, recall {recall:.4f}; give other methods or "
            "more --steps"
        )
    while abs(wanted - sure) > _CLOSE:
        middle = (sure + wanted) / 2
        choice = measured.choose(math.exp(middle), most_methods)
        if good(choice):
            best, sure = choice, middle
        else:
            wanted = middle
    return best


def candidates(specs: Mapping[str, Mapping[str, Any]], steps: int) -> list[Candidate]:
    """Every method at `steps` places of its knob (`sparse_patch.Knob`), its other parameters fixed.

    Raises:
        ValueError: a method that does not exist, or has no knob.
    """
    found = []
    for name, fixed in specs.items():
        knob = describe(name).knob
        if knob is None:
            raise ValueError(f"{name} has no knob that could be tuned; see sparse_patch.Knob")
        for step in range(steps):
            params = {**knob.params((step + 1) / (steps + 1)), **fixed}
            found.append(Candidate(name, params))
            get_method(name, **params)  # a wrong parameter is an error here
    return found


def measure_layer(
    some: Sequence[Candidate], layer: int, attention: Attention, *, rows: int
) -> tuple[Tensor, Tensor]:
    """Density and recall `[candidates, heads]` of candidates on one layer of one prompt.

    Raises:
        ValueError: their plans cannot share a layer (see `sparse_patch.mixing`).
    """
    heads = len(attention.q)
    density = torch.ones(len(some), heads, dtype=torch.float64)
    recall = torch.ones(len(some), heads, dtype=torch.float64)
    truth: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    of_form: dict[tuple[int, int], BlockPlan] = {}
    for i, one in enumerate(some):
        plan = plan_of(one.method, layer, attention)
        if plan is None:
            continue
        common_form([*of_form.values(), plan])
        form = plan.block_q, plan.runs[0].width
        of_form.setdefault(form, plan)
        if form not in truth:
            truth[form] = _sampled_mass(attention, *form, rows=rows)
        mass, blocks = truth[form]
        density[i] = plan.head_density().repeat_interleave(heads // plan.heads)
        recall[i] = (mass * _mask(plan, heads)[:, blocks]).sum(-1).mean(-1)
    return density, recall


def _sampled_mass(
    attention: Attention, block_q: int, block_k: int, *, rows: int
) -> tuple[Tensor, Tensor]:
    """True mass of each key block for a sample of rows: float32 `[heads, rows, blocks]`, and the
    query block of each row."""
    q_len = attention.q.shape[1]
    row = torch.arange(q_len - 1, -1, -max(1, q_len // rows)).flip(0)
    parts = [block_mass(attention, some, block_k) for some in torch.split(row, 128)]
    return torch.cat(parts, 1), row // block_q


def _mask(plan: BlockPlan, heads: int) -> Tensor:
    """bool `[heads, query blocks, key blocks]` of a plan of one list of blocks."""
    (run,) = plan.runs
    start, _ = run.expand(plan.heads)
    valid = run.valid(plan.heads)
    blocks = -(-plan.kv_len // run.width)
    index = torch.where(valid, start.long() // run.width, blocks)
    mask = torch.zeros(*start.shape[:2], blocks + 1, dtype=torch.bool)
    return mask.scatter_(2, index, True)[..., :-1].repeat_interleave(heads // plan.heads, 0)


def profile_of(
    measured: Measured, choice: Tensor, model: Mapping[str, Any], made: Mapping[str, Any]
) -> Profile:
    """The profile of a choice `[layers, heads]`.

    Heads of a layer whose methods differ in one parameter that may be one value per head share a
    planning.
    """
    group = model["heads"] // model["kv_heads"]
    layers = {}
    for place, layer in enumerate(measured.layers):
        by_name: dict[str, dict[int, Candidate]] = {}
        for head, index in enumerate(choice[place].tolist()):
            one = measured.candidates[index]
            by_name.setdefault(one.name, {})[head] = one
        layers[layer] = tuple(
            share for name, own in by_name.items() for share in _shares(name, own, group)
        )
    return Profile(model, layers, made)


def _shares(name: str, own: Mapping[int, Candidate], group: int) -> list[Share]:
    """The shares of one method in a layer, from the candidate of each head."""
    differ = _differing([one.params for one in own.values()])
    if len(differ) == 1 and _per_head(name, own, differ[0]):
        # A value for every query head of the KV groups in question, of which some do not count.
        groups = sorted({head // group for head in own})
        seen = [one * group + i for one in groups for i in range(group)]
        some = next(iter(own.values()))
        values = tuple(own.get(head, some).params[differ[0]] for head in seen)
        return [Share.of(tuple(own), name, {**some.params, differ[0]: list(values)})]
    heads: dict[str, list[int]] = {}
    settings = {repr(sorted(one.params.items())): one.params for one in own.values()}
    for head, one in own.items():
        heads.setdefault(repr(sorted(one.params.items())), []).append(head)
    return [Share.of(tuple(heads[key]), name, params) for key, params in settings.items()]


def _differing(params: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key in params[0] if any(one[key] != params[0][key] for one in params)]


def _per_head(name: str, own: Mapping[int, Candidate], key: str) -> bool:
    """May this parameter be one value per head?"""
    values = tuple(one.params[key] for one in own.values())
    try:
        method = get_method(name, **{**next(iter(own.values())).params, key: values})
    except (ValueError, TypeError):
        return False
    return key in method.needs_all_heads()
