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
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu_checks.device import Device
from gpu_checks.inputs import keys, plan_of_density, queries
from sparse_patch_eval.ask.capture import capture
from sparse_patch_eval.base.console import console, fail, progress, user_errors
from sparse_patch_eval.base.options import choose_layers, parse_layers, parse_length, parse_lengths
from sparse_patch_eval.base.rows import Row, RowFile
from sparse_patch_eval.inputs.models import load
from sparse_patch_eval.inputs.text import long_text, passkey_prompt
from sparse_patch_kernels import BlockPlan, block_sparse_attention
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from sparse_patch.specs import parse_method

SDPA, OURS, FLEX = "SDPA", "ours", "FlexAttention"
# By length: query and KV heads of the two groupings, so few that a dense call takes seconds.
HEADS = {"MHA": (4, 4), "GQA": (6, 2)}
HEADS_LONG = {"MHA": (2, 2), "GQA": (3, 1)}
LONG = 16384
# A timing is the mean of so many calls that it takes this long.
LEAST_SECONDS = 0.2
SPEED_UP = {"float32": 0.85, "bfloat16": 1.2}
OVER_FLEX = {"float32": 1.0, "bfloat16": 2.0}
TARGET_DENSITY = 0.255
# Floating point operations of the product of two squares of 2,048.
SQUARE = 2 * 2048**3


@dataclass(frozen=True)
class Shape:
    """What is timed together. plans: "random", or a model with its layer and a method."""

    tokens: int
    grouping: str
    dim: int
    dtype: str
    block: int
    threads: int
    plans: str

    def heads(self) -> tuple[int, int]:
        """Query heads and KV heads of the random shapes."""
        return (HEADS if self.tokens < LONG else HEADS_LONG)[self.grouping]


@dataclass(frozen=True)
class Inputs:
    """q `[heads, tokens, dim]`, k and v `[kv_heads, tokens, dim]`, and plans by name."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    plans: dict[str, BlockPlan]


def main(
    output: Annotated[Path, typer.Option(help="Folder for rows.jsonl and table.md.")],
    lengths: Annotated[str, typer.Option(help="Tokens of the random plans.")] = "8k,32k",
    densities: Annotated[str, typer.Option(help="Of the random plans.")] = "0.05,0.1,0.15,0.25,0.5",
    dims: Annotated[str, typer.Option(help="Head dimensions.")] = "64,128",
    groupings: Annotated[str, typer.Option(help="`MHA`, `GQA`.")] = "MHA,GQA",
    dtypes: Annotated[str, typer.Option(help="`float32`, `bfloat16`.")] = "float32,bfloat16",
    blocks: Annotated[str, typer.Option(help="Tokens of a block.")] = "64,128",
    threads: Annotated[str, typer.Option(help="Of PyTorch.")] = "1,2",
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
        of_random = [
            Shape(n, grouping, int(dim), dtype, int(block), int(count), "random")
            for n, grouping, dim, dtype, block, count in itertools.product(
                parse_lengths(lengths),
                split(groupings, HEADS),
                split(dims),
                split(dtypes, SPEED_UP),
                split(blocks),
                split(threads),
            )
        ]
        shares = split(densities)
        captured = _captured(model, real or [], parse_length(real_length), parse_layers(layers))
    of_real = [
        Shape(given.q.shape[1], "GQA", given.q.shape[2], dtype, block, int(count), name)
        for (name, block), given in captured.items()
        for dtype, count in itertools.product(split(dtypes), split(threads))
    ]
    file = RowFile(output / "rows.jsonl", {})
    shapes = [*of_random, *of_real]
    with progress() as bar:
        task = bar.add_task("shapes", total=len(shapes))
        for shape in shapes:
            bar.update(task, description=_name(shape))
            given = captured.get((shape.plans, shape.block))
            plans = set(given.plans if given else shares)
            done = {r["round"] for r in file.rows if _of(r, shape) and plans <= set(r["density"])}
            todo = [n for n in range(rounds) if n not in done]
            if todo:
                for row in _timed(shape, given or _random(shape, shares), todo, flex):
                    file.add(row)
            bar.advance(task)
    table = markdown([row for row in file.rows if any(_of(row, shape) for shape in shapes)])
    (output / "table.md").write_text(table)
    console.print(table, markup=False)


def split(text: str, known: Any = None) -> list[str]:
    """The parts of a list with commas.

    Raises:
        ValueError: a part is none of `known`.
    """
    parts = [part.strip() for part in text.split(",")]
    if known is not None and (unknown := sorted(set(parts) - set(known))):
        raise ValueError(f"{', '.join(unknown)}: choose of {', '.join(known)}")
    return parts


def _name(shape: Shape) -> str:
    return ", ".join(map(str, asdict(shape).values()))


def _of(row: Row, shape: Shape) -> bool:
    return all(row[key] == value for key, value in asdict(shape).items())


def _random(shape: Shape, densities: Sequence[str]) -> Inputs:
    cpu, (heads, kv_heads), n = Device(on_gpu=False), shape.heads(), shape.tokens
    return Inputs(
        queries(cpu, heads, n, shape.dim, end=n, seed=0),
        keys(cpu, kv_heads, n, shape.dim, seed=1),
        cpu.randn(kv_heads, n, shape.dim, seed=2),
        shape.dim**-0.5,
        {d: plan_of_density(cpu, heads, n, shape.block, float(d)) for d in densities},
    )


def _captured(
    model: str, specs: Sequence[str], tokens: int, layers: slice | tuple[int, ...]
) -> dict[tuple[str, int], Inputs]:
    """Inputs by model and layer, and by the plans' block, from one dense prefill."""
    if not specs:
        return {}
    methods = {spec: parse_method(spec) for spec in specs}
    lm, tokenizer = load(model, dtype="float32", device="cpu", max_length=tokens)
    prompt = passkey_prompt(tokenizer, tokens, text=long_text("kjv"), seed=0).input_ids
    found: dict[tuple[str, int], Inputs] = {}
    for layer, inside in capture(lm, prompt, choose_layers(lm, layers)).layers.items():
        for spec, method in methods.items():
            q, k = inside.q, inside.k
            plan = method.for_layer(layer).plan(q, k, scale=inside.scale, q_offset=0)
            if plan is None:
                fail(f"--real {spec}: wants exact attention in layer {layer}")
            name = (f"{model}, layer {layer}", plan.block_q)
            new = found.setdefault(name, Inputs(q, k, inside.v, inside.scale, {}))
            new.plans[spec] = plan
    return found


