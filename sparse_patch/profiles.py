"""Profiles: which method each head of a model runs, with which parameters, in a JSON file.

`sparse-patch tune` writes one for a model, from text; `patch(model, profile=...)` loads it. It is
read as data and checked: method names, their parameters, and that it was made for a model of this
type and shape. Parameters that name further files are refused.

    {"format": "sparse-patch profile 1",
     "model": {"type": "llama", "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64},
     "layers": {"0": [{"heads": [0, 1, 2], "method": "xattention", "params": {"gamma": 0.8}}]},
     "made": {...}}

Heads and layers that are not listed run exact. `made` (the target, the text, the measurements) is
for people.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_patch_kernels import BlockPlan
from torch import Tensor

from .mixing import Part, common_form, merged
from .registry import Method, check_sequence, get_method, method_class
from .strict_json import read_json

__all__ = ["Profile", "Share", "common_form", "shape_of"]

FORMAT = "sparse-patch profile 1"
_KEYS = ("format", "model", "layers", "made")
_SHAPE = ("layers", "heads", "kv_heads", "head_dim")


@dataclass(frozen=True)
class Share:
    """Some query heads of a layer, and their method.

    The method plans for all query heads of the KV groups that hold `heads`, in order; its per-head
    parameters have one value for each of those. Its choices for `heads` are used.
    """

    heads: tuple[int, ...]
    name: str
    params: Mapping[str, Any]
    method: Method = field(repr=False, compare=False)

    @classmethod
    def of(cls, heads: tuple[int, ...], name: str, params: Mapping[str, Any]) -> Share:
        """Raises ValueError if the method or a parameter does not exist."""
        return cls(tuple(sorted(heads)), name, dict(params), get_method(name, **params))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"heads": list(self.heads), "method": self.name, "params": dict(self.params)}


@dataclass(frozen=True)
class Profile:
    """Methods by layer and head, for models of one type and shape.

    Attributes:
        model: "type", and numbers of "layers", "heads", "kv_heads", and "head_dim".
        layers: the shares of each layer that does not run exact.
        made: how the profile was made, JSON-ready; not read.

    Raises:
        ValueError: such a model has no such layer or head, or a head has two methods.
    """

    model: Mapping[str, Any]
    layers: Mapping[int, tuple[Share, ...]]
    made: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        numbers = [self.model.get(name) for name in _SHAPE]
        if not isinstance(self.model.get("type"), str) or not all(map(_is_count, numbers)):
            raise ValueError(
                f"profile: model={dict(self.model)} must name a type, and numbers of "
                f"{', '.join(_SHAPE)}"
            )
        for layer, shares in self.layers.items():
            heads = [head for share in shares for head in share.heads]
            if not 0 <= layer < self.model["layers"]:
                raise ValueError(
                    f"profile: no layer {layer} in a model of {self.model['layers']} layers"
                )
            if len(set(heads)) < len(heads):
                raise ValueError(f"profile: layer {layer} gives a head two methods")
            if not all(0 <= head < self.model["heads"] for head in heads):
                raise ValueError(
                    f"profile: layer {layer} names heads {heads}, but the model has "
                    f"{self.model['heads']} heads"
                )

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read and check a file.

        Raises:
            ValueError: the file is not a profile; the message names the fault.
            OSError: the file cannot be read.
        """
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(f"profile {path}: not JSON: {error}") from error
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, content: Any) -> Profile:
        """The inverse of `to_dict`.

        Raises:
            ValueError: the content is not a profile; the message names the fault.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(
                f"profile: not in the format {FORMAT!r}; make one with `sparse-patch tune`"
            )
        layers, model, made = content.get("layers"), content.get("model"), content.get("made", {})
        if not (isinstance(layers, dict) and isinstance(model, dict) and isinstance(made, dict)):
            raise ValueError('profile: "model", "layers" and "made" must be objects')
        unknown = [*(set(content) - set(_KEYS)), *(set(model) - {"type", *_SHAPE})]
        if unknown:
            raise ValueError(f"profile: unknown keys {', '.join(map(repr, sorted(unknown)))}")
        return cls(model, {_layer(name): _shares(name, of) for name, of in layers.items()}, made)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "format": FORMAT,
            "model": dict(self.model),
            "layers": {
                str(layer): [share.to_dict() for share in shares]
                for layer, shares in sorted(self.layers.items())
            },
            "made": dict(self.made),
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON; numbers in `made` that are not finite become null."""
        content = {**self.to_dict(), "made": _finite(self.made)}
        text = json.dumps(content, indent=1, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def check_model(self, model: Mapping[str, Any]) -> None:
        """Raise a ValueError unless a model (see `shape_of`) is of this type and shape."""
        wrong = [
            f"{name} is {model[name]!r}, not {self.model[name]!r}"
            for name in ("type", *_SHAPE)
            if model[name] != self.model[name]
        ]
        if wrong:
            raise ValueError(
                f"profile: made for another model ({'; '.join(wrong)}); tune one for this model"
            )


def shape_of(config: Any) -> dict[str, Any]:
    """Type and shape of a text model, as profiles name them, from its Transformers config."""
    heads = config.num_attention_heads
    return {
        "type": config.model_type,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _layer(name: str) -> int:
    if not name.isdecimal() or str(int(name)) != name:
        raise ValueError(f"profile: layer {name!r} is not a number")
    return int(name)


def _shares(layer: str, content: Any) -> tuple[Share, ...]:
    kinds = {"heads": list, "method": str, "params": dict}
    if not isinstance(content, list):
        raise ValueError(f"profile: layer {layer} must be a list")
    for share in content:
        if not isinstance(share, dict) or set(share) != set(kinds):
            raise ValueError(f"profile: layer {layer}: {share!r} must have {', '.join(kinds)}")
        for name, kind in kinds.items():
            if not isinstance(share[name], kind):
                raise ValueError(
                    f"profile: layer {layer}: {name}={share[name]!r} must be a {kind.__name__}"
                )
        if not share["heads"] or not all(type(head) is int for head in share["heads"]):
            raise ValueError(f"profile: layer {layer}: heads={share['heads']} must be numbers")
    return tuple(_share(layer, **share) for share in content)


def _share(layer: str, heads: list[int], method: str, params: dict[str, Any]) -> Share:
    files = getattr(method_class(method), "files", ())
    if named := [name for name in files if params.get(name) is not None]:
        raise ValueError(
            f"profile: layer {layer}: {method}: {named[0]}={params[named[0]]!r} names a file, "
            "which a profile must not do"
        )
    try:
        return Share.of(tuple(heads), method, params)
    except ValueError as error:
        raise ValueError(f"profile: layer {layer}: {error}") from error
    except (TypeError, ArithmeticError, LookupError, AttributeError) as error:
        # Raised by a constructor that gets a list or an object where it needs a number.
        raise ValueError(f"profile: layer {layer}: {method}: {params}: {error}") from error


@dataclass(frozen=True)
class Auto(Method):
    """Runs the methods of a profile, head by head.

    Attributes:
        profile: the methods by layer and head.
        layer: set by `for_layer`.
    """

    profile: Profile = field(kw_only=True, repr=False)
    layer: int = -1

    def for_layer(self, layer: int) -> Auto:
        """See Method.for_layer."""
        shares = self.profile.layers.get(layer, ())
        bound = tuple(
            dataclasses.replace(share, method=share.method.for_layer(layer)) for share in shares
        )
        layers = {**self.profile.layers, layer: bound} if bound else self.profile.layers
        return dataclasses.replace(
            self, profile=dataclasses.replace(self.profile, layers=layers), layer=layer
        )

    def needs_all_heads(self) -> list[str]:
        """See Method.needs_all_heads."""
        return ["profile"]

    def plan(self, q: Tensor, k: Tensor, *, scale: float, q_offset: int) -> BlockPlan | None:
        """See Method.plan; None where every head of the layer runs exact.

        Raises:
            ValueError: the plans of a layer's methods cannot be merged (see `mixing.merged`).
        """
        check_sequence(q, k, q_offset)
        shares = self.profile.layers.get(self.layer, ())
        heads, group = q.shape[0], q.shape[0] // k.shape[0]
        if len(shares) == 1 and len(shares[0].heads) == heads:
            return shares[0].method.plan(q, k, scale=scale, q_offset=q_offset)
        parts = []
        for share in shares:
            groups = sorted({head // group for head in share.heads})
            members = [kv_head * group + i for kv_head in groups for i in range(group)]
            plan = share.method.plan(q[members], k[groups], scale=scale, q_offset=q_offset)
            if plan is not None:
                places = [members.index(head) for head in share.heads]
                parts.append(Part(share.heads, places, len(members), plan))
        return merged(parts, heads, k.shape[1], q.device)
