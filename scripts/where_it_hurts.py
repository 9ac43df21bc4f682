#!/usr/bin/env python
"""What the loss hears of a sparse prefill: which heads, which rows, and what follows for budgets.

    python scripts/where_it_hurts.py --length 2k --output results/where_it_hurts

`strided` keeps the same number of blocks in every row of every head. On tuning prompts this
records, for each head and row, the attention mass that was dropped and the largest single key in
it, beside the KL divergence from dense at that position. Heads are then ranked by how much larger
their largest dropped key is at the 5 % of positions where KL is worst than elsewhere. On prompts
not used for that, KL is measured again with the first heads of that ranking kept exact, as many
heads at random, and as many of those that lose most mass. Last, at one density, the policies that
set budgets are compared on the same held-out prompts.

Writes `result.json` and `table.md` into the output folder.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from sparse_patch_eval.ask.kl import kl_rows
from sparse_patch_eval.ask.true_attention import probabilities
from sparse_patch_eval.base.machine import machine
from sparse_patch_eval.base.options import parse_lengths
from sparse_patch_eval.inputs.models import load
from sparse_patch_eval.inputs.text import long_text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import sparse_patch
from sparse_patch import BlockPlan
from sparse_patch.block_scorer import BlockGrid
from sparse_patch.methods.strided import Strided

BLOCK = 64
# Where in each text, as a share of it, a prompt begins. None overlap at the lengths used.
TUNING = (("stdlib", 0.1), ("stdlib", 0.6), ("kjv", 0.6))
HELD_OUT = (("stdlib", 0.4), ("stdlib", 0.8), ("kjv", 0.3), ("kjv", 0.85))
# Share of positions that count as the worst, and shares of heads kept exact.
WORST, EXACT_SHARES = 0.05, (1 / 30, 1 / 10)
DRAWS = 3
POLICIES: dict[str, dict[str, Any]] = {
    "topk: every row of every head the same": {"select": "topk"},
    "top_p: every row by its own estimate": {"select": "top_p"},
    "per_head_budget: from the last block": {"select": "per_head_budget"},
    "held_out: from rows the ranking has not seen": {"select": "held_out"},
}
console = Console(width=140)
Head = tuple[int, int]  # layer, query head


@dataclass(frozen=True)
class Watched(Strided):
    """`strided` that keeps some heads exact, and notes what the others drop where asked to."""

    layer: int = -1
    exact: frozenset[Head] = frozenset()
    notes: dict[int, tuple[Tensor, Tensor]] | None = field(default=None, compare=False)

    def for_layer(self, layer: int) -> Watched:
        return dataclasses.replace(self, layer=layer)

    def choose(
        self, scores: Tensor, grid: BlockGrid, q: Tensor, k: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        order, count = super().choose(scores, grid, q, k, scale)
        count = count.clone()
        for head in range(len(count)):
            if (self.layer, head) in self.exact:
                count[head] = grid.causal().sum(-1)
        return order, count

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        plan = super().plan(q, k, scale=scale, q_offset=q_offset)
        if self.notes is not None and plan is not None:
            self.notes[self.layer] = _dropped(q, k, plan, scale)
        return plan


def _dropped(q: Tensor, k: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Mass dropped and the largest dropped key, `[heads, rows]` each; rows of the second half."""
    mass, largest = [], []
    for block in range(plan.n_q_blocks // 2, plan.n_q_blocks):
        first, end = plan.row_range(block)
        kept = torch.stack([plan.block_mask(head, block)[:, :end] for head in range(q.shape[0])])
        rows = torch.arange(first, end, device=q.device)
        dropped = probabilities(q, k, rows, scale=scale).masked_fill_(kept, 0.0)
        mass.append(dropped.sum(-1))
        largest.append(dropped.amax(-1))
    return torch.cat(mass, 1), torch.cat(largest, 1)


@dataclass(frozen=True, eq=False)
class Bench:
    """A model and prompts with their dense distributions over the second half."""

    model: PreTrainedModel
    prompts: list[Tensor]
    dense: list[Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel, prompts: list[Tensor]) -> Bench:
        return cls(model, prompts, [_logits(model, ids) for ids in prompts])

    def kl(self, method: Watched, index: int) -> tuple[Tensor, float]:
        """KL(dense || sparse) `[positions]` of one prompt, and the density."""
        with sparse_patch.patch(self.model, method, min_length=0) as handle:
            sparse = _logits(self.model, self.prompts[index])
        dense = self.dense[index]
        density = handle.report().density
        return kl_rows(dense, sparse), 1.0 if density is None else density

    def mean_kl(self, method: Watched) -> tuple[list[float], float]:
        """Mean KL of each prompt, and the mean density."""
        found = [self.kl(method, index) for index in range(len(self.prompts))]
        return [float(kl.mean()) for kl, _ in found], statistics.mean(d for _, d in found)


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    half = ids.shape[1] // 2
    logits: Tensor = model(ids, logits_to_keep=half, use_cache=False).logits[0]
    return logits.float()


def main(
    output: Annotated[Path, typer.Option(help="Folder for result.json and table.md.")],
    model: Annotated[str, typer.Option(help="Hub id, local folder, or `smollm2`.")] = "smollm2",
    length: Annotated[str, typer.Option(help="Tokens per prompt.")] = "2k",
    share: Annotated[float, typer.Option(help="Blocks kept, of a full row.")] = 0.2,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Draws the random heads.")] = 0,
) -> None:
    """Measure which heads and rows a sparse prefill is heard by, and compare budgets."""
    (tokens,) = parse_lengths(length)
    lm, tokenizer = load(model, dtype=dtype, device=device)
    tuning = Bench.of(lm, _prompts(tokenizer, TUNING, tokens))
    held_out = Bench.of(lm, _prompts(tokenizer, HELD_OUT, tokens))
    topk = max(3, round(share * tokens / BLOCK))
    base = Watched(select="topk", topk=topk, block_size=BLOCK)
    with Progress(
        *Progress.get_default_columns(), TimeElapsedColumn(), console=Console(stderr=True)
    ) as progress:
        runs = 1 + len(EXACT_SHARES) * (2 + DRAWS)
        task = progress.add_task("heads", total=runs + len(POLICIES))

        def step() -> None:
            progress.advance(task)

        heads, loudest, most_lost = rank_heads(tuning, base)
        exact = keep_exact(held_out, base, loudest, most_lost, seed, step)
        budgets = compare_budgets(tuning, held_out, base, exact[0]["density"], step)
    result = {
        "model": model,
        "tokens": tokens,
        "dtype": dtype,
        "topk": topk,
        "machine": machine(),
        "heads": heads,
        "exact": exact,
        "budgets": budgets,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    table = _markdown(result)
    (output / "table.md").write_text(table)
    console.print(table, markup=False)


def _prompts(
    tokenizer: PreTrainedTokenizerBase, places: tuple[tuple[str, float], ...], length: int
) -> list[Tensor]:
    prompts = []
    for name, share in places:
        text = long_text(name)
        start = int(len(text) * share)
        window = text[start : start + 12 * length]
        ids = tokenizer(window, return_tensors="pt", add_special_tokens=False, verbose=False)
        prompts.append(ids["input_ids"][:, :length])
        if prompts[-1].shape[1] < length:
            raise ValueError(f"{name} is too short for {length} tokens from {share:.0%} on")
    return prompts


def rank_heads(bench: Bench, base: Watched) -> tuple[list[dict[str, Any]], list[Head], list[Head]]:
    """Heads by how much larger their largest dropped key is where KL is worst; and by mass lost."""
    excess, lost = [], []
    for index in range(len(bench.prompts)):
        notes: dict[int, tuple[Tensor, Tensor]] = {}
        kl, _ = bench.kl(dataclasses.replace(base, notes=notes), index)
        mass, largest = (
            torch.stack(x) for x in zip(*(notes[i] for i in sorted(notes)), strict=True)
        )
        worst = torch.zeros_like(kl, dtype=torch.bool)
        worst[kl.topk(max(1, int(WORST * len(kl)))).indices] = True
        excess.append(largest[..., worst].mean(-1) - largest[..., ~worst].mean(-1))
        lost.append(mass.mean(-1))
    mean_excess, mean_lost = torch.stack(excess).mean(0), torch.stack(lost).mean(0)

    def ranked(values: Tensor) -> list[Head]:
        order = values.flatten().argsort(descending=True, stable=True)
        return [(int(i) // values.shape[1], int(i) % values.shape[1]) for i in order]

    rows = [
        {
            "layer": layer,
            "head": head,
            "largest_dropped_key_excess": float(mean_excess[layer, head]),
            "mass_lost": float(mean_lost[layer, head]),
        }
        for layer, head in ranked(mean_excess)
    ]
    return rows, ranked(mean_excess), ranked(mean_lost)


def keep_exact(
    bench: Bench,
    base: Watched,
    loudest: list[Head],
    most_lost: list[Head],
    seed: int,
    step: Callable[[], None],
) -> list[dict[str, Any]]:
    """KL on held-out prompts with a few heads exact, chosen in three ways."""
    rows = []

    def measure(name: str, heads: list[Head]) -> None:
        kl, density = bench.mean_kl(dataclasses.replace(base, exact=frozenset(heads)))
        rows.append({"exact": name, "heads": len(heads), "density": density, "kl": kl})
        step()

    measure("none", [])
    rng = random.Random(seed)
    for fraction in EXACT_SHARES:
        n = round(fraction * len(loudest))
        measure("largest dropped key", loudest[:n])
        measure("most mass lost", most_lost[:n])
        for draw in range(DRAWS):
            measure(f"random, draw {draw}", rng.sample(loudest, n))
    return rows


def compare_budgets(
    tuning: Bench, held_out: Bench, base: Watched, density: float, step: Callable[[], None]
) -> list[dict[str, Any]]:
    """KL on held-out prompts, each policy's knob set for `density` on the tuning prompts."""
    captured = _captured(tuning)
    rows = []
    for name, params in POLICIES.items():
        method = base
        if params["select"] != "topk":
            options = {"block_size": BLOCK, **params}
            low, high = 0.01, 0.999
            for _ in range(8):
                gamma = (low + high) / 2
                method = Watched(gamma=gamma, **options)
                found = statistics.mean(_density(method, *qk) for qk in captured)
                low, high = (low, gamma) if found > density else (gamma, high)
        kl, reached = held_out.mean_kl(method)
        rows.append({"policy": name, "gamma": method.gamma, "density": reached, "kl": kl})
        step()
    return rows


def _captured(bench: Bench) -> list[tuple[Tensor, Tensor, float]]:
    """q, k and scale of every layer of the dense prefill of each prompt."""
    found: list[tuple[Tensor, Tensor, float]] = []

    @dataclass(frozen=True)
    class Recorder(Watched):
        def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> None:
            found.append((q.clone(), k.clone(), scale))

    for ids in bench.prompts:
        with sparse_patch.patch(bench.model, Recorder(), min_length=0):
            _logits(bench.model, ids)
    return found


def _density(method: Watched, q: Tensor, k: Tensor, scale: float) -> float:
    plan = method.plan(q, k, scale=scale, q_offset=0)
    return 1.0 if plan is None else plan.density


def _markdown(result: dict[str, Any]) -> str:
    def values(row: dict[str, Any]) -> str:
        return f"{row['density']:.3f} | {statistics.mean(row['kl']):.4f} | " + ", ".join(
            f"{kl:.3f}" for kl in row["kl"]
        )

    names = ", ".join(f"{text} at {share:.0%}" for text, share in HELD_OUT)
    about = result["machine"]
    lines = [
        f"`strided` with {result['topk']} blocks of {BLOCK} in every row, {result['model']}, "
        f"{result['tokens']:,} tokens, {result['dtype']}; KL to dense over the second half of "
        f"held-out prompts ({names}), nats. {about['device']}, torch {about['torch']}, commit "
        f"{about['git']}.",
        "",
        "| heads kept exact | chosen by | density | KL, mean | per prompt |",
        "|---:|---|---:|---:|---|",
        *(f"| {row['heads']} | {row['exact']} | {values(row)} |" for row in result["exact"]),
        "",
        "The ten heads whose largest dropped key grows most where KL is worst (tuning prompts):",
        "",
        "| layer | head | largest dropped key, worst 5 % less rest | mass lost, mean |",
        "|---:|---:|---:|---:|",
        *(
            f"| {h['layer']} | {h['head']} | {h['largest_dropped_key_excess']:.3f} | "
            f"{h['mass_lost']:.3f} |"
            for h in result["heads"][:10]
        ),
        "",
        "The same ranking under different budgets, the knob set on tuning prompts:",
        "",
        "| policy | gamma | density | KL, mean | per prompt |",
        "|---|---:|---:|---:|---|",
        *(
            f"| {row['policy']} | "
            f"{'' if row['policy'].startswith('topk') else format(row['gamma'], '.3f')} | "
            f"{values(row)} |"
            for row in result["budgets"]
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
