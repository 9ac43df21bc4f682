#!/usr/bin/env python
"""Speed of the block-sparse op on a CPU: ours, SDPA and compiled FlexAttention, in turns.

    python scripts/bench_kernels.py --output results/bench_kernels

Every round of a shape calls dense SDPA once, and ours and FlexAttention once per plan, in rotating
order in one process; a ratio is the median of the rounds' ratios. Plans are random at given
densities, or what a method plans on a real model's q and k (`--real`). FlexAttention gets the same
blocks as a BlockMask, and SDPA is causal and dense. Shares of the GEMM rate compare the floating
point operations of the kept blocks with what `torch.matmul` reaches on large squares in the same
round.

Targets, for densities up to 25 %: a speed-up over SDPA of 0.85 / density in float32 and
1.2 / density in bfloat16; never behind FlexAttention, and twice as fast in bfloat16.

Writes `rows.jsonl` (a line per timing, with the machine) and `table.md` into the output folder. A
run that was stopped goes on where it was.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from bench import grid, options
from bench.calls import CPU, SDPA, Call, dense, in_turns, made, of_model, split
from gpu_checks.inputs import plan_of_density
from sparse_patch_eval.ask.capture import Attention
from sparse_patch_eval.base.console import fail, user_errors
from sparse_patch_eval.base.options import parse_length, parse_lengths
from sparse_patch_eval.base.rows import Row, RowFile
from sparse_patch_kernels import BlockPlan, block_sparse_attention
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparse_patch import get_method

OURS, FLEX = "ours", "FlexAttention"
# What is timed together; plans: "random", or a model with its layer.
AXES = ("tokens", "grouping", "dim", "dtype", "block", "threads", "plans")
RANDOM = "random"
# By length: query and KV heads of the two groupings, so few that a dense call takes seconds.
HEADS = {"MHA": (4, 4), "GQA": (6, 2)}
HEADS_LONG = {"MHA": (2, 2), "GQA": (3, 1)}
LONG = 16384
SPEED_UP = {"float32": 0.85, "bfloat16": 1.2}
OVER_FLEX = {"float32": 1.0, "bfloat16": 2.0}
TARGET_DENSITY = 0.255
# Floating point operations of the product of two squares of 2,048.
SQUARE = 2 * 2048**3


class Given(NamedTuple):
    """What a place's calls work on: a layer, and plans by name."""

    inside: Attention
    plans: dict[str, BlockPlan]


def main(
    output: Annotated[Path, typer.Option(help="Folder for rows.jsonl and table.md.")],
    lengths: Annotated[str, typer.Option(help="Tokens of the random plans.")] = "8k,32k",
    densities: Annotated[str, typer.Option(help="Of the random plans.")] = "0.05,0.1,0.15,0.25,0.5",
    dims: Annotated[str, typer.Option(help="Head dimensions.")] = "64,128",
    groupings: Annotated[str, typer.Option(help="`MHA`, `GQA`.")] = "MHA,GQA",
    dtypes: options.Dtypes = "float32,bfloat16",
    blocks: Annotated[str, typer.Option(help="Tokens of a block.")] = "64,128",
    threads: options.Threads = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Per shape.")] = 5,
    real: Annotated[
        list[str] | None,
        typer.Option(help="Method whose plans of --model are timed too; may repeat."),
    ] = None,
    model: Annotated[str, typer.Option(help="As for `sparse-patch eval`.")] = "smollm2",
    real_length: Annotated[str, typer.Option(help="Tokens of its prompt.")] = "8k",
    layers: Annotated[str, typer.Option(help="Its layers, as in `0,5,-1` or `::3`.")] = "4,14,24",
    flex: Annotated[bool, typer.Option(help="FlexAttention too; compiles for seconds.")] = True,
) -> None:
    """Time the op against dense SDPA and compiled FlexAttention."""
    with user_errors():
        shapes = itertools.product(
            parse_lengths(lengths),
            split(groupings, HEADS),
            map(int, split(dims)),
            split(dtypes, SPEED_UP),
            map(int, split(blocks)),
            map(int, split(threads)),
            [RANDOM],
        )
        shares = split(densities)
        layer_plans = _layer_plans(model, real or [], parse_length(real_length), layers)
    of_layers = (
        (inside.q.shape[1], "GQA", inside.q.shape[2], dtype, block, int(count), name)
        for (name, block), (inside, _) in layer_plans.items()
        for dtype, count in itertools.product(split(dtypes), split(threads))
    )
    places = [dict(zip(AXES, x, strict=True)) for x in (*shapes, *of_layers)]

    def known(place: grid.Place) -> Given | None:
        return layer_plans.get((place["plans"], place["block"]))

    def complete(place: grid.Place, rows: list[Row]) -> bool:
        given = known(place)
        return any(set(given.plans if given else shares) <= set(row["density"]) for row in rows)

    def prepare(place: grid.Place) -> Callable[[int], list[Row]]:
        return _prepared(place, known(place) or _random(place, shares), flex)

    file = RowFile(output / "rows.jsonl", {})
    grid.fill(file, grid.missing(file.rows, places, range(rounds), complete), prepare)
    grid.publish(output, report(grid.of_places(file.rows, places)))


