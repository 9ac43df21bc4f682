"""What a method remembers from one decode step to the next, and of which sequence.

A memory belongs to the cache: it hangs on the very tensor of keys that the cache held after the
step it comes from. Whatever happens to the cache between two steps (beams reordered, cropped, rows
selected, a step without us) puts another tensor there, and the next step starts afresh; so does
another sequence that is decoded in turn, or in another thread, and each finds its own again.
"""

from __future__ import annotations

import threading
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class Step:
    """A decode step of one layer: memories by batch row, with the number of keys they were made at.

    Attributes:
        before: what the step before left.
        after: what this one leaves.
    """

    before: dict[int, tuple[int, Any]] = field(default_factory=dict)
    after: dict[int, tuple[int, Any]] = field(default_factory=dict)

    def memory(self, row: int, kv_len: int) -> Any:
        """What is remembered of a row that has grown by a key to `kv_len`; None: nothing."""
        known, memory = self.before.get(row, (0, None))
        return memory if known + 1 == kv_len else None


class Memories:
    """The memories of one layer, by the keys that a cache holds. A copy starts without."""

    def __init__(self) -> None:
        self._of_keys: MutableMapping[Tensor, dict[int, tuple[int, Any]]]
        self._of_keys = WeakTensorKeyDictionary()
        self._thread = threading.local()

    @property
    def step(self) -> Step:
        """The step that this thread is in; outside of one nothing is remembered."""
        step: Step = getattr(self._thread, "step", None) or Step()
        return step

    def begin(self, keys: Tensor | None) -> None:
        """The layer is called, with a cache that holds `keys`; None: none that is known of."""
        self._thread.step = Step({} if keys is None else self._of_keys.pop(keys, {}))

    def end(self, keys: Tensor | None) -> None:
        """The layer has run, and the cache holds `keys` now."""
        if keys is not None and self.step.after:
            self._of_keys[keys] = self.step.after
        self._thread.step = None

    def __reduce__(self) -> tuple[type[Memories], tuple[()]]:
        return Memories, ()
