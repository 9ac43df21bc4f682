"""The calls whose kernels are compiled: public launchers, on tensors that hold nothing.

Every head dimension and type goes through the call that most methods make; the other calls that
methods make, through head dimension 128 in bf16. Where not all configurations are compiled, the
default stands for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from sparse_patch_kernels.triton import forward

from kernel_checks.case import DIMS, DTYPES, HEADS, KV_HEADS, TOKENS, Case, empty
from kernel_checks.estimators import estimators
from kernel_checks.forms import FORMS, Form

LOOPS = {"sm_90": 560}
"""Instructions a warp may spend on 128 keys at head dimension 128: FlashAttention-4 takes 489."""


def cases() -> list[Case]:
    """All calls."""
    return [*_forward(), *estimators()]


def _forward() -> Iterator[Case]:
    whole = next(iter(FORMS))
    for shape, form in FORMS.items():
        for dtype in DTYPES if shape == whole else ("bf16",):
            for dim, v_dim in DIMS if shape == whole else ((128, 128),):
                plain = shape == whole and dtype != "fp32" and dim == v_dim == 128
                yield Case(
                    family="forward",
                    shape=shape,
                    dim=dim,
                    v_dim=v_dim,
                    dtype=dtype,
                    call=partial(_attend, form, dim, v_dim, dtype),
                    every_config=shape == whole and dtype == "bf16",
                    quick=shape == whole and dtype == "bf16" and dim == v_dim == 128,
                    most=LOOPS if plain else {},
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