def _random(place: grid.Place, densities: Sequence[str]) -> Given:
    n = place["tokens"]
    heads, kv_heads = (HEADS if n < LONG else HEADS_LONG)[place["grouping"]]
    return Given(
        made(heads, kv_heads, n, place["dim"]),
        {d: plan_of_density(CPU, heads, n, place["block"], float(d)) for d in densities},
    )


def _layer_plans(
    model: str, specs: Sequence[str], tokens: int, layers: str
) -> dict[tuple[str, int], Given]:
    """What methods plan on a model, by model and layer, and by the plans' block."""
    methods = {spec: get_method(spec) for spec in specs}
    found: dict[tuple[str, int], Given] = {}
    for layer, inside in of_model(model, tokens, layers).items() if specs else ():
        for spec, method in methods.items():
            plan = method.for_layer(layer).plan(inside.q, inside.k, scale=inside.scale, q_offset=0)
            if plan is None:
                fail(f"--real {spec}: wants exact attention in layer {layer}")
            key = (f"{model}, layer {layer}", plan.block_q)
            found.setdefault(key, Given(inside, {})).plans[spec] = plan
    return found


def _prepared(place: grid.Place, given: Given, flex: bool) -> Callable[[int], list[Row]]:
    """Calls, compiled and warm; a round of them is one row."""
    dtype, (inside, plans) = getattr(torch, place["dtype"]), given
    q, k, v = (x.to(dtype) for x in (inside.q, inside.k, inside.v))
    torch.set_num_threads(place["threads"])
    square = torch.randn(2048, 2048).to(dtype)
    calls: dict[str, Call] = {
        "matmul": partial(torch.matmul, square, square),
        SDPA: dense(q, k, v, inside.scale),
    }
    # Compiled code holds the number of threads.
    torch.compiler.reset()
    compiled = partial(
        torch.compile(flex_attention, dynamic=False, fullgraph=True),
        *(q[None], k[None], v[None]),
        scale=inside.scale,
        enable_gqa=len(q) != len(k),
    )
    for name, plan in plans.items():
        calls[f"{OURS} {name}"] = partial(block_sparse_attention, q, k, v, plan, scale=inside.scale)
        mask = block_mask(plan, len(q)) if flex else None
        if mask is not None:
            calls[f"{FLEX} {name}"] = partial(compiled, block_mask=mask)
    for name, call in calls.items():
        if name != SDPA:
            call()  # warm up, compile
    heads, n, dim = q.shape
    about = {
        "density": {name: plan.density for name, plan in plans.items()},
        # Of dense causal attention: two products, half of each.
        "operations": heads * n * (n + 1) * (dim + v.shape[2]),
    }
    return lambda number: [{"seconds": in_turns(calls, number), **about}]


