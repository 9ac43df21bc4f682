"""What a computation allocates."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def largest_tensor(run: Callable[[], object]) -> int:
    """Elements of the largest tensor that any operation of `run()` returns."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        run()
    return largest