def _timed(shape: Shape, given: Inputs, rounds: Sequence[int], flex: bool) -> Iterator[Row]:
    """A row per round, with the seconds of all calls."""
    dtype = getattr(torch, shape.dtype)
    q, k, v = (x.to(dtype) for x in (given.q, given.k, given.v))
    torch.set_num_threads(shape.threads)
    square = torch.randn(2048, 2048).to(dtype)
    calls: dict[str, Callable[[], Any]] = {
        "matmul": lambda: square @ square,
        SDPA: dense(q, k, v, given.scale),
    }
    # Compiled code holds the number of threads.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    for name, plan in given.plans.items():
        calls[f"{OURS} {name}"] = _ours(q, k, v, plan, given.scale)
        mask = block_mask(plan, len(q)) if flex else None
        if mask is not None:
            calls[f"{FLEX} {name}"] = _flex(compiled, q, k, v, mask, given.scale)
    for name, call in calls.items():
        if name != SDPA:
            call()  # warm up, compile
    names = list(calls)
    for round_ in rounds:
        turn = round_ % len(names)
        order = names[turn:] + names[:turn]
        yield {
            **asdict(shape),
            "round": round_,
            "seconds": {name: seconds_of(calls[name]) for name in order},
            "density": {name: plan.density for name, plan in given.plans.items()},
            "operations": _operations(q, v),
        }


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], Any]:
    """A call of causal SDPA."""
    return lambda: scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True
    )


