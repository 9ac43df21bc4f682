"""`sparse-patch tune`: from text and a target to a profile and a report on held-out prompts."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_patch import RECOMMENDED
from sparse_patch_eval.base.console import console, progress, user_errors, visible

if TYPE_CHECKING:  # seconds of import, which `--help` can do without
    from torch import Tensor

    from sparse_patch import Profile

METHODS = [RECOMMENDED, "xattention", "proxyattn", "flexprefill"]


def tune(
    output: Annotated[
        Path, typer.Option(help="Folder for profile.json, tune.md and measured.jsonl.")
    ] = Path("tuned"),
    target: Annotated[
        str, typer.Option(help="Minimum `recall=0.95`, maximum `kl=0.01`, or minimum `speedup=2`.")
    ] = "recall=0.95",
    model: Annotated[
        str, typer.Option(help="Hub id, folder, .gguf file, or `smollm2`, `gemma3-270m` (PyPI).")
    ] = "smollm2",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method to try, `NAME:key=value,...`, over its knob's range; repeatable. Default: "
            + ", ".join(METHODS)
        ),
    ] = None,
    length: Annotated[str, typer.Option(help="Tokens per prompt.")] = "4k",
    text: Annotated[
        str, typer.Option(help="Text of the prompts: `kjv`, `stdlib`, `pydoc`, or a UTF-8 file.")
    ] = "kjv",
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts to tune on.")] = 2,
    held_out_text: Annotated[
        str | None, typer.Option(help="Text of the held-out prompts; default: --text.")
    ] = None,
    held_out: Annotated[
        int, typer.Option(min=1, help="Number of held-out prompts that test the profile.")
    ] = 2,
    steps: Annotated[int, typer.Option(min=2, help="Number of settings per method.")] = 8,
    most_methods: Annotated[
        int,
        typer.Option(min=1, help="Maximum number of methods in a layer; each adds planning time."),
    ] = 2,
    rows: Annotated[
        int, typer.Option(min=1, help="Approximate number of query rows judged per head.")
    ] = 256,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the first prompt.")] = 0,
) -> None:
    """Find which method each head should run to meet a target, and write a profile of it.

    Measures every setting of every method on every head, chooses for each head the setting with the
    least density at a common price of lost attention, and varies the price until the target is met.
    Held-out prompts then show whether it holds. `sparse_patch.patch(model, profile=...)` loads the
    profile. A stopped run resumes.
    """
    with user_errors():
        import torch

        import sparse_patch
        from sparse_patch.profiles import shape_of
        from sparse_patch.spelling import split_method
        from sparse_patch_eval.ask.kl import kl_rows
        from sparse_patch_eval.base.early import check_device, check_output
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
        settings = candidates(dict(split_method(spec) for spec in method or METHODS), steps)
        texts = [text] * prompts + [held_out_text or text] * held_out
        prose = {text: long_text(text)}
        if held_out_text:
            prose[held_out_text] = long_text(held_out_text, option="--held-out-text")
        check_device(device)
        check_output(output)
        lm, tokenizer = load(model, dtype=dtype, device=device)
        check_context(lm.config, tokens, "--length")
        shape = shape_of(lm.config.get_text_config())
        setup = {"model": model, "dtype": dtype, "device": device, "length": tokens, "rows": rows}
        ids = [
            passkey_prompt(tokenizer, tokens, text=prose[name], seed=seed + i).input_ids.to(device)
            for i, name in enumerate(texts)
        ]
        file = RowFile(output / "measured.jsonl", setup)
        with progress() as bar:
            task = bar.add_task("layers", total=shape["layers"] * len(ids))
            for i, (name, prompt) in enumerate(zip(texts, ids, strict=True)):
                measure(file, lm, prompt, {"text": name, "seed": seed + i}, settings, rows)
                bar.update(task, completed=shape["layers"] * (i + 1))
        keys = [{"text": name, "seed": seed + i} for i, name in enumerate(texts)]
        tuning = mean_of(file, keys[:prompts], settings)
        unseen = mean_of(file, keys[prompts:], settings)
        origin = {"target": target, **setup, "text": text, "prompts": prompts, "seed": seed}

        def made(choice: Tensor) -> Profile:
            return profile_of(tuning, choice, shape, origin)

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
        with console.status(f"searching for {target}"), torch.inference_mode():
            choice = choose_until(tuning, good[kind], most_methods, most_recall=kind == "speedup")
            chosen = made(choice)
            parts = {
                "tuned on": (tuning, slice(prompts)),
                "held out": (unseen, slice(prompts, None)),
            }
            results = {
                name: held_of(measured, choice, kl(chosen, of))
                for name, (measured, of) in parts.items()
            }
        measured_as = {name: vars(one) for name, one in results.items()}
        chosen = profile_of(
            tuning, choice, shape, {**origin, "measured": measured_as, "machine": machine()}
        )
        output.mkdir(parents=True, exist_ok=True)
        chosen.save(output / "profile.json")
        report = profile_report(target, results, chosen) + failures(
            kind, aim, results["held out"], tuning, unseen, choice
        )
        (output / "tune.md").write_text(report, encoding="utf-8")
    console.print(visible(report), markup=False)
    for name in ("profile.json", "tune.md"):
        print(f"wrote {output / name}")


def _target(text: str) -> tuple[str, float]:
    """`recall=0.95` as its parts.

    Raises:
        ValueError: the form is wrong, or the number cannot be met.
    """
    # The direction of a bound may be written or not: `kl<=0.01`.
    match = re.fullmatch(r"\s*(?:(recall|speedup)\s*>?|(kl)\s*<?)=\s*(\S+)\s*", text)
    kind = (match[1] or match[2]) if match else ""
    try:
        aim = float(match[3]) if match else -1.0
    except ValueError:
        aim = -1.0
    if not 0 < aim < (1 if kind == "recall" else math.inf):
        raise ValueError(
            f"--target {text!r}: give recall=R with R below 1, kl=NATS, or speedup=FACTOR"
        )
    return kind, aim
