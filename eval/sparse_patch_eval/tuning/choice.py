"""From measurements to a profile: the method and setting of each head of each layer.

Every candidate, a method at one setting of its knob, plans on q and k of calibration prompts, and
is judged per head: density, and recall against the true mass of blocks on a sample of rows. At a
given price of lost attention, heads choose independently: each takes the candidate with the least
`density + price * (1 - recall)`, and the price is varied until all heads together meet the target.
On the measured prompts, no single setting for all heads keeps less at the same recall; held-out
prompts show how it does on other text.

A layer with several methods plans with each of them. So a layer gets few: those whose best choices
cost least together.
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
from sparse_patch.profiles import Share, common_form
from sparse_patch.spelling import spec_of
from sparse_patch_eval.ask.capture import Attention
from sparse_patch_eval.ask.judge import plan_of
from sparse_patch_eval.ask.true_attention import block_mass

# Bounds of the price: at the lower one, recall is worth nothing.
_CHEAPEST, _DEAREST = 1e-3, 1e4
# Prices whose logarithms differ by less than this are the same.
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
    """Measurements of candidates on the heads of some layers, means over prompts.

    Attributes:
        candidates: the measured ones.
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
        names = list(dict.fromkeys(candidate.name for candidate in self.candidates))
        best = torch.zeros(cost.shape[1:], dtype=torch.long)
        least = torch.full((cost.shape[1],), math.inf, dtype=cost.dtype)
        for methods in itertools.combinations(names, min(most_methods, len(names))):
            members = [i for i, c in enumerate(self.candidates) if c.name in methods]
            costs, index = cost[members].min(0)
            better = costs.sum(-1) < least
            least = torch.where(better, costs.sum(-1), least)
            best = torch.where(better[:, None], torch.tensor(members)[index], best)
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

        Interpolated linearly between two settings; None if none of them reaches it.
        """
        members = [i for i, c in enumerate(self.candidates) if c.name == name]
        points = sorted(
            (float(self.recall[i].mean()), float(self.density[i].mean())) for i in members
        )
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
    """The best choice that just meets the target.

    Args:
        good: does a choice meet the target?
        most_recall: return the good choice with the most recall (for a target like speed, where
            less recall stays good); else the one with the least density (where more recall stays
            good).

    Raises:
        ValueError: no choice is good.
    """
    # Logarithms of the price: at `sure` a choice is good if any is.
    sure, limit = math.log(_CHEAPEST), math.log(_DEAREST)
    if not most_recall:
        sure, limit = limit, sure
    best = measured.choose(math.exp(sure), most_methods)
    if not good(best):
        density, recall = measured.of(best)
        raise ValueError(
            f"--target: no choice meets it: the {'least' if most_recall else 'most'} that these "
            f"candidates keep is density {density:.3f}, recall {recall:.4f}; give other methods or "
            "more --steps"
        )
    while abs(limit - sure) > _CLOSE:
        middle = (sure + limit) / 2
        choice = measured.choose(math.exp(middle), most_methods)
        if good(choice):
            best, sure = choice, middle
        else:
            limit = middle
    return best


def candidates(specs: Mapping[str, Mapping[str, Any]], steps: int) -> list[Candidate]:
    """Every method at `steps` places of its knob (`sparse_patch.Knob`), its other parameters fixed.

    Raises:
        ValueError: a method does not exist, or has no knob.
    """
    result = []
    for name, fixed in specs.items():
        knob = describe(name).knob
        if knob is None:
            raise ValueError(f"{name} has no knob that could be tuned; see sparse_patch.Knob")
        for step in range(steps):
            params = {**knob.params((step + 1) / (steps + 1)), **fixed}
            result.append(Candidate(name, params))
            get_method(name, **params)  # fails here on a wrong parameter
    return result


def measure_layer(
    candidates: Sequence[Candidate], layer: int, attention: Attention, *, rows: int
) -> tuple[Tensor, Tensor]:
    """Density and recall `[candidates, heads]` of candidates on one layer of one prompt.

    Raises:
        ValueError: the candidates' plans cannot share a layer (see `sparse_patch.mixing`).
    """
    heads = len(attention.q)
    density = torch.ones(len(candidates), heads, dtype=torch.float64)
    recall = torch.ones(len(candidates), heads, dtype=torch.float64)
    truth: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    of_form: dict[tuple[int, int], BlockPlan] = {}
    for i, candidate in enumerate(candidates):
        plan = plan_of(candidate.method, layer, attention)
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
    parts = [block_mass(attention, tile, block_k) for tile in torch.split(row, 128)]
    return torch.cat(parts, 1), row // block_q


def _mask(plan: BlockPlan, heads: int) -> Tensor:
    """bool `[heads, query blocks, key blocks]` of a plan with one list of blocks."""
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

    Heads of a layer whose methods differ only in a parameter that can be given per head are planned
    together.
    """
    group = model["heads"] // model["kv_heads"]
    layers = {}
    for place, layer in enumerate(measured.layers):
        by_name: dict[str, dict[int, Candidate]] = {}
        for head, index in enumerate(choice[place].tolist()):
            candidate = measured.candidates[index]
            by_name.setdefault(candidate.name, {})[head] = candidate
        layers[layer] = tuple(
            share for name, heads in by_name.items() for share in _shares(name, heads, group)
        )
    return Profile(model, layers, made)


def _shares(name: str, by_head: Mapping[int, Candidate], group: int) -> list[Share]:
    """The shares of one method in a layer, from the candidate of each head."""
    differ = _differing([candidate.params for candidate in by_head.values()])
    if len(differ) == 1 and _per_head(name, by_head, differ[0]):
        # One value for every query head of these KV groups; those of other heads do not matter.
        groups = sorted({head // group for head in by_head})
        members = [kv_head * group + i for kv_head in groups for i in range(group)]
        first = next(iter(by_head.values()))
        values = tuple(by_head.get(head, first).params[differ[0]] for head in members)
        return [Share.of(tuple(by_head), name, {**first.params, differ[0]: list(values)})]
    heads: dict[str, list[int]] = {}
    settings = {repr(sorted(c.params.items())): c.params for c in by_head.values()}
    for head, candidate in by_head.items():
        heads.setdefault(repr(sorted(candidate.params.items())), []).append(head)
    return [Share.of(tuple(heads[key]), name, params) for key, params in settings.items()]


def _differing(params: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key in params[0] if any(other[key] != params[0][key] for other in params)]


def _per_head(name: str, by_head: Mapping[int, Candidate], key: str) -> bool:
    """Can this parameter be given per head?"""
    values = tuple(candidate.params[key] for candidate in by_head.values())
    try:
        method = get_method(name, **{**next(iter(by_head.values())).params, key: values})
    except (ValueError, TypeError):
        return False
    return key in method.needs_all_heads()
