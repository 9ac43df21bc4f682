#!/usr/bin/env python
"""Does vLLM with the plug-in say what vLLM alone says? On a CPU, or to be run first on a GPU.

    python scripts/check_serving.py --model smollm2 --output results/serving.json

Needs an environment with vLLM (`constraints-vllm.txt`). Starts one engine after another: vLLM
alone, the method that keeps everything, and the one of `--method`; asks each the same prompts at
once: whole, in chunks, and with a cached beginning. Prints how far log-probabilities of prompts and
answers are from vLLM's, and leaves with 1 where the method that keeps everything says other tokens
in float32, or is further away than `--most`.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from sparse_patch_eval.base.console import console, user_errors
from sparse_patch_eval.base.machine import machine
from sparse_patch_eval.base.options import parse_lengths
from sparse_patch_eval.inputs.models import load_tokenizer, packaged
from sparse_patch_eval.inputs.text import long_text

from sparse_patch import serving

ALONE, KEEPS_ALL = "vLLM alone", "dense"
ANSWER = 8  # tokens
Prompt = dict[str, list[int]]


@dataclass(frozen=True)
class Said:
    """What an engine said to a prompt.

    Attributes:
        tokens: the answer.
        logprobs: of the prompt's tokens but the first, if asked for, and of the answer's.
    """

    tokens: list[int]
    logprobs: list[float]

    def distance(self, other: Said) -> float:
        """Most that log-probabilities differ by, up to where the answers part."""
        given = len(self.logprobs) - len(self.tokens)
        pairs = list(zip(self.tokens, other.tokens, strict=True))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        shared = zip(self.logprobs[: given + same], other.logprobs, strict=False)
        return max((abs(a - b) for a, b in shared), default=0.0)


class Engine:
    """vLLM in this process; `settings` None: without sparse_patch."""

    def __init__(
        self, model: str, settings: Mapping[str, Any] | None, most_tokens: int, **options: Any
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        extra = {} if settings is None else {"sparse_patch": dict(settings)}
        self.llm = LLM(
            model, max_model_len=most_tokens, additional_config=extra, disable_log_stats=True,
            skip_tokenizer_init=True, **options,
        )  # fmt: skip

    def say(self, prompts: Sequence[Prompt], of_prompts: bool, tokens: int = ANSWER) -> list[Said]:
        """Answer all prompts at once.

        Args:
            of_prompts: are the prompts' log-probabilities asked for, too?
        """
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True, detokenize=False,
            prompt_logprobs=0 if of_prompts else None,
        )  # fmt: skip
        return [_said(out) for out in self.llm.generate(list(prompts), sampling, use_tqdm=False)]

    def forget(self) -> None:
        """Nothing of earlier prompts is kept."""
        self.llm.reset_prefix_cache()

    def close(self) -> None:
        del self.llm
        gc.collect()


def _said(out: Any) -> Said:
    answer = out.outputs[0]
    steps = [*zip(answer.logprobs, answer.token_ids, strict=True)]
    if out.prompt_logprobs is not None:
        steps = [*zip(out.prompt_logprobs[1:], out.prompt_token_ids[1:], strict=True), *steps]
    return Said(list(answer.token_ids), [of[token].logprob for of, token in steps])


def main(
    output: Annotated[Path | None, typer.Option(help="A JSON file for what was found.")] = None,
    model: Annotated[str, typer.Option(help="Hub id, local folder, or `smollm2`.")] = "smollm2",
    method: Annotated[str, typer.Option(help="`NAME:key=value,...`")] = "strided:preset=fine",
    lengths: Annotated[str, typer.Option(help="Prompts asked at once, tokens.")] = "700,2k,3000,4k",
    min_length: Annotated[int, typer.Option(help="Shorter prompts run exact, tokens.")] = 1024,
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "float32",
    most: Annotated[float, typer.Option(help="Allowed distance of log-probabilities.")] = 0.01,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Processes, or GPUs.")] = 1,
) -> None:
    """Compare answers of vLLM with and without sparse_patch."""
    with user_errors():
        wanted = parse_lengths(lengths)
        tokens = load_tokenizer(model)(long_text("kjv")[: 8 * sum(wanted)])["input_ids"]
    prompts = _prompts(tokens, wanted)
    engines: dict[str, Mapping[str, Any] | None] = {ALONE: None}
    for name in (KEEPS_ALL, method):
        engines[name] = {"method": name, "min_length": min_length}
    said: dict[str, dict[str, list[Said]]] = {}
    reports = {}
    for name, settings in engines.items():
        said[name] = {}
        for chunk in (max(wanted) + 1, 512):
            engine = Engine(
                str(packaged(model) or model), settings, max(wanted) + 2 * ANSWER, dtype=dtype,
                max_num_batched_tokens=chunk, tensor_parallel_size=tensor_parallel,
            )  # fmt: skip
            said[name].update(_ask(engine, prompts, f"chunks of {chunk}"))
            if settings is not None:
                reports[name] = [one.to_dict() for one in serving.report(engine.llm)]
            engine.close()
    found = [
        {"method": name, "asked": how, **_compare(said[name][how], said[ALONE][how])}
        for name in engines
        if name != ALONE
        for how in said[name]
    ]
    for row in found:
        console.print_json(json.dumps(row))
    if output is not None:
        content = {"machine": machine(), "lengths": wanted, "rows": found, "reports": reports}
        output.write_text(json.dumps(content, indent=1) + "\n")
    wrong = [row for row in found if row["method"] == KEEPS_ALL and _is_wrong(row, dtype, most)]
    raise typer.Exit(1 if wrong else 0)


def _prompts(tokens: Sequence[int], lengths: Sequence[int]) -> list[Prompt]:
    """One of each length, each from another place of the text."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [
        {"prompt_token_ids": list(tokens[start : start + length])}
        for start, length in zip(starts, lengths, strict=True)
    ]


def _ask(engine: Engine, prompts: Sequence[Prompt], how: str) -> dict[str, list[Said]]:
    engine.forget()
    whole = engine.say(prompts, of_prompts=True)
    engine.forget()
    ids = prompts[-1]["prompt_token_ids"]
    engine.say([{"prompt_token_ids": ids[: len(ids) // 2]}], of_prompts=False)
    cached = engine.say([prompts[-1]], of_prompts=False)
    return {how: whole, f"{how}, beginning cached": cached}


def _compare(mine: Sequence[Said], theirs: Sequence[Said]) -> dict[str, Any]:
    pairs = list(zip(mine, theirs, strict=True))
    return {
        "same_answers": sum(a.tokens == b.tokens for a, b in pairs),
        "answers": len(pairs),
        "distance": max(a.distance(b) for a, b in pairs),
    }


def _is_wrong(row: Mapping[str, Any], dtype: str, most: float) -> bool:
    others = row["same_answers"] < row["answers"] and dtype == "float32"
    return others or row["distance"] > most


if __name__ == "__main__":
    typer.run(main)
