"""One family: patched beside itself unpatched, and the row that says how it went.

What counts is the unpatched model: where that cannot do something (generate, go on from a cache),
or answers a padded row otherwise than that row alone, this is the family's own, and no fault here.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from sparse_patch_eval.base.rows import Row
from torch import Tensor
from transformers import PreTrainedModel

import sparse_patch
from compat.families import WIDE, NotBuilt, build

_ZOO = importlib.import_module("tests.zoo")

RIGHT, WRONG, REFUSED, NOT_BUILT = "right", "WRONG", "refused", "not built"

# Of the spread (standard deviation) of the logits. Float noise is below, a wrong mask far above.
TOLERANCE = 1e-3
# So much a mask must matter for the comparison to mean anything, of the spread.
MATTERS = 0.05

# Logits below say that an id is no answer.
NEVER = -1e9

LONG = 80
MORE = 21
NEW_TOKENS = 6

OPTIONS: dict[str, Any] = {"min_length": 0, "min_queries": 0}
KEEPS_ALL: dict[str, Any] = {"method": "dense", "block_size": 16, **OPTIONS}
SPARSE: tuple[dict[str, Any], ...] = (
    {"method": "a_shape", "sink": 1, "window": 9, "dense_layers": 0, **OPTIONS},
    {"method": "flexprefill", "block_size": 16, "dense_layers": 0, **OPTIONS},
)

Answer = Callable[["Subject"], Tensor]


@dataclass
class Subject:
    """A model, and which inputs its forward takes beside ids and mask.

    Attributes:
        takes: names out of a `tests.zoo.batch`.
    """

    model: PreTrainedModel
    takes: tuple[str, ...] = ("input_ids", "attention_mask")

    def batch(self) -> dict[str, Tensor]:
        """Two rows of 40 tokens; the first is short by `tests.zoo.PADS` on the left."""
        whole: dict[str, Tensor] = _ZOO.batch()
        return {name: whole[name] for name in self.takes}

    @classmethod
    def of(cls, model: PreTrainedModel) -> Subject:
        """With positions where the family takes those of a padded batch by hand."""
        if "position_ids" not in inspect.signature(model.forward).parameters:
            return cls(model)
        whole = cls(model, ("input_ids", "attention_mask", "position_ids"))
        try:
            padded_batch(whole)
        except Exception:  # a family whose positions have more axes, say; then it makes its own
            return cls(model)
        return whole


@dataclass
class Findings:
    """What a family's comparisons gave.

    Attributes:
        errors: by comparison, of the spread of the logits; of tokens, how many differ.
        wrong: comparisons that failed, in words.
        own: what the unpatched model itself does not do, in words, by comparison.
    """

    errors: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    own: dict[str, str] = field(default_factory=dict)

    def judge(self, name: str, error: float, tolerance: float = TOLERANCE) -> None:
        """Note an error; NaN is wrong."""
        self.errors[name] = float(f"{error:.3g}")
        if not error <= tolerance:
            self.wrong.append(f"{name}: differs by {error:.2g} of the spread of the logits")


def check(family: str) -> Row:
    """The row of a family; nothing that a model does raises.

    Returns:
        family, status (RIGHT, WRONG, REFUSED or NOT_BUILT) and, as far as it came, reason (why it
        is refused or not built), class, layers (of the decoder), patched (attention layers),
        sparse (of those, that ran sparse), exact (layers by reason), alone (kinds of attention
        modules that were not patched), errors, wrong and own (see `Findings`), matters (by how much
        the logits move when padding is not masked, and under a sparse method; of their spread) and
        wide (patched, sparse and exact with windows wider than the prompt).
    """
    try:
        model = build(family)
    except NotBuilt as reason:
        return {"family": family, "status": NOT_BUILT, "reason": str(reason)}
    row: Row = {"family": family, "class": type(model).__name__}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return row | _check(family, model)


def _check(family: str, model: PreTrainedModel) -> Row:
    attention = _use_eager(model)
    before = _ZOO.snapshot(model)
    try:
        sparse_patch.patch(model, **KEEPS_ALL).remove()
    except ValueError as reason:
        same = _ZOO.snapshot(model) == before
        status = REFUSED if same else WRONG
        wrong = [] if same else ["refused: the model is not as it was"]
        return {"status": status, "reason": str(reason), "wrong": wrong}
    subject, found = Subject.of(model), Findings()
    row: Row = {"attention": attention, "layers": _layers(model)}
    try:
        logits = padded_batch(subject)
    except Exception as error:
        return {"status": NOT_BUILT, "reason": f"its own forward raises {_said(error)}"}
    if not bool(torch.isfinite(logits).all()):
        return {"status": NOT_BUILT, "reason": "its own logits are not finite"}
    row |= _layers_of(subject) | {"alone": _left_alone(model)}
    for answer in (padded_batch, long_prompt, second_turn, generated):
        _same_patched(answer, subject, found, _name(answer))
    _padding_is_nothing(subject, found)
    row["matters"] = _matters(subject, logits)
    sparse_patch.unpatch(model)
    if not torch.equal(padded_batch(subject), logits):
        found.wrong.append("undo: the logits are not bit for bit what they were")
    if _ZOO.snapshot(model) != before:
        found.wrong.append("undo: attributes, hooks or names in configs are not what they were")
    if {"sliding window", "mask"} & set(row["exact"]):
        row["wide"] = _wide(family, found)
    if not found.wrong and row["matters"]["padding"] < MATTERS and not found.own:
        found.own["padding"] = "hardly matters to these weights: the comparison says little"
    status = WRONG if found.wrong else RIGHT
    return row | {"status": status, **vars(found)}


# --- answers, of which patched and unpatched must give the same ----------------------------------


@torch.no_grad()
def padded_batch(subject: Subject) -> Tensor:
    """Logits `[tokens, vocabulary]` at the real tokens of a batch with padding."""
    inputs = subject.batch()
    return _logits(subject.model(**inputs))[inputs["attention_mask"].bool()]


@torch.no_grad()
def long_prompt(subject: Subject) -> Tensor:
    """Logits `[1, 80, vocabulary]` of a prompt without padding."""
    return _logits(subject.model(input_ids=_ids(1, LONG, seed=9)))


@torch.no_grad()
def second_turn(subject: Subject) -> Tensor:
    """Logits `[2, 21, vocabulary]` of tokens after a cached batch with padding."""
    inputs, more = subject.batch(), _ids(2, MORE, seed=8)
    first = subject.model(**inputs, use_cache=True)
    cache = getattr(first, "past_key_values", None)
    if cache is None:
        raise NotImplementedError("no past_key_values")
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    then = {"input_ids": more, "attention_mask": mask, "past_key_values": cache}
    if "position_ids" in inputs:
        then["position_ids"] = inputs["position_ids"][:, -1:] + 1 + torch.arange(MORE)
    return _logits(subject.model(**then))


def generated(subject: Subject) -> Tensor:
    """Tokens `[2, 46]`, the last 6 of them generated greedily, of a batch with padding."""
    inputs = subject.batch()
    inputs.pop("position_ids", None)
    tokens: Tensor = subject.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokens


@torch.no_grad()
def _row(subject: Subject, alone: bool) -> Tensor:
    """Logits `[27, vocabulary]` of the padded row of the batch, in it or alone without padding."""
    ids = subject.batch()["input_ids"][:1, _ZOO.PADS :]
    return (
        _logits(subject.model(input_ids=ids))[0] if alone else padded_batch(subject)[: ids.numel()]
    )


# --- comparisons ---------------------------------------------------------------------------------


def _same_patched(answer: Answer, subject: Subject, found: Findings, name: str) -> None:
    """Patched with a method that keeps everything, a model must answer as it does unpatched.

    Args:
        name: of the comparison.
    """
    try:
        want = answer(subject)
    except Exception as error:
        found.own[name] = f"raises unpatched, too: {_said(error)}"
        return
    try:
        with sparse_patch.patch(subject.model, **KEEPS_ALL):
            got = answer(subject)
    except Exception as error:
        found.wrong.append(f"{name}: raises {_said(error)}")
        return
    if answer is generated:
        differ = got.shape[1] - int((got == want).all(0).cumprod(0).sum())
        found.errors[name] = differ
        if differ:
            found.wrong.append(f"{name}: other tokens from the {NEW_TOKENS - differ + 1}. on")
        return
    if not bool(torch.isfinite(want).all()):
        found.own[name] = "logits that are not finite unpatched, too"
        return
    by = _difference(got, want)
    if by > TOLERANCE and (other := _by_sdpa(answer, subject, want)) is not None:
        found.own[name] = (
            f"its eager attention and its SDPA differ by {_difference(other, want):.2g}; compared "
            "with SDPA"
        )
        by = _difference(got, other)
    found.judge(name, by)


def _by_sdpa(answer: Answer, subject: Subject, eager: Tensor) -> Tensor | None:
    """What it answers unpatched with SDPA; None if it has none or that is what eager answers."""
    model = subject.model
    try:
        with _attention(model, "sdpa"):
            other = answer(subject)
    except Exception:  # it has no SDPA, or not for this: eager stands alone
        return None
    return other if _difference(other, eager) > TOLERANCE else None


def _padding_is_nothing(subject: Subject, found: Findings) -> None:
    """Under a sparse method a padded row is answered as that row alone."""
    try:
        error = _difference(_row(subject, alone=False), _row(subject, alone=True))
    except Exception as reason:
        found.own["row alone"] = f"raises unpatched, too: {_said(reason)}"
        return
    if not error <= TOLERANCE:
        found.own["row alone"] = f"differs from that row padded by {error:.2g} unpatched, too"
        return
    for options in SPARSE:
        name = f"row alone, {options['method']}"
        try:
            with sparse_patch.patch(subject.model, **options):
                padded, alone = (_row(subject, alone=alone) for alone in (False, True))
        except Exception as reason:
            found.wrong.append(f"{name}: raises {_said(reason)}")
            continue
        found.judge(name, _difference(padded, alone))


def _matters(subject: Subject, logits: Tensor) -> dict[str, float]:
    """By how much logits move, of their spread, if padding is not masked and under `a_shape`."""
    inputs = subject.batch()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        whole = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
        unmasked = _logits(subject.model(**whole))[real]
    try:
        with sparse_patch.patch(subject.model, **SPARSE[0]):
            sparse = padded_batch(subject)
    except Exception:  # counted as wrong by the comparisons
        sparse = logits
    moves = {"padding": unmasked, "a_shape": sparse}
    return {name: float(f"{_difference(x, logits):.2g}") for name, x in moves.items()}


def _layers_of(subject: Subject) -> Row:
    """What each patched layer did on a padded batch; where that raises, what it did until then."""
    with sparse_patch.patch(subject.model, **KEEPS_ALL) as handle:
        with contextlib.suppress(Exception):  # the comparisons report it
            padded_batch(subject)
    layers = handle.report().layers
    reasons = Counter(why for layer in layers for why in layer.exact)
    reasons["not called"] = sum(not layer.calls for layer in layers)
    sparse = sum(layer.sparse_calls > 0 for layer in layers)
    return {"patched": len(layers), "sparse": sparse, "exact": dict(+reasons)}


def _left_alone(model: PreTrainedModel) -> list[str]:
    """Kinds of modules of the decoder that are called attention, neither patched nor in or around
    what is."""
    with sparse_patch.patch(model, **KEEPS_ALL):
        patched = {module for module in model.modules() if hasattr(module, "_sparse_patch")}
    inside = {part for module in patched for part in module.modules()}
    kinds = {
        type(module).__name__
        for module in model.get_decoder().modules()
        if "Attention" in type(module).__name__
        and module not in inside
        and patched.isdisjoint(module.modules())
    }
    return sorted(kinds)


def _wide(family: str, found: Findings) -> Row:
    """A second model, of windows that no prompt here fills: then they hide nothing."""
    try:
        subject = Subject.of(build(family, WIDE))
    except NotBuilt as reason:
        found.own["wide windows"] = str(reason)
        return {}
    _use_eager(subject.model)
    for answer in (padded_batch, long_prompt):
        _same_patched(answer, subject, found, f"{_name(answer)}, wide windows")
    return _layers_of(subject)


# --- models --------------------------------------------------------------------------------------


def _use_eager(model: PreTrainedModel) -> str:
    """Take the simplest attention that a family has; returns the name of what it then uses."""
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
    with contextlib.suppress(ValueError, ImportError):  # then its own is what it has
        model.set_attn_implementation("eager")
    return str(model.config._attn_implementation)


@contextlib.contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    was = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(was)


def _layers(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)


def _logits(output: Any) -> Tensor:
    """Without what some families write over ids that they never answer with."""
    logits: Tensor = output.logits
    return logits.masked_fill(logits < NEVER, 0)


def _ids(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(6, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def _difference(got: Tensor, want: Tensor) -> float:
    """The largest, of the spread of what is wanted; NaN where either is not finite."""
    return float((got - want).abs().max() / want.std())


def _name(answer: Answer) -> str:
    return answer.__name__.replace("_", " ")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
