#!/usr/bin/env python
"""Prefill speed: dense and sparse, interleaved in one process, on real prompts that never repeat.

    python scripts/bench_prefill.py --lengths 2k,4k,8k,16k --repeats 3 \\
        --method flexprefill:gamma=0.9 --output results/prefill_smollm2_float32

Every round draws a new prompt and runs dense and all methods on it, in rotating order, so that
drift of the machine hits all alike; the speed-up is the median of the rounds' ratios. Writes
`runs.jsonl` (a line per prefill, with machine, versions and git hash), `table.md` and
`speedup.png` into the output folder. A run that was stopped goes on where it was: rounds whose
lines are all there are not run again.

`--recall` also measures, in a prefill of its own that is not timed, which share of the attention
mass a method keeps, once for each length that the model was made for.

Targets: a speed-up of 2 in bfloat16 and 1.5 in float32 at 8k where recall is 0.95 or more, and
there a time below that of the best peer; in bfloat16 3.5 at 16k and 5 at 32k; 0.97 at 2k.

"Dense" is the unpatched model: PyTorch SDPA as Transformers calls it. `--peer` times other engines
on the same prompts, each in a process of its own that waits meanwhile; what they load is the .gguf
file of the model. `--peer-python` names a Python that has them:

    python -m venv peers && peers/bin/pip install openvino-genai xllamacpp
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peak import with_peak
from plots import plot
from prefill_peers import PEERS, Peer, gguf_of
from sparse_patch_eval.ask.prefill import prefill
from sparse_patch_eval.base.console import console, progress, user_errors
from sparse_patch_eval.base.options import parse_length, parse_lengths
from sparse_patch_eval.base.rows import RowFile, describe_machines
from sparse_patch_eval.inputs.models import load_for_lengths
from sparse_patch_eval.inputs.text import long_text, passkey_prompt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import sparse_patch
from sparse_patch import Method
from sparse_patch.specs import parse_method

DENSE = "dense SDPA"
WARM_UP_TOKENS = 1536
# Least speed-up, by dtype and tokens.
TARGETS = {
    ("bfloat16", 2048): 0.97,
    ("float32", 2048): 0.97,
    ("bfloat16", 8192): 2.0,
    ("float32", 8192): 1.5,
    ("bfloat16", 16384): 3.5,
    ("bfloat16", 32768): 5.0,
}
# Where recall counts, and a peer's time.
JUDGED, LEAST_RECALL = 8192, 0.95


@dataclass(frozen=True)
class Cell:
    """One line of the table: a method at a length, over all rounds.

    Attributes:
        rounds: how many.
        seconds: median time-to-first-token.
        speed_up: median of dense / method, paired by round; `low`, `high`: its range.
        density: kept / causal, mean; None if all calls were exact.
        recall: attention mass kept, mean over layers; None if not measured.
        exact: share of attention calls that ran exact.
        peak: the most memory, as a share of dense's in the same round, median; None if unknown.
        agrees: share of rounds with dense's next token.
    """

    length: int
    method: str
    rounds: int
    seconds: float
    speed_up: float
    low: float
    high: float
    density: float | None
    recall: float | None
    exact: float
    peak: float | None
    agrees: float


def main(
    output: Annotated[Path, typer.Option(help="Folder for runs.jsonl, table.md, speedup.png.")],
    model: Annotated[
        str, typer.Option(help="Hub id, local folder, .gguf file, or `smollm2`.")
    ] = "smollm2",
    method: Annotated[
        list[str] | None, typer.Option(help="`NAME:key=value,...`; may repeat.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "2k,4k,8k",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds per length.")] = 3,
    text: Annotated[str, typer.Option(help="`kjv`, `stdlib`, or a UTF-8 file.")] = "kjv",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Round r draws its prompt with seed + r.")] = 0,
    min_length: Annotated[
        str, typer.Option(help="Prompts of fewer tokens run exact; or `auto`, see `patch`.")
    ] = "1024",
    peer: Annotated[
        list[str] | None,
        typer.Option(help=f"Another engine, of {', '.join(PEERS)}; may repeat."),
    ] = None,
    peer_python: Annotated[str, typer.Option(help="Python that has the engines.")] = sys.executable,
    peer_longest: Annotated[
        str | None,
        typer.Option(help="Longest prompt for the engines, which stretch nothing. Default: all."),
    ] = None,
    recall: Annotated[
        int, typer.Option(min=0, help="Query rows to measure recall on, about; 0: do not.")
    ] = 0,
) -> None:
    """Measure time-to-first-token of dense and sparse prefill."""
    with user_errors():
        specs = method or ["flexprefill:gamma=0.9"]
        methods = {spec: parse_method(spec) for spec in specs}
        wanted = parse_lengths(lengths)
        prose = long_text(text)
        peers = peer or []
        if unknown := set(peers) - set(PEERS):
            raise ValueError(f"--peer {', '.join(unknown)}: choose of {', '.join(PEERS)}")
        least = min_length if min_length == "auto" else parse_length(min_length)
    setup = {"model": model, "dtype": dtype, "device": device, "text": text, "min_length": least}
    file = RowFile(output / "runs.jsonl", setup)
    with user_errors():
        longest = parse_length(peer_longest) if peer_longest else max(wanted)
    names = {n: [*specs, *(peers if n <= longest else [])] for n in wanted}
    todo = {
        n: [r for r in range(repeats) if not _complete(file.rows, n, seed + r, names[n])]
        for n in wanted
    }
    asked = [n for n in wanted if todo[n] and n <= longest]
    with contextlib.ExitStack() as stack, user_errors():
        engines = _start(
            stack, peers if asked else [], peer_python, setup, max([*asked, WARM_UP_TOKENS])
        )
        bar = stack.enter_context(progress())
        task = bar.add_task(
            "prefills", total=sum((1 + len(names[n])) * len(todo[n]) for n in wanted)
        )
        for row in _measure(todo, names, methods, engines, prose, seed, setup, recall):
            file.add(row)
            bar.advance(task)
    cells = [cell for length in wanted for cell in _cells(file.rows, length, names[length])]
    table = _markdown(cells, dtype, text, describe_machines(file.rows))
    (output / "table.md").write_text(table)
    console.print(table, markup=False)
    plot(output / "speedup.png", lambda axes: _draw(axes, cells, model, dtype))


def _start(
    stack: contextlib.ExitStack,
    names: Sequence[str],
    python: str,
    setup: Mapping[str, Any],
    longest: int,
) -> dict[str, Peer]:
    """Engines by name, which end with the stack."""
    if not names:
        return {}
    if setup["device"] != "cpu":
        raise ValueError(f"--peer with --device {setup['device']}: the engines run on the CPU")
    gguf = stack.enter_context(gguf_of(setup["model"]))
    options = {"dtype": setup["dtype"], "threads": torch.get_num_threads(), "longest": longest}
    return {name: stack.enter_context(Peer(name, python, gguf, **options)) for name in names}


def _measure(
    todo: dict[int, list[int]],
    names: Mapping[int, list[str]],
    methods: dict[str, Method],
    engines: Mapping[str, Peer],
    prose: str,
    seed: int,
    setup: dict[str, Any],
    recall_rows: int,
) -> Iterator[dict[str, Any]]:
    """Run the rounds `todo[length]` of dense and `names[length]`; yield a row per prefill."""
    lengths = [length for length, rounds in todo.items() if rounds]
    warmed = None
    for length, model, tokenizer in _models(setup, lengths):
        if warmed is not model:
            warm = passkey_prompt(tokenizer, WARM_UP_TOKENS, text=prose, seed=seed - 1).input_ids
            for variant in (None, *methods.values()):
                _timed(model, warm.to(model.device), variant, setup)
            for engine in engines.values():
                engine.prefill(warm[0].tolist())
            warmed = model
        for round_ in todo[length]:
            prompt = passkey_prompt(tokenizer, length, text=prose, seed=seed + round_).input_ids
            for name in rotated([DENSE, *names[length]], round_):
                if name in engines:
                    measured = _asked(engines[name], prompt[0].tolist())
                else:
                    measured = _timed(model, prompt.to(model.device), methods.get(name), setup)
                if isinstance(measured["token"], int):  # engines may answer in text
                    measured["token"] = tokenizer.decode([measured["token"]])
                if recall_rows and name in methods and round_ == 0 and not _is_stretched(model):
                    measured["recall"] = _recall(model, prompt, methods[name], setup, recall_rows)
                yield {"length": length, "seed": seed + round_, "method": name, **measured}


def _models(
    setup: dict[str, Any], lengths: list[int]
) -> Iterator[tuple[int, PreTrainedModel, PreTrainedTokenizerBase]]:
    with user_errors():
        yield from load_for_lengths(
            setup["model"], lengths, dtype=setup["dtype"], device=setup["device"]
        )


def _asked(engine: Peer, ids: list[int]) -> dict[str, Any]:
    return {**engine.prefill(ids), "version": engine.version, "density": None, "calls": None}


def _timed(
    model: PreTrainedModel, ids: Any, method: Method | None, setup: Mapping[str, Any]
) -> dict[str, Any]:
    if method is None:
        return {**_prefilled(model, ids), "density": None, "calls": None}
    with sparse_patch.patch(model, method, min_length=setup["min_length"]) as handle:
        measured = _prefilled(model, ids)
        report = handle.report()
    calls = {"sparse": report.sparse_calls, "exact": report.exact}
    return {**measured, "density": report.density, "calls": calls}


def _is_stretched(model: PreTrainedModel) -> bool:
    """Are the model's rotary frequencies changed for longer prompts? Then its attention is, too."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return "original_max_position_embeddings" in rope.get("full_attention", rope)


