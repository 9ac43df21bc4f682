"""What a method remembers of a sequence from one decode step to the next.

A memory belongs to the cache: it is tied to the very tensor of keys that the cache held after the
step. Any change of the cache between two steps (beams reordered, cropped, rows selected, a step
that ran unpatched) replaces that tensor, and the next step starts afresh. Sequences decoded in
turns, or in other threads, have caches and so memories of their own.
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
        before: memories that the previous step left.
        after: memories that this step leaves.
    """

    before: dict[int, tuple[int, Any]] = field(default_factory=dict)
    after: dict[int, tuple[int, Any]] = field(default_factory=dict)

    def memory(self, row: int, kv_len: int) -> Any:
        """The memory of a row that has just grown by one key to `kv_len`, or None."""
        known, memory = self.before.get(row, (0, None))
        return memory if known + 1 == kv_len else None


class Memories:
    """The memories of one layer, by the keys that a cache holds. A copy starts empty."""

    def __init__(self) -> None:
        self._of_keys: MutableMapping[Tensor, dict[int, tuple[int, Any]]]
        self._of_keys = WeakTensorKeyDictionary()
        self._thread = threading.local()

    @property
    def step(self) -> Step:
        """The current step of this thread; outside of a step, an empty one."""
        step: Step = getattr(self._thread, "step", None) or Step()
        return step

    def begin(self, keys: Tensor | None) -> None:
        """The layer is called with a cache that holds `keys`; None: no known cache."""
        self._thread.step = Step({} if keys is None else self._of_keys.pop(keys, {}))

    def end(self, keys: Tensor | None) -> None:
        """The layer has run, and the cache now holds `keys`."""
        if keys is not None and self.step.after:
            self._of_keys[keys] = self.step.after
        self._thread.step = None

    def __reduce__(self) -> tuple[type[Memories], tuple[()]]:
        return Memories, ()
