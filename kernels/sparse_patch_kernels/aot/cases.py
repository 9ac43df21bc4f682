"""The calls whose kernels are compiled: public launchers, on tensors that hold nothing.

Lengths are those of a long prompt, since they decide nothing but whether a number divides by 16.
Every head dimension and type goes through the plan that most methods make, in bf16 with all
configurations; the other forms of plans, one for each that a method makes, through head dimension
128 in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from ..triton import forward
from .forms import FORMS, HEADS, KV_HEADS, TOKENS, Form, empty

DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128))


@dataclass(frozen=True)
class Case:
    """A call that launches kernels.

    Attributes:
        family: module of the launcher.
        shape: what tells the case from others of its family, beside dim and dtype.
        dim: head dimension of q and k; `v_dim`: of v.
        dtype: bf16, fp16 or fp32.
        call: makes the call on meta tensors.
        every_config: compile all configurations; else the default stands for them.
        quick: among the few that every run of the tests compiles.
    """

    family: str
    shape: str
    dim: int
    v_dim: int
    dtype: str
    call: Callable[[], object]
    every_config: bool = False
    quick: bool = False

    @property
    def width(self) -> str:
        """The head dimensions as the table shows them."""
        return str(self.dim) if self.dim == self.v_dim else f"{self.dim}/{self.v_dim}"

    @property
    def name(self) -> str:
        return f"{self.family}, {self.shape}, {self.width}, {self.dtype}"


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def cases() -> list[Case]:
    """All calls."""
    return [*_forward()]


def _forward() -> Iterator[Case]:
    whole = next(iter(FORMS))
    for shape, form in FORMS.items():
        for dtype in DTYPES if shape == whole else ("bf16",):
            for dim, v_dim in DIMS if shape == whole else ((128, 128),):
                yield Case(
                    family="forward",
                    shape=shape,
                    dim=dim,
                    v_dim=v_dim,
                    dtype=dtype,
                    call=partial(_attend, form, dim, v_dim, dtype),
                    every_config=shape == whole and dtype == "bf16",
                    quick=shape == whole and dtype == "bf16" and dim == v_dim in (64, 128),
                )


def _attend(form: Form, dim: int, v_dim: int, dtype: str) -> None:
    own = DTYPES[dtype]
    length = TOKENS * form.sequences
    forward.attend_packed(
        empty(HEADS, length, dim, dtype=own),
        empty(KV_HEADS, length, dim, dtype=own),
        empty(KV_HEADS, length, v_dim, dtype=own),
        [form.plan()] * form.sequences,
        scale=dim**-0.5,
        softcap=form.softcap,
        sinks=empty(HEADS, dtype=own) if form.sinks else None,
    )