def _recall(
    model: PreTrainedModel, ids: Any, method: Method, setup: Mapping[str, Any], rows: int
) -> float | None:
    options = {"min_length": setup["min_length"], "measure_recall": rows}
    with sparse_patch.patch(model, method, **options) as handle:
        prefill(model, ids.to(model.device))
        return handle.report().recall


def _prefilled(model: PreTrainedModel, ids: Any) -> dict[str, Any]:
    done, peak = with_peak(lambda: prefill(model, ids), model.device)
    return {"seconds": done.seconds, "token": int(done.logits.argmax()), "peak": peak}


def _complete(rows: list[dict[str, Any]], length: int, seed: int, specs: list[str]) -> bool:
    done = {row["method"] for row in rows if (row["length"], row["seed"]) == (length, seed)}
    return {DENSE, *specs} <= done


def rotated(names: list[str], by: int) -> list[str]:
    """So that what comes first in one round does not in the next."""
    by %= len(names)
    return names[by:] + names[:by]


def _cells(rows: list[dict[str, Any]], length: int, specs: list[str]) -> list[Cell]:
    # A later row of the same seed replaces an earlier one: a round that was cut short is run anew.
    latest = {(r["method"], r["seed"]): r for r in rows if r["length"] == length}
    dense = {seed: row for (name, seed), row in latest.items() if name == DENSE}
    cells = []
    for name in (DENSE, *specs):
        runs = [row for (n, seed), row in latest.items() if n == name and seed in dense]
        ratios = [dense[row["seed"]]["seconds"] / row["seconds"] for row in runs]
        peaks = [r["peak"] / dense[r["seed"]]["peak"] for r in runs if r.get("peak")]
        same = [row.get("token") == dense[row["seed"]].get("token") for row in runs]
        recalls = [row["recall"] for row in runs if row.get("recall") is not None]
        densities = [row["density"] for row in runs if row["density"] is not None]
        exact = [sum(r["calls"]["exact"].values()) for r in runs if r["calls"]]
        sparse = [r["calls"]["sparse"] for r in runs if r["calls"]]
        cells.append(
            Cell(
                length=length,
                method=name,
                rounds=len(runs),
                seconds=statistics.median(row["seconds"] for row in runs),
                speed_up=statistics.median(ratios),
                low=min(ratios),
                high=max(ratios),
                density=statistics.mean(densities) if densities else None,
                recall=statistics.mean(recalls) if recalls else None,
                exact=sum(exact) / max(1, sum(exact) + sum(sparse)),
                peak=statistics.median(peaks) if peaks else None,
                agrees=statistics.mean(same),
            )
        )
    return cells


