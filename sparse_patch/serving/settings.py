"""What a user asks of an engine, read and checked before anything is loaded.

{"method": "strided:preset=fine", "min_length": 4096}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..patching import of_layer, refuse_split_heads, select_layers
from ..profiles import Auto, Profile
from ..registry import Method, get_method
from ..routing import Options

# The place of the settings in an engine's own options, and the variable for where there are none.
KEY = "sparse_patch"
VARIABLE = "SPARSE_PATCH_METHOD"


@dataclass(frozen=True)
class Settings:
    """As in `sparse_patch.patch`, where nothing else is said.

    Attributes:
        method: `NAME:key=value,...`; None: `profile` says which.
        profile: what is in a profile's file, as JSON; from users also the path of one.
        layers, dense_layers: as in `patch`.
        min_length: sequences with fewer keys so far run exact, tokens. "auto" does not go here:
            its costs are those of Transformers' attention.
        min_queries: chunks with fewer queries against longer keys run exact.
        backend: one of `sparse_patch_kernels.BACKENDS`.
    """

    method: str | None = None
    profile: Any = field(default=None, repr=False)
    layers: tuple[int, ...] | None = None
    dense_layers: int | tuple[int, ...] | None = None
    min_length: int = 4096
    min_queries: int = 64
    backend: str = "auto"

    @classmethod
    def read(cls, content: Any) -> Settings:
        """Check what a user wrote; a string is the method.

        Raises:
            ValueError: naming what is wrong.
            OSError: the profile cannot be read.
        """
        if isinstance(content, str):
            content = {"method": content}
        if not isinstance(content, Mapping):
            raise ValueError(
                f'sparse_patch={content!r} must be a method, or {{"method": ..., ...}}'
            )
        known = [one.name for one in dataclasses.fields(cls)]
        unknown = sorted(map(str, set(content) - set(known)))
        if unknown:
            raise ValueError(
                f"sparse_patch: does not know {', '.join(unknown)}, only {', '.join(known)}"
            )
        content = {name: _frozen(value) for name, value in content.items()}
        if isinstance(content.get("profile"), str):
            content["profile"] = Profile.load(content["profile"]).to_dict()
        return cls(**content)

    def __post_init__(self) -> None:
        if (self.method is None) == (self.profile is None):
            raise ValueError('sparse_patch: give a "method" or a "profile", and not both')
        if self.method is not None and not isinstance(self.method, str):
            raise ValueError(
                f"sparse_patch: method={self.method!r} must be text: NAME:key=value,..."
            )
        for name in ("min_length", "min_queries"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise ValueError(
                    f"sparse_patch: {name}={value!r} must be a number of tokens from 0"
                )
        if self.layers is not None and not _are_numbers(self.layers):
            raise ValueError(f"sparse_patch: layers={self.layers!r} must be a list of indices")
        dense = self.dense_layers
        if not (dense is None or _is_number(dense) or _are_numbers(dense)):
            raise ValueError(
                f"sparse_patch: dense_layers={dense!r} must be a number or a list of indices"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, and what `read` takes; stands without any file."""
        content = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        found: dict[str, Any] = json.loads(json.dumps(content))
        return found

    def choose(self, shape: Mapping[str, Any], processes: int) -> Choice:
        """What a model of this shape (see `profiles.shape_of`) is to run.

        Args:
            processes: how many share its heads.

        Raises:
            ValueError: the method, a parameter, or a layer does not exist, or does not go with the
                model or with several processes.
        """
        if self.method is not None:
            method = get_method(self.method)
        else:
            profile = Profile.from_dict(self.profile)
            profile.check_model(shape)
            method = Auto(profile=profile)
        refuse_split_heads(method, processes)
        dense = self.dense_layers
        if dense is None:
            dense = getattr(method, "dense_layers", 0)
        wanted, kept = select_layers(list(range(shape["layers"])), self.layers, dense)
        return Choice(method, frozenset(wanted), frozenset(kept))


@dataclass(frozen=True)
class Choice:
    """A method, the layers that it is about, and those of them that it keeps exact."""

    method: Method
    layers: frozenset[int]
    dense: frozenset[int]

    def of_layer(self, layer: int) -> Method | None:
        """What one of `layers` runs; None: exact attention."""
        return None if layer in self.dense else of_layer(self.method, layer)


def options_of(settings: Settings) -> Options:
    """As a patch's options."""
    return Options(
        settings.min_length,
        settings.min_queries,
        settings.backend,
        measure_recall=False,
        asked_by="sparse_patch.serving.report(llm)",
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_number, value))
