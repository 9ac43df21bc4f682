#!/usr/bin/env python
"""Density and recall of methods on a real model's q and k, beside what an oracle would need.

    python scripts/recall_table.py --length 8k --output results/recall_smollm2_8k

One dense prefill a prompt captures q and k of a sample of layers; every method then plans on them.
Density is kept / causal, recall the attention mass kept: exact, on a sample of query blocks. The
oracle knows the true mass of every block of 128 keys and takes the fewest that reach the same
recall on the same rows (see `study.oracle`). A layer where the method asks for exact
attention counts as density 1 and recall 1.

Writes `rows.jsonl` (a line per method, layer and prompt), `table.md` and `recall.png` into the
output folder. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from plots import legend_outside, plot, style
from sparse_patch_eval.ask.capture import Attention, capture
from sparse_patch_eval.ask.judge import judge, plan_of
from sparse_patch_eval.base.console import console, fail, progress, user_errors
from sparse_patch_eval.base.options import choose_layers, parse_layers, parse_length
from sparse_patch_eval.base.rows import Row, RowFile, describe_machines
from sparse_patch_eval.inputs.models import load
from sparse_patch_eval.inputs.text import long_text, passkey_prompt
from study.oracle import Oracle, oracle

import sparse_patch
from sparse_patch import Method
from sparse_patch.specs import parse_method

ORACLE = "oracle"
CURVE = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999)
"""Recalls at which the oracle's curve is drawn."""


def main(
    output: Annotated[Path, typer.Option(help="Folder for rows.jsonl, table.md, recall.png.")],
    length: Annotated[str, typer.Option(help="Prompt length in tokens.")] = "8k",
    method: Annotated[
        list[str] | None,
        typer.Option(help="`NAME:key=value,...`; may repeat. Default: all, and all presets."),
    ] = None,
    layers: Annotated[str, typer.Option(help="Layers, as in `0,5,-1` or `::3`.")] = "::3",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, with seeds from --seed on.")] = 2,
    rows: Annotated[int, typer.Option(min=1, help="Query rows judged per head, about.")] = 1024,
    model: Annotated[
        str, typer.Option(help="Hub id, local folder, .gguf file, or `smollm2`.")
    ] = "smollm2",
    text: Annotated[str, typer.Option(help="`kjv`, `stdlib`, `pydoc`, or a UTF-8 file.")] = "kjv",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the first prompt.")] = 0,
) -> None:
    """Measure density and recall of methods, and the oracle's density at that recall."""
    with user_errors():
        specs = list(dict.fromkeys(method or default_specs()))
        methods = {spec: parse_method(spec) for spec in specs}
        wanted, n_tokens, prose = parse_layers(layers), parse_length(length), long_text(text)
        lm, tokenizer = load(model, dtype=dtype, device=device, max_length=n_tokens)
        chosen = choose_layers(lm, wanted)
        prompt_ids = {
            s: passkey_prompt(tokenizer, n_tokens, text=prose, seed=s).input_ids.to(lm.device)
            for s in range(seed, seed + prompts)
        }
    setup = {"model": model, "dtype": dtype, "device": device, "text": text}
    file = RowFile(output / "rows.jsonl", {**setup, "length": n_tokens, "rows": rows})
    done = file.keys("method", "layer", "prompt")
    whole = ",".join(map(str, chosen))
    with progress() as bar:
        task = bar.add_task("plans", total=prompts * len(chosen) * len(methods))
        for s, ids in prompt_ids.items():
            todo = {n: [m for m in methods if (m, n, s) not in done] for n in chosen}
            n_todo = sum(map(len, todo.values()))
            bar.advance(task, len(chosen) * len(methods) - n_todo)
            if not n_todo and (ORACLE, whole, s) in done:
                continue
            bar.update(task, description=f"prompt {s}: dense prefill")
            inside = capture(lm, ids, chosen).layers
            best = []
            for layer, attention in inside.items():
                oracles = {128: oracle(attention, rows=rows)}
                best.append(oracles[128])
                for spec in todo[layer]:
                    bar.update(task, description=f"prompt {s}, layer {layer}: {spec}")
                    row = _measure(spec, methods[spec], layer, attention, oracles, rows)
                    file.add({"prompt": s, **row})
                    bar.advance(task)
            joined = Oracle.join(best)
            curve = [joined.density(recall) for recall in CURVE]
            file.add({"prompt": s, "method": ORACLE, "layer": whole, "curve": curve})
    known = {*chosen, whole}
    _report(
        [r for r in file.rows if r["prompt"] in prompt_ids and r["layer"] in known], specs, output
    )


