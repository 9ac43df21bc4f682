"""A call whose kernels are compiled, and what the calls have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# A long prompt. Lengths decide nothing but whether a number divides by 16.
TOKENS = 32768
HEADS, KV_HEADS = 32, 8
DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128))
"""Head dimensions of q and k, and of v."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A call that launches kernels.

    Attributes:
        family: module of the launcher.
        shape: what tells the case from others of its family, beside dim and dtype.
        dim: head dimension of q and k, 0 where there is none; `v_dim`: of v.
        dtype: bf16, fp16, fp32; bool for masks.
        call: makes the call on meta tensors.
        every_config: compile all configurations, not only the default.
        quick: among the few that every run of the tests compiles.
        most: instructions that the default may spend on 128 keys that all rows see, by chip.
    """

    family: str
    shape: str
    dim: int
    v_dim: int
    dtype: str
    call: Callable[[], object]
    every_config: bool = False
    quick: bool = False
    most: Mapping[str, int] = field(default_factory=dict)

    @property
    def width(self) -> str:
        """The head dimensions as the table shows them."""
        if self.dim == 0:
            return "-"
        return str(self.dim) if self.dim == self.v_dim else f"{self.dim}/{self.v_dim}"

    @property
    def name(self) -> str:
        return f"{self.family}, {self.shape}, {self.width}, {self.dtype}"


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")