def _causal(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return row >= key


def block_mask(plan: BlockPlan, heads: int) -> BlockMask | None:
    """The plan for FlexAttention: all blocks full but each row's own; None for other plans."""
    if len(plan.runs) != 1 or plan.sink or plan.window or plan.key_order is not None:
        return None
    (run,) = plan.runs
    if run.width != plan.block_q or run.pool != 1 or plan.kv_len % run.width:
        return None
    start, count = (x.expand(heads, *x.shape[1:]) for x in run.expand(plan.heads))
    n = plan.n_q_blocks
    index = torch.zeros(heads, n, n, dtype=torch.int32)
    index[..., : min(n, start.shape[2])] = start[..., :n] // run.width
    own = torch.zeros_like(index)
    own[..., 0] = torch.arange(n)
    if bool((index.gather(2, count.long()[..., None] - 1)[..., 0] != own[..., 0]).any()):
        return None
    return BlockMask.from_kv_blocks(
        torch.ones_like(count)[None],
        own[None],
        (count - 1)[None],
        index[None],
        BLOCK_SIZE=run.width,
        mask_mod=_causal,
        seq_lengths=(plan.q_len, plan.kv_len),
    )


def cells(rows: Sequence[Row]) -> list[grid.Cell]:
    """All plans of all shapes, in the order of the rows."""
    return [
        _cell(place, plan, [row for row in mine if plan in row["density"]])
        for place, mine in grid.by_place(rows, AXES)
        for plan in mine[-1]["density"]
    ]


def _cell(place: grid.Place, plan: str, rows: list[Row]) -> grid.Cell:
    ours, density = f"{OURS} {plan}", rows[-1]["density"][plan]
    over_sdpa, matmul = grid.ratio(rows, SDPA, ours), grid.ratio(rows, "matmul", ours)
    assert over_sdpa is not None
    assert matmul is not None
    over_flex = grid.ratio(rows, f"{FLEX} {plan}", ours)
    missed = []
    if density <= TARGET_DENSITY:
        if over_sdpa.median < SPEED_UP[place["dtype"]] / density:
            missed.append("speed-up")
        if over_flex is not None and over_flex.median < OVER_FLEX[place["dtype"]]:
            missed.append("FlexAttention")
    return grid.Cell(
        place,
        "random" if place["plans"] == RANDOM else f"{place['plans']}: {plan}",
        statistics.median(row["seconds"][ours] for row in rows),
        over_sdpa,
        {
            "density": density,
            "over flex": over_flex and f"{over_flex.median:.2f}x",
            "of matmul": rows[-1]["operations"] * density / SQUARE * matmul.median,
        },
        tuple(missed),
    )


COLUMNS: list[grid.Column] = [
    ("tokens", "r", lambda cell: f"{cell.place['tokens']:,}"),
    ("heads", "l", lambda cell: cell.place["grouping"]),
    ("dim", "r", lambda cell: cell.place["dim"]),
    ("dtype", "l", lambda cell: cell.place["dtype"]),
    ("block", "r", lambda cell: cell.place["block"]),
    ("threads", "r", lambda cell: cell.place["threads"]),
    ("plan", "l", lambda cell: cell.name),
    ("density", "r", lambda cell: f"{cell.facts['density']:.3f}"),
    ("ours, s", "r", lambda cell: f"{cell.seconds:.3f}"),
    ("over SDPA (range)", "r", lambda cell: cell.ratio),
    ("x density", "r", lambda cell: f"{cell.ratio.median * cell.facts['density']:.2f}"),
    ("over FlexAttention", "r", lambda cell: cell.facts["over flex"] or ""),
    ("of GEMM rate", "r", lambda cell: f"{cell.facts['of matmul']:.0%}"),
    ("misses", "l", lambda cell: ", ".join(cell.missed)),
]


def report(rows: Sequence[Row]) -> str:
    """The table, cells that miss a target marked, and how many do."""
    found = cells(rows)
    aimed = [cell for cell in found if cell.facts["density"] <= TARGET_DENSITY]
    notes = (
        f"{grid.missed(aimed, name)} of {len(aimed)} cells up to 25 % density miss: {name}."
        for name in ("speed-up", "FlexAttention")
    )
    return grid.markdown(COLUMNS, found, *notes, grid.made_with(rows))


if __name__ == "__main__":
    typer.run(main)