def default_specs() -> list[str]:
    """Every method with its defaults and with each of its presets; not the dense control."""
    names = [name for name in sparse_patch.list_methods() if name != "dense"]
    presets = [
        f"{name}:preset={preset}"
        for name in names
        for preset in sparse_patch.describe(name).presets
    ]
    return sorted(names + presets)


def _measure(
    spec: str,
    method: Method,
    layer: int,
    attention: Attention,
    oracles: dict[int, Oracle],
    rows: int,
) -> Row:
    """A row of one method on one layer; `oracles` keeps those made, by rows per query block."""
    start = time.perf_counter()
    try:
        plan = plan_of(method, layer, attention)
    except ValueError as error:
        fail(f"--method {spec}: {error}")
    seconds = time.perf_counter() - start
    judged = judge(attention, plan, rows=rows)
    recall = float(np.mean(judged.recall))
    least = 1.0
    if plan is not None:
        if plan.block_q not in oracles:
            oracles[plan.block_q] = oracle(attention, block_q=plan.block_q, rows=rows)
        least = oracles[plan.block_q].density(recall)
    return {
        "method": spec,
        "layer": layer,
        "exact": plan is None,
        "plan_seconds": seconds,
        "density": 1.0 if plan is None else plan.density,
        "judged_density": judged.density,
        "recall": judged.recall,
        "oracle_density": least,
    }


def _report(rows: list[Row], specs: list[str], output: Path) -> None:
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    shown = {spec: by_method[spec] for spec in specs}
    table = _markdown(shown, describe_machines(rows), rows[0])
    (output / "table.md").write_text(table)
    console.print(table, markup=False)
    curve = np.mean([row["curve"] for row in by_method[ORACLE]], axis=0)
    title = f"{rows[0]['model']}, {rows[0]['length']:,} tokens of {rows[0]['text']}"
    plot(output / "recall.png", lambda axes: _draw(axes, shown, curve, title), size=(9, 5))


def _mean(rows: list[Row], what: str) -> float:
    return statistics.fmean(row[what] for row in rows)


def _heads(rows: list[Row]) -> list[float]:
    """Recall of every head of every layer and prompt."""
    return [head for row in rows for head in row["recall"]]


def _markdown(shown: Mapping[str, list[Row]], about: str, first: Row) -> str:
    lines = [
        "| method | plan, ms | density | recall | 5 % head | exact | oracle | times oracle |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for spec, rows in sorted(shown.items(), key=lambda item: _mean(item[1], "density")):
        seconds = statistics.median(row["plan_seconds"] for row in rows)
        least = _mean(rows, "oracle_density")
        lines.append(
            f"| {spec} | {1e3 * seconds:.1f} | {_mean(rows, 'density'):.3f} | "
            f"{statistics.fmean(_heads(rows)):.4f} | {np.quantile(_heads(rows), 0.05):.3f} | "
            f"{_mean(rows, 'exact'):.0%} | {least:.3f} | "
            f"{_mean(rows, 'judged_density') / least:.2f} |"
        )
    layers = sorted({row["layer"] for rows in shown.values() for row in rows})
    prompts = {row["prompt"] for rows in shown.values() for row in rows}
    foot = (
        f"{first['length']:,} tokens of {first['text']}, {len(prompts)} prompts, layers "
        f"{', '.join(map(str, layers))}. Density: kept / causal; recall: attention mass kept, on "
        f"about {first['rows']} query rows per head. 5 % head: that part of all heads keeps less. "
        "exact: share of layers where the method asked for exact attention, which count as "
        "density 1 and recall 1. Oracle: density of the fewest blocks of 128 keys that reach the "
        "same recall, layer by layer; times oracle: density of the method over that, on the same "
        "rows (below 1 where a method picks from finer pieces). plan: median time to choose for "
        f"one layer. {about}"
    )
    return "\n".join([*lines, "", foot]) + "\n"


def _draw(axes: Any, shown: Mapping[str, list[Row]], curve: Any, title: str) -> None:
    axes.plot(curve, CURVE, color="black", linewidth=1.5, label="oracle, blocks of 128")
    for number, (spec, rows) in enumerate(shown.items()):
        density, recall = _mean(rows, "judged_density"), statistics.fmean(_heads(rows))
        axes.plot([density], [recall], linestyle="none", label=spec, **style(number))
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("density: kept / causal, on the rows judged")
    axes.set_ylabel("recall: attention mass kept")
    axes.set_title(title)
    legend_outside(axes)


if __name__ == "__main__":
    typer.run(main)
