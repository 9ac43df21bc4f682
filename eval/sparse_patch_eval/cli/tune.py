"""`sparse-patch tune`: text and a target in, a profile and a report of what it holds out."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_patch_eval.base.console import console, progress, user_errors, visible

if TYPE_CHECKING:  # seconds of import, which `--help` can do without
    from torch import Tensor
    from transformers import PreTrainedModel

    from sparse_patch import Profile
    from sparse_patch_eval.base.rows import RowFile
    from sparse_patch_eval.tuning.choice import Candidate, Measured

METHODS = ["strided", "xattention", "proxyattn", "flexprefill"]
# Last positions whose distributions a KL is the mean of.
_KL_TOKENS = 64
_SPEED_ROUNDS = 3
# Heads that a report names.
_WORST = 5


@dataclass(frozen=True)
class Held:
    """A choice on prompts: what it was made on, or others.

    Attributes:
        density, recall: means over layers and heads.
        kl: KL(dense || sparse) of the next token, nats, mean over positions and prompts.
        singles: density at which one setting of a method for all heads has the same recall; None
            where none has.
    """

    density: float
    recall: float
    kl: float
    singles: dict[str, float | None]


def tune(
    output: Annotated[
        Path, typer.Option(help="Folder for profile.json, tune.md and measured.jsonl.")
    ],
    target: Annotated[
        str, typer.Option(help="`recall=0.95` at least, `kl=0.01` at most, `speedup=2` at least.")
    ] = "recall=0.95",
    model: Annotated[
        str, typer.Option(help="Hub id, folder, .gguf file, or `smollm2`, `gemma3-270m` (PyPI).")
    ] = "smollm2",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="`NAME:key=value,...`, whose knob is turned; may repeat. Default: "
            + ", ".join(METHODS)
        ),
    ] = None,
    length: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "4k",
    text: Annotated[str, typer.Option(help="`kjv`, `stdlib`, `pydoc`, or a UTF-8 file.")] = "kjv",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to tune on.")] = 2,
    held_out_text: Annotated[
        str | None, typer.Option(help="Text of the prompts that confirm it. Default: --text.")
    ] = None,
    held_out: Annotated[int, typer.Option(min=1, help="Prompts that confirm it.")] = 2,
    steps: Annotated[int, typer.Option(min=2, help="Settings of each method.")] = 8,
    most_methods: Annotated[
        int, typer.Option(min=1, help="Methods in one layer: each has to choose there.")
    ] = 2,
    rows: Annotated[int, typer.Option(min=1, help="Query rows judged per head, about.")] = 256,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the first prompt.")] = 0,
) -> None:
    """Find which method each head should run to meet a target, and write a profile of it.

    Measures every setting of every method on every head, chooses for each head what keeps least at
    a common price of lost attention, and turns the price until the target is met. Prompts that it
    has not seen then tell whether it holds. `sparse_patch.patch(model, profile=...)` loads the
    profile. On the CPU; a run that was stopped goes on where it was.
    """
    with user_errors():
        import torch

        import sparse_patch
        from sparse_patch.profiles import shape_of
        from sparse_patch_eval.ask.kl import kl_rows
        from sparse_patch_eval.base.machine import machine
        from sparse_patch_eval.base.options import parse_length, split_method
        from sparse_patch_eval.base.rows import RowFile
        from sparse_patch_eval.inputs.models import check_context, load
        from sparse_patch_eval.inputs.text import long_text, passkey_prompt
        from sparse_patch_eval.tuning.choice import candidates, choose_until, profile_of

        kind, aim = _target(target)
        tokens = parse_length(length)
        some = candidates(dict(split_method(spec) for spec in method or METHODS), steps)
        texts = [text] * prompts + [held_out_text or text] * held_out
        prose = {text: long_text(text)}
        if held_out_text:
            prose[held_out_text] = long_text(held_out_text, option="--held-out-text")
        lm, tokenizer = load(model, dtype=dtype, device="cpu")
        check_context(lm.config, tokens, "--length")
        shape = shape_of(lm.config.get_text_config())
        setup = {"model": model, "dtype": dtype, "length": tokens, "rows": rows}
        file = RowFile(output / "measured.jsonl", setup)
        ids = [
            passkey_prompt(tokenizer, tokens, text=prose[name], seed=seed + i).input_ids
            for i, name in enumerate(texts)
        ]
        with progress() as bar:
            task = bar.add_task("layers", total=shape["layers"] * len(ids))
            for i, (name, prompt) in enumerate(zip(texts, ids, strict=True)):
                _measure(file, lm, prompt, {"text": name, "seed": seed + i}, some, rows)
                bar.update(task, completed=shape["layers"] * (i + 1))
        keys = [{"text": name, "seed": seed + i} for i, name in enumerate(texts)]
        tuning = _mean(file, keys[:prompts], some)
        unseen = _mean(file, keys[prompts:], some)
        about = {"target": target, **setup, "text": text, "prompts": prompts, "seed": seed}

        def made(choice: Tensor) -> Profile:
            return profile_of(tuning, choice, shape, about)

        dense = [_logits(lm, prompt) for prompt in ids]

        def kl(profile: Profile, of: slice) -> float:
            with sparse_patch.patch(lm, profile=profile, min_length=0, min_queries=0):
                sparse = [_logits(lm, prompt) for prompt in ids[of]]
            pairs = zip(dense[of], sparse, strict=True)
            return statistics.fmean(float(kl_rows(p, q).mean()) for p, q in pairs)

        good: dict[str, Callable[[Tensor], bool]] = {
            "recall": lambda choice: tuning.of(choice)[1] >= aim,
            "kl": lambda choice: kl(made(choice), slice(prompts)) <= aim,
            "speedup": lambda choice: _speed_up(lm, ids[0], made(choice)) >= aim,
        }
        with console.status(f"looking for {target}"), torch.inference_mode():
            choice = choose_until(tuning, good[kind], most_methods, most_recall=kind == "speedup")
            found = made(choice)
            parts = {
                "tuned on": (tuning, slice(prompts)),
                "held out": (unseen, slice(prompts, None)),
            }
            held = {
                name: _held(measured, choice, kl(found, of))
                for name, (measured, of) in parts.items()
            }
        measured_as = {name: vars(one) for name, one in held.items()}
        found = profile_of(
            tuning, choice, shape, {**about, "measured": measured_as, "machine": machine()}
        )
        output.mkdir(parents=True, exist_ok=True)
        found.save(output / "profile.json")
        report = _report(target, held, found) + _failures(
            kind, aim, held["held out"], tuning, unseen, choice
        )
        (output / "tune.md").write_text(report, encoding="utf-8")
    console.print(visible(report), markup=False)
    for name in ("profile.json", "tune.md"):
        print(f"wrote {output / name}")


def _target(text: str) -> tuple[str, float]:
    """`recall=0.95` as its parts.

    Raises:
        ValueError: of another form, or a number that cannot be met.
    """
    # What a target bounds needs no saying, but may be said: `kl<=0.01`.
    found = re.fullmatch(r"\s*(?:(recall|speedup)\s*>?|(kl)\s*<?)=\s*(\S+)\s*", text)
    kind = (found[1] or found[2]) if found else ""
    try:
        aim = float(found[3]) if found else -1.0
    except ValueError:
        aim = -1.0
    if not 0 < aim < (1 if kind == "recall" else math.inf):
        raise ValueError(
            f"--target {text!r}: give recall=R with R below 1, kl=NATS, or speedup=FACTOR"
        )
    return kind, aim


def _measure(
    file: RowFile,
    lm: PreTrainedModel,
    prompt: Tensor,
    key: dict[str, Any],
    some: Sequence[Candidate],
    rows: int,
) -> None:
    """A row per layer and candidate that is not there yet."""
    from sparse_patch_eval.ask.capture import capture
    from sparse_patch_eval.tuning.choice import measure_layer

    specs = [_spec(one) for one in some]
    known = {(r["layer"], r["spec"]) for r in file.rows if _is_of(r, key)}
    n_layers = lm.config.get_text_config().num_hidden_layers
    todo = {
        layer: [i for i, spec in enumerate(specs) if (layer, spec) not in known]
        for layer in range(n_layers)
    }
    wanted = [layer for layer, left in todo.items() if left]
    if not wanted:
        return
    for layer, inside in capture(lm, prompt, wanted).layers.items():
        left = todo[layer]
        density, recall = measure_layer([some[i] for i in left], layer, inside, rows=rows)
        for place, i in enumerate(left):
            values = {"density": density[place].tolist(), "recall": recall[place].tolist()}
            file.add({**key, "layer": layer, "spec": specs[i], **values})


def _spec(one: Candidate) -> str:
    from sparse_patch_eval.tuning.knobs import spec_of

    return spec_of(one.name, one.params)


def _is_of(row: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(row[name] == value for name, value in key.items())


def _mean(file: RowFile, keys: Sequence[dict[str, Any]], some: Sequence[Candidate]) -> Measured:
    """What was measured on some prompts."""
    import torch

    from sparse_patch_eval.tuning.choice import Measured

    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in file.rows:
        if any(_is_of(row, key) for key in keys):
            found.setdefault((row["spec"], row["layer"]), []).append(row)
    layers = sorted({layer for _, layer in found})

    def table(name: str) -> Tensor:
        return torch.tensor(
            [
                [_column_means([row[name] for row in found[_spec(one), n]]) for n in layers]
                for one in some
            ],
            dtype=torch.float64,
        )

    return Measured(some, layers, table("density"), table("recall"))


def _column_means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def _logits(lm: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits float32 `[positions, vocab]` of the last positions."""
    import torch

    with torch.inference_mode():
        logits: Tensor = lm(ids, use_cache=False, logits_to_keep=_KL_TOKENS).logits[0]
    return logits.float()


