#!/usr/bin/env python
"""KL to dense when only a part of a model runs sparse.

    python scripts/kl_by_part.py --method flexprefill:gamma=0.8,min_budget=128 \\
        --length 4k --output results/parts_flexprefill_4k

Per prompt, one dense prefill and then one sparse prefill for each part:

    all             every layer and head; also KL by the position of the row
    third 1, 2, 3   a third of the layers
    layer N         one layer
    heads           a share of all heads of the model: those whose recall is worst, those whose
                    recall is best, and the same number drawn at random. The heads left out see all.

KL is KL(dense || sparse) of the next token, mean over rows spread over the whole prompt. "mass
lost" is 1 - recall, summed over the heads that run sparse and divided by all heads of the model, on
dense q and k: so KL can be held against what each part lost.

Writes `rows.jsonl`, `table.md`, `layers.png` and `positions.png`. A run that was stopped goes on.
"""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from plots import plot
from sparse_patch_eval.ask.capture import capture
from sparse_patch_eval.ask.density import exact_share, whole_density
from sparse_patch_eval.ask.judge import judge, plan_of
from sparse_patch_eval.ask.kl import kl_rows
from sparse_patch_eval.base.console import console, progress, user_errors
from sparse_patch_eval.base.options import choose_layers, parse_layers, parse_length
from sparse_patch_eval.base.rows import Row, RowFile, describe_machines
from sparse_patch_eval.base.stats import bootstrap
from sparse_patch_eval.inputs.models import load
from sparse_patch_eval.inputs.text import long_text, passkey_prompt
from study.ablate import OnlyHeads
from study.compare import sparse_prefill
from torch import Tensor
from transformers import PreTrainedModel

from sparse_patch import Method
from sparse_patch.specs import parse_method

BINS = 16
"""Stretches of the prompt that KL by position is given for."""


_LABELS = {"kl": "KL to dense, nats", "mass_lost": "mass lost, share of all"}

Heads = dict[int, frozenset[int]]
"""Heads that run sparse, by layer; layers that are not there run exact."""


def main(
    output: Annotated[Path, typer.Option(help="Folder for the rows, the table and the plots.")],
    method: Annotated[str, typer.Option(help="`NAME:key=value,...`.")] = "flexprefill",
    length: Annotated[str, typer.Option(help="Prompt length in tokens.")] = "4k",
    parts: Annotated[
        str, typer.Option(help="Of `thirds`, `layers`, `heads`; `all` is always in.")
    ] = "thirds,layers,heads",
    only_layers: Annotated[
        str, typer.Option(help="Layers to run alone, as in `0,5,-1` or `::3`.")
    ] = "::3",
    share: Annotated[float, typer.Option(help="Share of heads in a class of heads.")] = 0.25,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, with seeds from --seed on.")] = 3,
    positions: Annotated[int, typer.Option(min=BINS, help="Rows whose KL is taken.")] = 1024,
    rows: Annotated[int, typer.Option(min=1, help="Query rows judged for recall, about.")] = 512,
    model: Annotated[
        str, typer.Option(help="Hub id, local folder, .gguf file, or `smollm2`.")
    ] = "smollm2",
    text: Annotated[str, typer.Option(help="`kjv`, `stdlib`, `pydoc`, or a UTF-8 file.")] = "pydoc",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the first prompt.")] = 0,
) -> None:
    """Measure KL to dense when one layer, a third of the layers or a class of heads is sparse."""
    with user_errors():
        chosen, n_tokens, prose = parse_method(method), parse_length(length), long_text(text)
        wanted, kinds = parse_layers(only_layers), parse_parts(parts)
        if not 0 < share <= 0.5:
            raise ValueError(f"--share {share} must be above 0 and at most 0.5")
        lm, tokenizer = load(model, dtype=dtype, device=device, max_length=n_tokens)
        alone = choose_layers(lm, wanted)
        ids = {
            s: passkey_prompt(tokenizer, n_tokens, text=prose, seed=s).input_ids.to(lm.device)
            for s in range(seed, seed + prompts)
        }
    setup = {"model": model, "dtype": dtype, "device": device, "text": text, "length": n_tokens}
    setup |= {"method": method, "share": share, "positions": positions, "rows": rows}
    file = RowFile(output / "rows.jsonl", setup)
    done = file.keys("prompt", "part")
    names = part_names(kinds, alone)
    with progress() as bar:
        task = bar.add_task("", total=len(ids) * len(names))
        for s, prompt in ids.items():
            todo = [name for name in names if (s, name) not in done]
            bar.advance(task, len(names) - len(todo))
            if not todo:
                continue
            bar.update(task, description=f"prompt {s}: dense")
            look = _Prompt(lm, prompt, chosen, positions, rows)
            for name in todo:
                bar.update(task, description=f"prompt {s}: {name}")
                file.add({"prompt": s, "part": name, **look.measure(look.heads_of(name, share, s))})
                bar.advance(task)
    mine = [row for row in file.rows if row["prompt"] in ids and row["part"] in names]
    table = _markdown(mine, names, seed)
    (output / "table.md").write_text(table)
    console.print(table, markup=False)
    title = f"{method}, {model}, {n_tokens:,} tokens of {text}"
    if "layers" in kinds:
        plot(output / "layers.png", lambda axes: _draw_layers(axes, mine, alone, title))
    plot(output / "positions.png", lambda axes: _draw_positions(axes, mine, title))


def parse_parts(text: str) -> list[str]:
    """Kinds of parts from `thirds,heads`.

    Raises:
        ValueError: one is unknown.
    """
    kinds = text.split(",")
    if not set(kinds) <= {"thirds", "layers", "heads"}:
        raise ValueError(f"--parts {text!r}: give some of thirds, layers, heads")
    return kinds


