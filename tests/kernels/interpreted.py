"""Triton kernels on CPU tensors: what tests of them share."""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch


def require_interpreter(name: str) -> ModuleType:
    """Module `sparse_patch_kernels.<name>`, run by the interpreter (see conftest.py)."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    module = importlib.import_module(f"sparse_patch_kernels.{name}")
    assert importlib.import_module("sparse_patch_kernels.triton.launch").INTERPRETED
    return module


def in_both_types(values: Sequence[Any]) -> list[Any]:
    """(value, dtype): all values in float32 and the first in float16, where the others are wide."""
    first, *others = values
    half = [pytest.param(value, torch.float16, marks=pytest.mark.wide) for value in others]
    return [*((value, torch.float32) for value in values), (first, torch.float16), *half]


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and its like give with NaN or an absurd number."""

    def poisoned(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.dtype == torch.bool:
                return x.fill_(True)
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).min + 7)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
