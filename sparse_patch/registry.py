"""Methods by name: registration, lookup, and the base class that documents and checks parameters.

    @register("my_method")
    @dataclass(frozen=True)
    class MyMethod(Method):
        gamma: float = param(0.9, "attention mass to keep", above=0, upto=1)

        def plan(self, q, k, *, scale, q_offset): ...

Another package can offer methods that users need not import: entry-point group
`sparse_patch.methods`, name = method name, value = the class.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, TypeVar

from sparse_patch_kernels import BlockPlan
from torch import Tensor

from .spelling import split_method

ENTRY_POINT_GROUP = "sparse_patch.methods"
RECOMMENDED = "strided:preset=fine"
"""The method of `patch` and of the commands where none is named: at an equal share of computed
attention it stays nearest to dense (docs/results/methods.md)."""
# Parameters reach int64 tensors; numbers from a file may be larger.
_MOST = 2**62


@dataclass(frozen=True)
class _Rule:
    help: str
    kind: Any  # for isinstance
    above: float | None = None
    least: float | None = None
    upto: float | None = None
    choices: tuple[Any, ...] | None = None
    optional: bool = False
    per_head: bool = False

    def allowed(self) -> str:
        """The allowed values in words, for errors and `sparse-patch methods`."""
        if self.choices is not None:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        names = {int: "a whole number", bool: "true or false", str: "text", tuple: "a tuple"}
        kind = names.get(self.kind, "a number")
        low = f" > {self.above:g}" if self.above is not None else ""
        low = f" >= {self.least:g}" if self.least is not None else low
        high = f" <= {self.upto:g}" if self.upto is not None else ""
        both = " and" if low and high else ""
        per_head = ", or a tuple of one per query head" if self.per_head else ""
        return f"{kind}{low}{both}{high}{per_head}" + (" or None" if self.optional else "")

    def admits(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if self.per_head and isinstance(value, tuple):
            scalar = dataclasses.replace(self, per_head=False)
            return len(value) > 0 and all(scalar.admits(number) for number in value)
        if self.choices is not None:
            return any(value == c and type(value) is type(c) for c in self.choices)
        if isinstance(value, bool) != (self.kind is bool) or not isinstance(value, self.kind):
            return False
        if self.kind in (str, tuple):
            return len(value) > 0
        if abs(value) >= _MOST:
            return False
        number = float(value)
        return (
            math.isfinite(number)
            and (self.above is None or number > self.above)
            and (self.least is None or number >= self.least)
            and (self.upto is None or number <= self.upto)
        )


def param(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    least: float | None = None,
    upto: float | None = None,
    choices: tuple[Any, ...] | None = None,
    kind: type | None = None,
    per_head: bool = False,
) -> Any:
    """A documented, range-checked dataclass field of a method.

    Args:
        default: default value; None makes the parameter optional (then give `kind`).
        help: one line for `sparse-patch methods`.
        above: bound `> above`.
        least: bound `>= least`.
        upto: bound `<= upto`.
        choices: the allowed values, instead of bounds.
        kind: int, float, bool, str or tuple; default: the type of `default`. A float field also
            takes ints; text and tuples must not be empty.
        per_head: also take a tuple of such values, one per query head.
    """
    kind = kind or type(default)
    kinds = (int, float) if kind is float else kind
    rule = _Rule(help, kinds, above, least, upto, choices, default is None, per_head)
    return dataclasses.field(default=default, metadata={"rule": rule})


Examples = Mapping[str, Mapping[str, Any]]
"""Parameters by what they show: see `Method`."""


@dataclass(frozen=True)
class Knob:
    """One number that sets how much a method keeps.

    Attributes:
        make: the method's parameters from the number.
        low, high: range of the number. If `high` is below 1 it is a share, and `params` steps
            evenly in the logarithm of 1 - share.
        falling: a larger number keeps less.
    """

    make: Callable[[float], dict[str, Any]]
    low: float
    high: float
    falling: bool = False

    @classmethod
    def share(cls, name: str, **fixed: Any) -> Knob:
        """Turn a parameter between 0 and 1; `fixed` are other parameters."""
        return cls(lambda x: {**fixed, name: round(x, 5)}, 0.02, 0.9999)

    @classmethod
    def count(cls, name: str, low: int = 16, high: int = 1 << 17, **fixed: Any) -> Knob:
        """Turn a parameter that counts tokens or blocks; `fixed` are other parameters."""
        return cls(lambda x: {**fixed, name: round(x)}, low, high)

    def params(self, place: float) -> dict[str, Any]:
        """Parameters at `place`, from 0 (keeps least) to 1 (keeps most)."""
        place = 1 - place if self.falling else place
        if self.high < 1:
            return self.make(1 - (1 - self.low) * ((1 - self.high) / (1 - self.low)) ** place)
        return self.make(self.low * (self.high / self.low) ** place)


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods: a frozen dataclass of parameters and one pure function, `plan`.

    Class attributes:
        source: where the method comes from, as arXiv ids or a repository.
        presets: named sets of parameters, `get_method(name, preset="paper")`.
        knob: the parameter that sets density, for tuning and fair comparison. It also fixes budgets
            and forced blocks whose defaults suit far longer prompts: at 4k they alone would keep a
            quarter to a half. None: density cannot be set.
        examples: parameters for the tests over all methods: "sparse" (from about 100 tokens on),
            "everything" (the plan is None, or shows every causal key) and, where the defaults keep
            all of 16k tokens, "long" (it has to choose there).
        spans_heads: parameters that are valid only on all heads of a model together, such as tables
            by head; those of `param(per_head=True)` need not be listed.
        files: parameters that are paths of files, which a profile must not set.
    """

    source: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    knob: ClassVar[Knob | None] = None
    examples: ClassVar[Examples] = {}
    spans_heads: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[str, ...]] = ()

    dense_layers: int = param(
        0, "number of first layers that sparse_patch.patch keeps exact", least=0
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            rule = field.metadata.get("rule")
            value = getattr(self, field.name)
            if isinstance(value, list):  # JSON and the command line have no tuples
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            if rule is not None and not rule.admits(value):
                raise ValueError(
                    f"{type(self).__name__}: {field.name}={value!r} must be {rule.allowed()} "
                    f"({rule.help}; default {field.default!r})"
                )

    @abstractmethod
    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """Choose the keys of one unpadded sequence.

        Args:
            q: `[heads, q_len, dim]` after RoPE; row i is position `q_offset + i`.
            k: `[kv_heads, kv_len, dim]` with `kv_len == q_offset + q_len`.
            scale: factor that the model puts on the logits.
            q_offset: keys before the first query (chunked prefill, second turn).

        Returns:
            The plan, or None where exact attention is right (too short, say).
        """

    @property
    def sparse_decode(self) -> bool:
        """Does `decode` choose keys for single new rows? Without it, those run exact."""
        return False

    def decode(
        self, q: Tensor, k: Tensor, *, scale: float, memory: Any
    ) -> tuple[BlockPlan | None, Any]:
        """Choose the keys of one new row; called when `sparse_decode` holds.

        Args:
            q: `[heads, 1, dim]`, the last row.
            k: `[kv_heads, kv_len, dim]`, the row's own key included.
            scale: as for `plan`.
            memory: what the call for the previous row returned; None unless the sequence is the
                same and has grown by one key.

        Returns:
            The plan, or None where exact attention is right, and the memory for the next row, which
            must not keep a reference to k.
        """
        return self.plan(q, k, scale=scale, q_offset=k.shape[1] - 1), None

    def for_layer(self, layer: int) -> Method:
        """This method for one layer of a model; methods with tables per layer override it."""
        return self

    def needs_all_heads(self) -> list[str]:
        """The parameters set here that are valid only on all heads of a model together."""
        names = []
        for field in dataclasses.fields(self):
            rule, value = field.metadata.get("rule"), getattr(self, field.name)
            listed = isinstance(value, tuple) and len(value) > 1 and rule and rule.per_head
            if listed or (field.name in self.spans_heads and value is not None):
                names.append(field.name)
        return names


def check_sequence(q: Tensor, k: Tensor, q_offset: int) -> None:
    """Raise a ValueError unless q, k and q_offset are what `Method.plan` asks for."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}"
    if q.ndim != 3 or k.ndim != 3 or min(*q.shape, *k.shape) == 0:
        raise ValueError(f"plan: q and k must be [heads, seq, head_dim], not empty; got {shapes}")
    if q.shape[2] != k.shape[2] or q.shape[0] % k.shape[0]:
        raise ValueError(
            f"plan: q and k must share head_dim, heads be a multiple of KV heads; got {shapes}"
        )
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"plan: q and k must share dtype and device; got {q.dtype} on {q.device} and "
            f"{k.dtype} on {k.device}"
        )
    if q_offset < 0 or q_offset + q.shape[1] != k.shape[1]:
        raise ValueError(
            f"plan: q_offset={q_offset} plus {q.shape[1]} queries must equal {k.shape[1]} keys"
        )


MethodClass = TypeVar("MethodClass", bound=type)
_METHODS: dict[str, type] = {}


def register(name: str, *, replace: bool = False) -> Callable[[MethodClass], MethodClass]:
    """Class decorator: make a method available under `name`.

    Args:
        name: what users pass to `patch`; letters, digits and underscores.
        replace: replace an existing method of that name.

    Raises:
        ValueError: the name is taken or not an identifier.
        TypeError: the class is not a dataclass with a `plan` method.
    """
    if not name.isidentifier():
        raise ValueError(f"register: {name!r} must be letters, digits and underscores")

    def add(cls: MethodClass) -> MethodClass:
        if not (dataclasses.is_dataclass(cls) and callable(getattr(cls, "plan", None))):
            raise TypeError(
                f"register: {cls!r} must be a dataclass with plan(q, k, *, scale, q_offset); "
                "put @dataclass(frozen=True) below @register"
            )
        taken = _METHODS.get(name)
        if taken is not None and taken is not cls and not replace:
            raise ValueError(
                f"register: {name!r} is already {taken.__module__}.{taken.__qualname__}; pass "
                "replace=True to replace it"
            )
        _METHODS[name] = cls
        return cls

    return add


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def list_methods() -> list[str]:
    """Names that `patch` and `get_method` take, sorted; third-party plugins included."""
    return sorted({*_METHODS, *_plugins()})


def method_class(name: str) -> type:
    """The class behind a name.

    Raises:
        ValueError: no method has that name; the message suggests the nearest.
    """
    if name in _METHODS:
        return _METHODS[name]
    plugin = _plugins().get(name)
    if plugin is not None:
        register(name)(plugin.load())
        return _METHODS[name]
    raise ValueError(f"unknown method {name!r}{_nearest(name, list_methods())}")


def get_method(name: str, /, *, preset: str | None = None, **params: Any) -> Method:
    r"""Build a method from keyword arguments, or from text as on the command line.

    Args:
        name: one of `list_methods()`, or with parameters as in `"strided:preset=fine,gamma=0.93"`:
            values are Python literals, anything else is text, in which `\,` is a comma.
        preset: start from this named set of parameters; those given otherwise override it.
        params: the method's parameters. These and `preset` override what `name` says of them.

    Raises:
        ValueError: unknown name, preset or parameter, a value out of its range, or a text of
            another form. The message names the argument and what it may be.
    """
    name, written = split_method(name)
    written_preset = written.pop("preset", None)
    preset = written_preset if preset is None else preset
    params = {**written, **params}
    cls = method_class(name)
    known = [field.name for field in dataclasses.fields(cls)]
    for key in params:
        if key not in known:
            raise ValueError(f"{name} has no parameter {key!r}{_nearest(key, known)}")
    if preset is not None:
        presets = getattr(cls, "presets", {})
        if not isinstance(preset, str) or preset not in presets:
            raise ValueError(f"{name} has no preset {preset!r}{_nearest(str(preset), presets)}")
        params = {**presets[preset], **params}
    method: Method = cls(**params)
    return method


def brief(method: Any) -> str:
    """A method with the parameters that differ from its defaults, long values cut."""
    if not dataclasses.is_dataclass(method):
        return _cut(repr(method))
    shown = (
        f"{field.name}={_cut(repr(getattr(method, field.name)))}"
        for field in dataclasses.fields(method)
        if field.repr and getattr(method, field.name) != field.default
    )
    return f"{type(method).__name__}({', '.join(shown)})"


def _cut(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: its default, its allowed values in words, its meaning."""

    name: str
    default: Any
    allowed: str
    help: str


@dataclass(frozen=True)
class MethodInfo:
    """Description of a method, as `sparse-patch methods` shows it."""

    name: str
    summary: str
    source: str
    parameters: tuple[Parameter, ...]
    presets: Mapping[str, Mapping[str, Any]]
    knob: Knob | None = None
    examples: Examples = dataclasses.field(default_factory=dict)


def describe(name: str) -> MethodInfo:
    """Name, one line, source, parameters (its own first) and presets of a method.

    Raises:
        ValueError: no method has that name.
    """
    cls = method_class(name)
    rows = []
    for field in dataclasses.fields(cls):
        rule = field.metadata.get("rule")
        allowed, text = (rule.allowed(), rule.help) if rule else (str(field.type), "")
        rows.append(Parameter(field.name, field.default, allowed, text))
    inherited = {field.name for field in dataclasses.fields(Method)}
    rows.sort(key=lambda row: row.name in inherited)
    return MethodInfo(
        name=name,
        summary=(cls.__doc__ or "").strip().splitlines()[0],
        source=getattr(cls, "source", ""),
        parameters=tuple(rows),
        presets=getattr(cls, "presets", {}),
        knob=getattr(cls, "knob", None),
        examples=getattr(cls, "examples", {}),
    )


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Known: {', '.join(known) or 'none'}"
