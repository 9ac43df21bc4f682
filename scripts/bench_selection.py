#!/usr/bin/env python
"""What choosing costs on a CPU: every method's plan, and counting its density, beside dense SDPA.

    python scripts/bench_selection.py --output results/bench_selection

Every round of a shape calls dense SDPA once and every method once, in rotating order in one
process; a share is the median of the rounds' shares. Density counts because every sparse call
counts it. Queries and keys are made like a model's, or are a real model's (`--layers`). Methods
run at their defaults, and where those keep all keys of a shape, with a smaller budget (`SMALLER`).

Targets: of SDPA's time at most 10 % from 8k tokens on and at most 5 % from 32k on; and HiP, whose
search is linear times a logarithm, at most 6 times as long for 32k as for 8k.

Writes `rows.jsonl` (a line per round, with the machine) and `table.md` into the output folder. A
run that was stopped goes on where it was.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_kernels import SDPA, dense, seconds_of, split
from gpu_checks.device import Device
from gpu_checks.inputs import keys, queries
from sparse_patch_eval.ask.capture import Attention, capture
from sparse_patch_eval.base.console import console, progress, user_errors
from sparse_patch_eval.base.options import choose_layers, parse_layers, parse_length, parse_lengths
from sparse_patch_eval.base.rows import Row, RowFile
from sparse_patch_eval.inputs.models import load
from sparse_patch_eval.inputs.text import long_text, passkey_prompt
from sparse_patch_kernels import BlockPlan

import sparse_patch
from sparse_patch import Method

MADE = "made"
# So many tokens or more -> the largest share of SDPA's time.
SHARES = {32768: 0.05, 8192: 0.10}
GROWTH = 6.0
SHORT, LONG = 8192, 32768
# Where the defaults keep everything, the first of these that does not. A list that does not choose
# costs nothing to choose.
SMALLER: dict[str, tuple[dict[str, Any], ...]] = {
    "a_shape": ({"window": 512},),
    "tri_shape": ({"window": 512},),
    "minference": ({"vertical": 500, "slash": 1000},),
    "dhsa": ({"topk": 4},),
    "moba": ({"chunk_size": 512}, {"chunk_size": 128}),
    "proxyattn": ({"min_budget": 512},),
    "infinite_hip": ({"keep": (8192, 2048, 512), "window": 256},),
    "power": ({"local_blocks": 2},),
}


@dataclass(frozen=True)
class Shape:
    """What is timed together. inputs: "made", or a model with its layer."""

    tokens: int
    heads: int
    kv_heads: int
    dim: int
    dtype: str
    threads: int
    inputs: str


def main(
    output: Annotated[Path, typer.Option(help="Folder for rows.jsonl and table.md.")],
    lengths: Annotated[str, typer.Option(help="Tokens.")] = "2k,8k,32k",
    shapes: Annotated[str, typer.Option(help="Heads/KV heads/dim.")] = "9/3/64,8/2/128",
    dtypes: Annotated[str, typer.Option(help="`float32`, `bfloat16`.")] = "float32,bfloat16",
    threads: Annotated[str, typer.Option(help="Of PyTorch.")] = "1",
    methods: Annotated[str, typer.Option(help="Names; default: all.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Per shape.")] = 3,
    layers: Annotated[
        str, typer.Option(help="Layers of --model that are timed too, as in `0,5,-1`.")
    ] = "",
    model: Annotated[str, typer.Option(help="As for `sparse-patch eval`.")] = "smollm2",
    real_length: Annotated[str, typer.Option(help="Tokens of its prompt.")] = "8k",
) -> None:
    """Time every method's choice against dense SDPA."""
    with user_errors():
        known = sparse_patch.list_methods()
        names = split(methods, known) if methods else known
        settings = list(itertools.product(split(dtypes, ("float32", "bfloat16")), split(threads)))
        made = [
            Shape(n, heads, kv_heads, dim, dtype, int(count), MADE)
            for n, (heads, kv_heads, dim), (dtype, count) in itertools.product(
                parse_lengths(lengths), map(_heads, split(shapes)), settings
            )
        ]
        found = _captured(model, parse_length(real_length), layers) if layers else {}
    real = [
        Shape(given.q.shape[1], len(given.q), len(given.k), given.q.shape[2], dtype, int(n), name)
        for name, (_, given) in found.items()
        for dtype, n in settings
    ]
    file = RowFile(output / "rows.jsonl", {})
    todo = [*made, *real]
    with progress() as bar:
        task = bar.add_task("shapes", total=len(todo))
        for shape in todo:
            bar.update(task, description=", ".join(map(str, asdict(shape).values())))
            mine = [r for r in file.rows if _of(r, shape) and set(names) <= set(r["options"])]
            missing = sorted(set(range(rounds)) - {row["round"] for row in mine})
            if missing:
                layer, given = found.get(shape.inputs, (None, None))
                for row in _timed(shape, given or _made(shape), layer, names, missing):
                    file.add(row)
            bar.advance(task)
    table = markdown([row for row in file.rows if any(_of(row, shape) for shape in todo)])
    (output / "table.md").write_text(table)
    console.print(table, markup=False)


