"""Triton kernels on CPU tensors: what tests of them share."""

import importlib
from types import ModuleType

import pytest
import torch


def require_interpreter(name: str) -> ModuleType:
    """Module `sparse_patch_kernels.triton.<name>`, run by Triton's interpreter.

    Skips where there is no Triton, or where it was imported without TRITON_INTERPRET=1, which
    tests/conftest.py sets where there is no GPU.
    """
    triton = pytest.importorskip("triton")
    module = importlib.import_module(f"sparse_patch_kernels.triton.{name}")
    if not triton.knobs.runtime.interpret or isinstance(triton.language.cdiv, triton.JITFunction):
        pytest.skip("Triton's interpreter is off", allow_module_level=True)
    return module


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and its like give with NaN or an absurd number."""

    def poisoned(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).min + 7)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