def misses(cell: Cell, cells: Sequence[Cell], dtype: str) -> str:
    """What of the targets (see above) a method's cell misses, in words; "" if nothing."""
    if cell.method == DENSE or cell.method in PEERS:
        return ""
    missed = []
    wanted = TARGETS.get((dtype, cell.length), 0.0)
    if cell.length == JUDGED and (cell.recall or 0.0) < LEAST_RECALL:
        wanted = 0.0  # the target is for those that keep enough
    if cell.speed_up < wanted:
        missed.append(f"{wanted:g}x")
    peers = [c.seconds for c in cells if c.method in PEERS and c.length == cell.length]
    if cell.length == JUDGED and peers and cell.seconds >= min(peers):
        missed.append("best peer")
    return ", ".join(missed)


def _markdown(cells: list[Cell], dtype: str, text: str, about: str) -> str:
    lines = [
        "| tokens | method | time-to-first-token, s | speed-up (range) | density | recall "
        "| exact calls | peak memory | same next token | misses |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for cell in cells:
        ratio = f"{cell.speed_up:.2f}x ({cell.low:.2f}-{cell.high:.2f})"
        density, recall = (
            "" if share is None else f"{share:.3f}" for share in (cell.density, cell.recall)
        )
        is_dense, is_peer = cell.method == DENSE, cell.method in PEERS
        peak = "" if cell.peak is None else f"{cell.peak:.3f}x"
        lines.append(
            f"| {cell.length:,} | {cell.method} | {cell.seconds:.2f} | "
            f"{'1' if is_dense else ratio} | {density} | {recall} | "
            f"{'' if is_dense or is_peer else format(cell.exact, '.0%')} | {peak} "
            f"| {'' if is_dense else format(cell.agrees, '.0%')} "
            f"| {misses(cell, cells, dtype)} |"
        )
    lines += [
        "",
        f"Medians of {min(cell.rounds for cell in cells)} or more rounds, interleaved, each on a "
        f"prompt of its own ({text}). {about}",
    ]
    return "\n".join(lines) + "\n"


def _draw(axes: Any, cells: list[Cell], model: str, dtype: str) -> None:
    """Speed-up against length, with the range over rounds; a ring where a target is missed."""
    for name in dict.fromkeys(cell.method for cell in cells if cell.method != DENSE):
        mine = [cell for cell in cells if cell.method == name]
        x = [cell.length for cell in mine]
        style = "--" if name in PEERS else "-"
        axes.plot(x, [cell.speed_up for cell in mine], style, marker="o", label=name)
        axes.fill_between(x, [c.low for c in mine], [c.high for c in mine], alpha=0.15)
    missed = [cell for cell in cells if misses(cell, cells, dtype)]
    if missed:
        at = [c.length for c in missed], [c.speed_up for c in missed]
        ring = {"s": 140, "facecolors": "none", "edgecolors": "red", "zorder": 3}
        axes.scatter(*at, **ring, label="misses a target")
    axes.axhline(1, color="gray", linestyle="--", linewidth=1, label=DENSE)
    axes.set_xscale("log", base=2)
    ticks = sorted({cell.length for cell in cells})
    axes.set_xticks(
        ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else str(tick) for tick in ticks]
    )
    axes.set_ylim(0, 1.1 * math.ceil(max(cell.high for cell in cells)))
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("dense time / sparse time")
    axes.set_title(f"Time-to-first-token speed-up: {model}, {dtype}")
    axes.legend()


if __name__ == "__main__":
    typer.run(main)