def _heads(shape: str) -> tuple[int, int, int]:
    heads, kv_heads, dim = map(int, shape.split("/"))
    return heads, kv_heads, dim


def _of(row: Row, shape: Shape) -> bool:
    return all(row[key] == value for key, value in asdict(shape).items())


def _made(shape: Shape) -> Attention:
    cpu, n = Device(on_gpu=False), shape.tokens
    return Attention(
        queries(cpu, shape.heads, n, shape.dim, end=n, seed=0),
        keys(cpu, shape.kv_heads, n, shape.dim, seed=1),
        cpu.randn(shape.kv_heads, n, shape.dim, seed=2),
        shape.dim**-0.5,
    )


def _captured(model: str, tokens: int, layers: str) -> dict[str, tuple[int, Attention]]:
    """Layers by name, each with its index, from one dense prefill."""
    lm, tokenizer = load(model, dtype="float32", device="cpu", max_length=tokens)
    prompt = passkey_prompt(tokenizer, tokens, text=long_text("kjv"), seed=0).input_ids
    inside = capture(lm, prompt, choose_layers(lm, parse_layers(layers))).layers
    return {f"{model}, layer {layer}": (layer, given) for layer, given in inside.items()}


def _timed(
    shape: Shape, given: Attention, layer: int | None, names: Sequence[str], rounds: Sequence[int]
) -> Iterator[Row]:
    """A row per round; seconds of a method are those of its plan and of the plan's density.

    Methods that keep everything, whatever is tried, have options and no seconds.
    """
    torch.set_num_threads(shape.threads)
    q, k, v = (x.to(getattr(torch, shape.dtype)) for x in (given.q, given.k, given.v))
    scale = given.scale
    calls: dict[str, Callable[[], Any]] = {SDPA: dense(q, k, v, scale)}
    density, options = {}, {}
    for name in names:
        for tried in ({}, *SMALLER.get(name, ())):
            method = sparse_patch.get_method(name, **tried)
            method = method if layer is None else method.for_layer(layer)
            plan = method.plan(q, k, scale=scale, q_offset=0)
            options[name] = tried
            if plan is not None:
                calls[f"plan {name}"] = _planning(method, q, k, scale)
                calls[f"density {name}"] = _counting(plan)
                density[name] = plan.density
                break
    order = list(calls)
    for round_ in rounds:
        turn = round_ * len(order) // max(1, len(rounds)) % len(order)
        yield {
            **asdict(shape),
            "round": round_,
            "seconds": {name: seconds_of(calls[name]) for name in order[turn:] + order[:turn]},
            "density": density,
            "options": options,
        }


def _planning(method: Method, q: Any, k: Any, scale: float) -> Callable[[], Any]:
    return lambda: method.plan(q, k, scale=scale, q_offset=0)


