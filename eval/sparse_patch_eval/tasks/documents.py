"""The documents of an offline task: samples of the lengths asked for, as lm-eval takes them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparse_patch_eval.inputs.models import load_tokenizer
from sparse_patch_eval.tasks.problem import Draw, Generator, Problem, TooShort, fit
from sparse_patch_eval.tasks.table import GENERATORS, GRID, GRID_WORDINGS
from sparse_patch_eval.tasks.values import DEPTHS

Document = dict[str, Any]

_TOKENIZER_KEYS = ("tokenizer", "pretrained", "model")
_OPTIONS = ("max_seq_lengths", "num_samples", "seed", "haystack", "reserve", "depths", "wording")


def from_metadata(task: str, metadata: Mapping[str, Any]) -> list[Document]:
    """What `documents` makes from lm-eval's metadata.

    Args:
        task: name of the task.
        metadata: arguments of `documents` by their names, and the name of a tokenizer, as
            `models.load_tokenizer` takes it, as "tokenizer", "pretrained" or "model" (the first
            that is set; lm-eval passes its `--model_args` here). Other entries are ignored.

    Raises:
        ValueError: no tokenizer is named, or `documents` raises it.
    """
    names = [metadata[key] for key in _TOKENIZER_KEYS if isinstance(metadata.get(key), str)]
    if not names:
        raise ValueError(
            f"{task} needs a tokenizer to measure prompts with: give its name as metadata, as in "
            '--metadata \'{"tokenizer": "smollm2"}\''
        )
    options = {key: metadata[key] for key in _OPTIONS if key in metadata}
    return documents(task, _tokenizer(names[0]), **options)


def documents(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_lengths: Sequence[int] = (4096,),
    num_samples: int = 100,
    seed: int = 0,
    haystack: str = "kjv",
    reserve: int = 0,
    depths: int = 11,
    wording: str = "copy",
) -> list[Document]:
    """Samples of a task, the same in every process; asking for more does not change the first ones.

    Args:
        task: a name of `table.GENERATORS`.
        tokenizer: measures prompts, special tokens included.
        max_seq_lengths: tokens that prompt and answer may take.
        num_samples: samples of each length; of each length and depth in the grid.
        seed: chooses everything in a sample.
        haystack: where prose comes from (see `text.long_text`).
        reserve: further tokens kept free, as for a chat template.
        depths: of the grid: positions of the needle, evenly from 0 to 1.
        wording: of the grid, "copy" or "question".

    Returns:
        For each sample `input`, `gen_prefix`, `outputs` (gold strings), `candidates` (eight whole
        answers), `gold` (index of the right one), `candidate_tokens` (tokens of a blank and each of
        them, after the prompt), `depth` (0 to 1 or None), `max_length` and `index`.

    Raises:
        ValueError: an argument is invalid, a length is too short for the task, or a text is too
            short for the length.
    """
    generator = _generator(task, wording)
    lengths = _lengths(max_seq_lengths)
    _check(num_samples=(num_samples, 1), reserve=(reserve, 0), depths=(depths, 2))
    if task == GRID:
        cells = list(_grid_cells(num_samples, depths))
    else:
        cells = [(str(n), share) for n, share in enumerate(_depths(task, seed, num_samples))]
    result = []
    for length in lengths:
        limit = length - reserve - generator.tokens_to_generate
        for index, (name, depth) in enumerate(cells):
            draw = Draw(f"{task}-{seed}-{length}-{name}", length, depth, haystack)
            sample = _filled(task, generator, draw, _counter(tokenizer), limit)
            gold = draw.random("gold").randrange(len(sample.wrong) + 1)
            result.append(_document(sample, gold, tokenizer, length, index))
    return result


def _generator(task: str, wording: str) -> Generator:
    if task not in GENERATORS:
        raise ValueError(f"unknown task {task!r}: use one of {', '.join(GENERATORS)}")
    if wording not in GRID_WORDINGS:
        raise ValueError(f"wording={wording!r} must be one of {', '.join(GRID_WORDINGS)}")
    return GRID_WORDINGS[wording] if task == GRID else GENERATORS[task]


def _check(**counts: tuple[Any, int]) -> None:
    """Raise a ValueError for a value that is not a whole number, or below its minimum."""
    for name, (value, least) in counts.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of {least} or more")


def _lengths(given: Any) -> list[int]:
    whole = isinstance(given, Sequence) and not isinstance(given, str)
    if not whole or not given or not all(isinstance(n, int) and n > 0 for n in given):
        raise ValueError(f"max_seq_lengths={given!r} must be a list of token counts, as in [4096]")
    return list(given)


def _grid_cells(num_samples: int, depths: int) -> Iterator[tuple[str, float]]:
    """Name and depth of each cell: all depths of the first sample, then of the next."""
    for index in range(num_samples):
        for place in range(depths):
            share = place / (depths - 1)
            yield f"{index}-{share:.6f}", share


def _depths(task: str, seed: int, count: int) -> Iterator[float]:
    """All depths by turns, each round of 40 in an order of its own."""
    for start in range(0, count, len(DEPTHS)):
        order = random.Random(f"{task}-{seed}-depths-{start}").sample(DEPTHS, len(DEPTHS))
        yield from order[: count - start]


def _filled(
    task: str, generator: Generator, draw: Draw, count: Callable[[Problem], int], limit: int
) -> Problem:
    growth = generator.grow(draw)
    try:
        sample, units = fit(growth, count, limit, slack=draw.length // 512)
    except TooShort as error:
        needed = draw.length - limit + error.needed
        raise ValueError(
            f"{task}: length {draw.length} is too short, prompt and answer need about {needed} "
            "tokens: give larger max_seq_lengths"
        ) from error
    if units == growth.most:
        raise ValueError(
            f"{task}: the text {draw.haystack!r} is too short for length {draw.length}: give a "
            "longer text as haystack, or a smaller length (text is never repeated)"
        )
    return sample


def _counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[Problem], int]:
    # verbose=False: a tried prompt may be longer than the model's context.
    return lambda sample: len(tokenizer(sample.context, verbose=False)["input_ids"])


def _document(
    sample: Problem, gold: int, tokenizer: PreTrainedTokenizerBase, length: int, index: int
) -> Document:
    candidates = list(sample.wrong)
    candidates.insert(gold, sample.answer)
    return {
        "input": sample.input,
        "gen_prefix": sample.gen_prefix,
        "outputs": list(sample.outputs),
        "candidates": candidates,
        "gold": gold,
        "candidate_tokens": [
            _added(tokenizer, sample.gen_prefix, candidate) for candidate in candidates
        ],
        "depth": sample.depth,
        "max_length": length,
        "index": index,
    }


def _added(tokenizer: PreTrainedTokenizerBase, prefix: str, candidate: str) -> int:
    """Tokens of a blank and `candidate`, as lm-eval counts them: whole minus context."""
    whole, context = tokenizer([f"{prefix} {candidate}", prefix])["input_ids"]
    return len(whole) - len(context)


@cache
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(name)