def part_names(kinds: list[str], alone: list[int]) -> list[str]:
    """Names of all parts, in the order of the table."""
    names = {
        "thirds": [f"third {n}" for n in (1, 2, 3)],
        "layers": [f"layer {n}" for n in alone],
        "heads": [f"{which} heads" for which in ("worst", "best", "random")],
    }
    return ["all", *(name for kind in kinds for name in names[kind])]


class _Prompt:
    """One prompt: dense logits, what the method loses where, and sparse runs of parts."""

    def __init__(
        self, model: PreTrainedModel, ids: Tensor, method: Method, positions: int, rows: int
    ) -> None:
        self._model, self._ids, self._method = model, ids, method
        # The last row is left out: nothing follows it.
        some = torch.linspace(0, ids.shape[1] - 2, min(positions, ids.shape[1] - 1))
        self._rows = some.round().long().to(ids.device)
        seen = capture(model, ids, logits_to_keep=self._rows)
        self._dense = seen.logits
        self._recall = {
            layer: judge(attention, plan, rows=rows).recall
            for layer, attention in seen.layers.items()
            if (plan := plan_of(method, layer, attention)) is not None
        }
        self._n_heads = sum(attention.q.shape[0] for attention in seen.layers.values())
        self._n_layers = len(seen.layers)

    def heads_of(self, name: str, share: float, seed: int) -> Heads:
        """The heads of a part, by layer."""
        kind, _, which = name.rpartition(" ")
        if kind == "third":
            n = self._n_layers
            layers = range((int(which) - 1) * n // 3, int(which) * n // 3)
        elif kind == "layer":
            layers = range(int(which), int(which) + 1)
        else:
            layers = range(self._n_layers)
        if which == "heads":
            return self._class_of_heads(kind, share, seed)
        return {
            layer: frozenset(range(len(self._recall[layer])))
            for layer in layers
            if layer in self._recall
        }

    def _class_of_heads(self, kind: str, share: float, seed: int) -> Heads:
        ranked = sorted(
            (recall, layer, head)
            for layer, recalls in self._recall.items()
            for head, recall in enumerate(recalls)
        )
        if kind == "best":
            ranked.reverse()
        elif kind == "random":
            random.Random(f"heads-{seed}").shuffle(ranked)
        chosen: dict[int, set[int]] = {}
        for _, layer, head in ranked[: round(share * len(ranked))]:
            chosen.setdefault(layer, set()).add(head)
        return {layer: frozenset(heads) for layer, heads in chosen.items()}

    def measure(self, heads: Heads) -> Row:
        """Run these heads sparse."""
        method = OnlyHeads(method=self._method, heads=heads)
        out, report, _ = sparse_prefill(self._model, self._ids, method, self._rows)
        kl = kl_rows(self._dense, out.logits[0].float())
        lost = [1 - self._recall[layer][head] for layer, some in heads.items() for head in some]
        return {
            "kl": float(kl.mean()),
            "kl_bins": [float(part.mean()) for part in kl.tensor_split(BINS)],
            "mass_lost": sum(lost) / self._n_heads,
            "density": whole_density(report),
            "exact": exact_share(report),
        }


def _markdown(rows: list[Row], names: list[str], seed: int) -> str:
    lines = [
        "| sparse | density | mass lost | KL to dense | KL / mass lost |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in names:
        mine = [row for row in rows if row["part"] == name]
        lost, kl = fmean(row["mass_lost"] for row in mine), [row["kl"] for row in mine]
        ratio = f"{fmean(kl) / lost:.3g}" if lost > 0 else "-"
        lines.append(
            f"| {name} | {fmean(row['density'] for row in mine):.3f} | {lost:.5f} | "
            f"{bootstrap(kl, seed=seed)} | {ratio} |"
        )
    first = rows[0]
    foot = (
        f"{first['method']}, {first['length']:,} tokens of {first['text']}, "
        f"{len({row['prompt'] for row in rows})} prompts. KL: nats, mean over "
        f"{first['positions']} rows of the whole prompt [95 % bootstrap interval over prompts]. "
        "Mass lost: 1 - recall on dense q and k, sum over the heads that run sparse, divided by "
        f"all heads. Heads: {first['share']:.0%} of all. Density counts layers that run exact as "
        f"1. {describe_machines(rows)}"
    )
    return "\n".join([*lines, "", foot]) + "\n"


def _draw_layers(axes: Any, rows: list[Row], alone: list[int], title: str) -> None:
    for number, key in enumerate(("kl", "mass_lost")):
        means = [fmean(r[key] for r in rows if r["part"] == f"layer {n}") for n in alone]
        axes.plot(alone, means, marker="o", color=f"C{number}", label=_LABELS[key])
    axes.set_yscale("log")
    axes.set_xlabel("the one sparse layer")
    axes.set_title(title, fontsize=9)
    axes.legend()


def _draw_positions(axes: Any, rows: list[Row], title: str) -> None:
    bins = [row["kl_bins"] for row in rows if row["part"] == "all"]
    means = [fmean(column) for column in zip(*bins, strict=True)]
    width = rows[0]["length"] / BINS
    axes.bar([(n + 0.5) * width for n in range(BINS)], means, width=0.9 * width)
    axes.set_xlabel("position of the row, tokens")
    axes.set_ylabel("KL to dense, all layers sparse")
    axes.set_title(title, fontsize=9)


if __name__ == "__main__":
    typer.run(main)