def _counting(plan: BlockPlan) -> Callable[[], Any]:
    return lambda: plan.density


@dataclass(frozen=True)
class Cell:
    """A method on a shape: medians over rounds of seconds, and of shares of SDPA's time.

    growth: how many times as long as at 8k, for HiP at 32k.
    """

    shape: Shape
    method: str
    density: float
    options: dict[str, Any]
    plan: float
    counting: float
    share: float
    low: float
    high: float
    growth: float | None = None

    @property
    def missed(self) -> list[str]:
        """Targets that this cell misses."""
        most = next((share for n, share in SHARES.items() if self.shape.tokens >= n), None)
        found = ["share"] if most is not None and self.share > most else []
        return found + (["growth"] if self.growth is not None and self.growth > GROWTH else [])


def cells(rows: Sequence[Row]) -> list[Cell]:
    """All methods of all shapes, in the order of the rows; those that choose nothing left out."""
    fields = list(Shape.__dataclass_fields__)
    shapes = dict.fromkeys(Shape(**{key: row[key] for key in fields}) for row in rows)
    found: list[Cell] = []
    short: dict[tuple[Any, ...], float] = {}
    for shape in shapes:
        mine = [row for row in rows if _of(row, shape)]
        for method in dict.fromkeys(name for row in mine for name in row["density"]):
            at = [row for row in mine if method in row["density"]]
            plan = [row["seconds"][f"plan {method}"] for row in at]
            counting = [row["seconds"][f"density {method}"] for row in at]
            exact = [row["seconds"][SDPA] for row in at]
            shares = [(a + b) / c for a, b, c in zip(plan, counting, exact, strict=True)]
            like = tuple(x for key, x in asdict(shape).items() if key != "tokens")
            whole = statistics.median(a + b for a, b in zip(plan, counting, strict=True))
            if method == "hip" and shape.tokens == SHORT:
                short[like] = whole
            compared = method == "hip" and shape.tokens == LONG and like in short
            found.append(
                Cell(
                    shape,
                    method,
                    at[-1]["density"][method],
                    at[-1]["options"][method],
                    statistics.median(plan),
                    statistics.median(counting),
                    statistics.median(shares),
                    min(shares),
                    max(shares),
                    whole / short[like] if compared else None,
                )
            )
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The table, cells that miss a target marked, and how many do."""
    lines = [
        "| tokens | heads | dim | dtype | threads | inputs | method | keeps | plan, ms "
        "| density, ms | of dense (range) | misses |",
        "|---:|---|---:|---|---:|---|---|---:|---:|---:|---:|---|",
    ]
    found = cells(rows)
    for cell in found:
        shape = cell.shape
        options = ", ".join(f"{key}={value}" for key, value in cell.options.items())
        grown = "" if cell.growth is None else f", {cell.growth:.1f}x of 8k"
        lines.append(
            f"| {shape.tokens:,} | {shape.heads}/{shape.kv_heads} | {shape.dim} | {shape.dtype} "
            f"| {shape.threads} | {shape.inputs} | {cell.method}{options and f' ({options})'} "
            f"| {cell.density:.3f} | {cell.plan * 1e3:.1f} | {cell.counting * 1e3:.1f} "
            f"| {cell.share:.1%} ({cell.low:.1%}-{cell.high:.1%}{grown}) "
            f"| {', '.join(cell.missed)} |"
        )
    aimed = [cell for cell in found if cell.shape.tokens >= min(SHARES)]
    missed = sum("share" in cell.missed for cell in aimed)
    lines.append(f"\n{missed} of {len(aimed)} cells from 8k on miss their share.")
    about = rows[-1]["machine"]
    lines.append(
        f"\n{about['device']}, {about['cpu_capability']}, torch {about['torch']}, commit "
        f"{', '.join(dict.fromkeys(str(row['machine']['git']) for row in rows))}."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
