"""`sparse-patch tune`: text and a target in, a profile and a report of what it holds out."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_patch_eval.base.console import console, progress, user_errors, visible

if TYPE_CHECKING:  # seconds of import, which `--help` can do without
    from torch import Tensor

    from sparse_patch import Profile

METHODS = ["strided", "xattention", "proxyattn", "flexprefill"]


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
        from sparse_patch.specs import split_method
        from sparse_patch_eval.ask.kl import kl_rows
        from sparse_patch_eval.base.machine import machine
        from sparse_patch_eval.base.options import parse_length
        from sparse_patch_eval.base.rows import RowFile
        from sparse_patch_eval.inputs.models import check_context, load
        from sparse_patch_eval.inputs.text import long_text, passkey_prompt
        from sparse_patch_eval.tuning.choice import candidates, choose_until, profile_of
        from sparse_patch_eval.tuning.measuring import last_logits, mean_of, measure, speed_up
        from sparse_patch_eval.tuning.text import failures, held_of, profile_report

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
                measure(file, lm, prompt, {"text": name, "seed": seed + i}, some, rows)
                bar.update(task, completed=shape["layers"] * (i + 1))
        keys = [{"text": name, "seed": seed + i} for i, name in enumerate(texts)]
        tuning = mean_of(file, keys[:prompts], some)
        unseen = mean_of(file, keys[prompts:], some)
        about = {"target": target, **setup, "text": text, "prompts": prompts, "seed": seed}

        def made(choice: Tensor) -> Profile:
            return profile_of(tuning, choice, shape, about)

        dense = [last_logits(lm, prompt) for prompt in ids]

        def kl(profile: Profile, of: slice) -> float:
            with sparse_patch.patch(lm, profile=profile, min_length=0, min_queries=0):
                sparse = [last_logits(lm, prompt) for prompt in ids[of]]
            pairs = zip(dense[of], sparse, strict=True)
            return statistics.fmean(float(kl_rows(p, q).mean()) for p, q in pairs)

        good: dict[str, Callable[[Tensor], bool]] = {
            "recall": lambda choice: tuning.of(choice)[1] >= aim,
            "kl": lambda choice: kl(made(choice), slice(prompts)) <= aim,
            "speedup": lambda choice: speed_up(lm, ids[0], made(choice)) >= aim,
        }
        with console.status(f"looking for {target}"), torch.inference_mode():
            choice = choose_until(tuning, good[kind], most_methods, most_recall=kind == "speedup")
            found = made(choice)
            parts = {
                "tuned on": (tuning, slice(prompts)),
                "held out": (unseen, slice(prompts, None)),
            }
            held = {
                name: held_of(measured, choice, kl(found, of))
                for name, (measured, of) in parts.items()
            }
        measured_as = {name: vars(one) for name, one in held.items()}
        found = profile_of(
            tuning, choice, shape, {**about, "measured": measured_as, "machine": machine()}
        )
        output.mkdir(parents=True, exist_ok=True)
        found.save(output / "profile.json")
        report = profile_report(target, held, found) + failures(
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
