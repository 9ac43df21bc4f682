#!/usr/bin/env python
"""vLLM with and without the plug-in: time to the first token, and requests per second.

    python scripts/bench_serving.py --output results/serving

Needs an environment with vLLM (`constraints-vllm.txt`). Both engines live in one process and take
turns, in rotating order, each with prompts that it has not seen (prefix caching is off). Ratios are
vLLM alone / with the plug-in, medians over rounds. Writes `runs.json`, a row for every round with
the machine, and `table.md`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from check_serving import ALONE, Engine, Prompt
from sparse_patch_eval.base.console import console, user_errors
from sparse_patch_eval.base.machine import machine
from sparse_patch_eval.base.options import parse_lengths
from sparse_patch_eval.inputs.models import load_tokenizer, packaged
from sparse_patch_eval.inputs.text import long_text

from sparse_patch import Report, serving

FIRST_TOKEN, REQUESTS = "first token, s", "requests / s"


def main(
    output: Annotated[Path, typer.Option(help="Folder for runs.json and table.md.")],
    model: Annotated[str, typer.Option(help="Hub id, local folder, or `smollm2`.")] = "smollm2",
    method: Annotated[str, typer.Option(help="`NAME:key=value,...`")] = "strided:preset=fine",
    lengths: Annotated[str, typer.Option(help="Of prompts, tokens.")] = "2k,4k,8k",
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "float32",
    min_length: Annotated[int, typer.Option(help="Shorter prompts run exact, tokens.")] = 1024,
    chunk: Annotated[int, typer.Option(help="Tokens of a step at most; 0: a whole prompt.")] = 0,
    requests: Annotated[int, typer.Option(min=1, help="At once, for requests / s.")] = 4,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer there.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Of each length.")] = 5,
) -> None:
    """Time vLLM alone and with sparse_patch."""
    with user_errors():
        wanted = parse_lengths(lengths)
        tokenizer = load_tokenizer(model)
        tokens = tokenizer(long_text("kjv"))["input_ids"]
    name = str(packaged(model) or model)
    most = max(wanted) + answer
    options = {
        "dtype": dtype,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": chunk or most,
    }
    settings = {"method": method, "min_length": min_length}
    engines = {
        ALONE: Engine(name, None, most, **options),
        method: Engine(name, settings, most, **options),
    }
    rows: list[dict[str, Any]] = []
    for length in wanted:
        prompts = _prompts(tokens, length)
        for each in engines.values():  # once for whatever is compiled or allocated at first
            each.say([next(prompts)], of_prompts=False, tokens=1)
        for round_ in range(rounds):
            first, many = next(prompts), [next(prompts) for _ in range(requests)]
            order = list(engines)
            for engine in order[round_ % 2 :] + order[: round_ % 2]:
                seconds = _timed(engines[engine], [first], 1)
                rate = requests / _timed(engines[engine], many, answer)
                at = {"engine": engine, "length": length, "round": round_}
                rows.append({**at, FIRST_TOKEN: seconds, REQUESTS: rate})
    reports = serving.report(engines[method].llm)
    table = markdown(rows, method, reports[0])
    output.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine(),
        "setup": {"model": model, "chunk": chunk or most, "requests": requests, **settings},
        "rows": rows,
        "reports": [one.to_dict() for one in reports],
    }
    (output / "runs.json").write_text(json.dumps(content, indent=1) + "\n")
    (output / "table.md").write_text(table)
    console.print(table, markup=False)


def _prompts(tokens: Sequence[int], length: int) -> Iterator[Prompt]:
    """Prompts of that length, each from another place of a text that goes round."""
    start = 0
    while True:
        ids = [tokens[(start + i) % len(tokens)] for i in range(length)]
        yield {"prompt_token_ids": ids}
        start += length + 1


def _timed(engine: Engine, prompts: Sequence[Prompt], tokens: int) -> float:
    started = time.perf_counter()
    engine.say(prompts, of_prompts=False, tokens=tokens)
    return time.perf_counter() - started


def markdown(rows: Sequence[dict[str, Any]], method: str, report: Report) -> str:
    """Medians by length; ratios above 1 are in favour of the method."""
    lines = [
        f"| tokens | {FIRST_TOKEN}: alone | {method} | ratio "
        f"| {REQUESTS}: alone | {method} | ratio |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for length in dict.fromkeys(row["length"] for row in rows):
        cells = [str(length)]
        for what, smaller_is_better in ((FIRST_TOKEN, True), (REQUESTS, False)):
            alone, mine = (
                [row[what] for row in rows if row["length"] == length and row["engine"] == engine]
                for engine in (ALONE, method)
            )
            pairs = [
                (a / b if smaller_is_better else b / a) for a, b in zip(alone, mine, strict=True)
            ]
            cells += [f"{statistics.median(x):.3g}" for x in (alone, mine)]
            cells.append(f"{statistics.median(pairs):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    density = "-" if report.density is None else f"{report.density:.3f}"
    return "\n".join([*lines, "", f"density {density}, exact calls {report.exact}", ""])


if __name__ == "__main__":
    typer.run(main)