def _ours(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> Callable[[], Any]:
    return lambda: block_sparse_attention(q, k, v, plan, scale=scale)


def _flex(
    compiled: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
) -> Callable[[], Any]:
    return lambda: compiled(
        q[None], k[None], v[None], block_mask=mask, scale=scale, enable_gqa=len(q) != len(k)
    )


def seconds_of(call: Callable[[], Any]) -> float:
    """Of one call, the mean over as many as take LEAST_SECONDS."""
    start, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - start < LEAST_SECONDS:
        call()
        done += 1
    return (time.perf_counter() - start) / done


def _operations(q: Tensor, v: Tensor) -> float:
    """Floating point operations of dense causal attention: two products, half of each."""
    heads, n, dim = q.shape
    return heads * n * (n + 1) * (dim + v.shape[2])


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


@dataclass(frozen=True)
class Cell:
    """A plan of a shape: medians over rounds of paired ratios."""

    shape: Shape
    plan: str
    density: float
    seconds: float
    speed_up: float
    low: float
    high: float
    over_flex: float | None
    of_matmul: float

    @property
    def missed(self) -> list[str]:
        """Targets that this cell misses; none above their density."""
        if self.density > TARGET_DENSITY:
            return []
        found = []
        if self.speed_up < SPEED_UP[self.shape.dtype] / self.density:
            found.append("speed-up")
        if self.over_flex is not None and self.over_flex < OVER_FLEX[self.shape.dtype]:
            found.append("FlexAttention")
        return found


def cells(rows: Sequence[Row]) -> list[Cell]:
    """All plans of all shapes, in the order of the rows."""
    fields = list(Shape.__dataclass_fields__)
    shapes = dict.fromkeys(Shape(**{key: row[key] for key in fields}) for row in rows)
    found = []
    for shape in shapes:
        mine = [row for row in rows if _of(row, shape)]
        for plan in mine[-1]["density"]:
            mine_too = [row for row in mine if plan in row["density"]]
            ours = [row["seconds"][f"{OURS} {plan}"] for row in mine_too]
            over_sdpa = [row["seconds"][SDPA] / x for row, x in zip(mine_too, ours, strict=True)]
            flex = [
                row["seconds"][f"{FLEX} {plan}"] / x
                for row, x in zip(mine_too, ours, strict=True)
                if f"{FLEX} {plan}" in row["seconds"]
            ]
            rates = [
                row["operations"] * row["density"][plan] / x / SQUARE * row["seconds"]["matmul"]
                for row, x in zip(mine_too, ours, strict=True)
            ]
            found.append(
                Cell(
                    shape,
                    plan,
                    mine_too[-1]["density"][plan],
                    statistics.median(ours),
                    statistics.median(over_sdpa),
                    min(over_sdpa),
                    max(over_sdpa),
                    statistics.median(flex) if flex else None,
                    statistics.median(rates),
                )
            )
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The table, cells that miss a target marked, and how many do."""
    about = rows[-1]["machine"]
    lines = [
        "| tokens | heads | dim | dtype | block | threads | plan | density | ours, s "
        "| over SDPA (range) | x density | over FlexAttention | of GEMM rate | misses |",
        "|---:|---|---:|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    found = cells(rows)
    for cell in found:
        shape = cell.shape
        plan = "random" if shape.plans == "random" else f"{shape.plans}: {cell.plan}"
        flex = "" if cell.over_flex is None else f"{cell.over_flex:.2f}x"
        lines.append(
            f"| {shape.tokens:,} | {shape.grouping} | {shape.dim} | {shape.dtype} | {shape.block} "
            f"| {shape.threads} | {plan} | {cell.density:.3f} | {cell.seconds:.3f} "
            f"| {cell.speed_up:.2f}x ({cell.low:.2f}-{cell.high:.2f}) "
            f"| {cell.speed_up * cell.density:.2f} | {flex} | {cell.of_matmul:.0%} "
            f"| {', '.join(cell.missed)} |"
        )
    aimed = [cell for cell in found if cell.density <= TARGET_DENSITY]
    for name in ("speed-up", "FlexAttention"):
        missed = sum(name in cell.missed for cell in aimed)
        lines.append(f"\n{missed} of {len(aimed)} cells up to 25 % density miss: {name}.")
    lines.append(
        f"\n{about['device']}, {about['cpu_capability']}, torch {about['torch']}, commit "
        f"{', '.join(dict.fromkeys(str(row['machine']['git']) for row in rows))}."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
