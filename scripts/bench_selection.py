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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench import grid, options
from bench.calls import SDPA, Call, dense, in_turns, made, of_model, split
from sparse_patch_eval.ask.capture import Attention
from sparse_patch_eval.base.console import user_errors
from sparse_patch_eval.base.options import parse_length, parse_lengths
from sparse_patch_eval.base.rows import Row, RowFile

import sparse_patch

# What is timed together; inputs: "made", or a model with its layer.
AXES = ("tokens", "heads", "kv_heads", "dim", "dtype", "threads", "inputs")
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


def main(
    output: Annotated[Path, typer.Option(help="Folder for rows.jsonl and table.md.")],
    lengths: Annotated[str, typer.Option(help="Tokens.")] = "2k,8k,32k",
    shapes: Annotated[str, typer.Option(help="Heads/KV heads/dim.")] = "9/3/64,8/2/128",
    dtypes: options.Dtypes = "float32,bfloat16",
    threads: options.Threads = "1",
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
        heads = [_heads(shape) for shape in split(shapes)]
        settings = list(
            itertools.product(split(dtypes, ("float32", "bfloat16")), map(int, split(threads)))
        )
        tokens = parse_lengths(lengths)
        of_layers = of_model(model, parse_length(real_length), layers) if layers else {}
    inside = {f"{model}, layer {layer}": (layer, given) for layer, given in of_layers.items()}
    values = [
        *((n, *shape, *setting, MADE) for n in tokens for shape in heads for setting in settings),
        *(
            (x.q.shape[1], len(x.q), len(x.k), x.q.shape[2], *setting, name)
            for name, (_, x) in inside.items()
            for setting in settings
        ),
    ]
    places = [dict(zip(AXES, x, strict=True)) for x in values]

    def complete(place: grid.Place, rows: list[Row]) -> bool:
        return any(set(names) <= set(row["options"]) for row in rows)

    def prepare(place: grid.Place) -> Callable[[int], list[Row]]:
        if place["inputs"] in inside:
            return _prepared(place, *inside[place["inputs"]], names)
        sizes = (place[axis] for axis in ("heads", "kv_heads", "tokens", "dim"))
        return _prepared(place, None, made(*sizes), names)

    file = RowFile(output / "rows.jsonl", {})
    grid.fill(file, grid.missing(file.rows, places, range(rounds), complete), prepare)
    grid.publish(output, report(grid.of_places(file.rows, places)))


def _heads(shape: str) -> tuple[int, int, int]:
    heads, kv_heads, dim = map(int, shape.split("/"))
    return heads, kv_heads, dim


def _prepared(
    place: grid.Place, layer: int | None, inside: Attention, names: Sequence[str]
) -> Callable[[int], list[Row]]:
    """A round is one row; seconds of a method are those of its plan and of the plan's density.

    Methods that keep everything, whatever is tried, have options and no seconds.
    """
    torch.set_num_threads(place["threads"])
    dtype, scale = getattr(torch, place["dtype"]), inside.scale
    q, k, v = (x.to(dtype) for x in (inside.q, inside.k, inside.v))
    calls: dict[str, Call] = {SDPA: dense(q, k, v, scale)}
    density, parameters = {}, {}
    for name in names:
        for tried in ({}, *SMALLER.get(name, ())):
            method = sparse_patch.get_method(name, **tried)
            method = method if layer is None else method.for_layer(layer)
            choose = partial(method.plan, q, k, scale=scale, q_offset=0)
            plan = choose()
            parameters[name] = tried
            if plan is not None:
                calls[f"plan {name}"] = choose
                calls[f"density {name}"] = partial(getattr, plan, "density")
                density[name] = plan.density
                break
    about = {"density": density, "options": parameters}
    return lambda number: [{"seconds": in_turns(calls, number), **about}]


def cells(rows: Sequence[Row]) -> list[grid.Cell]:
    """All methods of all shapes, in the order of the rows; those that choose nothing left out.

    HiP at 32k has a growth, too: how many times as long as at 8k it takes.
    """
    found = [
        _cell(place, name, [row for row in mine if name in row["density"]])
        for place, mine in grid.by_place(rows, AXES)
        for name in dict.fromkeys(name for row in mine for name in row["density"])
    ]
    short = [cell for cell in found if cell.name == "hip" and cell.place["tokens"] == SHORT]
    for n, cell in enumerate(found):
        like = [x for x in short if {**cell.place, "tokens": SHORT} == x.place]
        if like and cell.name == "hip" and cell.place["tokens"] == LONG:
            growth = cell.seconds / like[0].seconds
            late = ("growth",) if growth > GROWTH else ()
            facts = {**cell.facts, "growth": f", {growth:.1f}x of 8k"}
            found[n] = replace(cell, facts=facts, missed=(*cell.missed, *late))
    return found


def _cell(place: grid.Place, name: str, rows: list[Row]) -> grid.Cell:
    plan, counting = ([row["seconds"][f"{x} {name}"] for row in rows] for x in ("plan", "density"))
    both = [a + b for a, b in zip(plan, counting, strict=True)]
    share = grid.Spread.of([x / row["seconds"][SDPA] for x, row in zip(both, rows, strict=True)])
    most = next((most for n, most in SHARES.items() if place["tokens"] >= n), None)
    facts = {
        "density": rows[-1]["density"][name],
        "options": ", ".join(f"{key}={x}" for key, x in rows[-1]["options"][name].items()),
        "plan": statistics.median(plan),
        "counting": statistics.median(counting),
        "growth": "",
    }
    missed = ("share",) if most is not None and share.median > most else ()
    return grid.Cell(place, name, statistics.median(both), share, facts, missed)


def _share(cell: grid.Cell) -> str:
    share = cell.ratio
    return f"{share.median:.1%} ({share.low:.1%}-{share.high:.1%}{cell.facts['growth']})"


def _method(cell: grid.Cell) -> str:
    parameters = cell.facts["options"]
    return cell.name + (parameters and f" ({parameters})")


COLUMNS: list[grid.Column] = [
    ("tokens", "r", lambda cell: f"{cell.place['tokens']:,}"),
    ("heads", "l", lambda cell: f"{cell.place['heads']}/{cell.place['kv_heads']}"),
    ("dim", "r", lambda cell: cell.place["dim"]),
    ("dtype", "l", lambda cell: cell.place["dtype"]),
    ("threads", "r", lambda cell: cell.place["threads"]),
    ("inputs", "l", lambda cell: cell.place["inputs"]),
    ("method", "l", _method),
    ("keeps", "r", lambda cell: f"{cell.facts['density']:.3f}"),
    ("plan, ms", "r", lambda cell: f"{cell.facts['plan'] * 1e3:.1f}"),
    ("density, ms", "r", lambda cell: f"{cell.facts['counting'] * 1e3:.1f}"),
    ("of dense (range)", "r", _share),
    ("misses", "l", lambda cell: ", ".join(cell.missed)),
]


def report(rows: Sequence[Row]) -> str:
    """The table, cells that miss a target marked, and how many do."""
    found = cells(rows)
    aimed = [cell for cell in found if cell.place["tokens"] >= min(SHARES)]
    note = f"{grid.missed(aimed, 'share')} of {len(aimed)} cells from 8k on miss their share."
    return grid.markdown(COLUMNS, found, note, grid.made_with(rows))


if __name__ == "__main__":
    typer.run(main)