def _speed_up(lm: PreTrainedModel, ids: Tensor, profile: Profile) -> float:
    """Dense / patched time of a prefill, median of rounds in turns."""
    import sparse_patch

    def seconds() -> float:
        start = time.perf_counter()
        _logits(lm, ids)
        return time.perf_counter() - start

    ratios = []
    for _ in range(_SPEED_ROUNDS):
        dense = seconds()
        with sparse_patch.patch(lm, profile=profile, min_length=0, min_queries=0):
            ratios.append(dense / seconds())
    return statistics.median(ratios)


def _held(measured: Measured, choice: Tensor, kl: float) -> Held:
    density, recall = measured.of(choice)
    names = dict.fromkeys(one.name for one in measured.candidates)
    return Held(density, recall, kl, {name: measured.single(name, recall) for name in names})


def _report(target: str, held: dict[str, Held], found: Profile) -> str:
    lines = [f"# Profile for {target}", "", "| prompts | density | recall | KL, nats |"]
    lines.append("|---|---:|---:|---:|")
    lines += [
        f"| {name} | {one.density:.4f} | {one.recall:.4f} | {one.kl:.4f} |"
        for name, one in held.items()
    ]
    lines += ["", "One setting of one method for all heads, at the same recall:", ""]
    lines += [f"| method | {' | '.join(f'density, {name}' for name in held)} |"]
    lines.append("|---|" + "---:|" * len(held))
    for name in next(iter(held.values())).singles:
        cells = [one.singles[name] for one in held.values()]
        shown = ["not reached" if cell is None else f"{cell:.4f}" for cell in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    lines += ["", "| layer | methods (heads) |", "|---:|---|"]
    for layer, shares in sorted(found.layers.items()):
        by_name: dict[str, int] = {}
        for share in shares:
            by_name[share.name] = by_name.get(share.name, 0) + len(share.heads)
        lines.append(f"| {layer} | {', '.join(f'{n} ({k})' for n, k in by_name.items())} |")
    gap = held["held out"].recall - held["tuned on"].recall
    lines += ["", f"Held out, recall differs by {gap:+.4f} from what was tuned on."]
    return "\n".join(lines) + "\n"


def _failures(
    kind: str, aim: float, held_out: Held, tuning: Measured, unseen: Measured, choice: Tensor
) -> str:
    """What the target is worth on unseen prompts, and the heads that fell furthest there."""
    if kind == "speedup":
        lines = ["", "Speed was timed on the first prompt that was tuned on, and on no other."]
    else:
        got = held_out.recall if kind == "recall" else held_out.kl
        short = (aim - got if kind == "recall" else got - aim) / aim
        what = "met" if short <= 0 else f"missed by {short:.2%} of it"
        lines = ["", f"Held out, the target is {what}: {kind} {got:.4f}, wanted {aim:g}."]
    before, after = tuning.heads(choice)[1], unseen.heads(choice)[1]
    fall = before - after
    lines += ["", "Heads whose recall fell most where held out:", ""]
    lines += ["| layer | head | method | tuned on | held out |", "|---:|---:|---|---:|---:|"]
    for place in fall.flatten().argsort(descending=True)[:_WORST].tolist():
        layer, head = divmod(place, fall.shape[1])
        one = tuning.candidates[int(choice[layer, head])]
        recalls = f"{before[layer, head]:.4f} | {after[layer, head]:.4f}"
        lines.append(f"| {tuning.layers[layer]} | {head} | {one.name} | {recalls} |")
    return "\n".join(lines) + "\n"
