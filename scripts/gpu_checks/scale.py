"""What is checked at which size: in full on a GPU, or at toy size in a dry run of the same code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Scale:
    """Sizes.

    Attributes:
        on_gpu: run on the GPU; else on the CPU, in Triton's interpreter.
        dtype: of what is timed.
        dtypes: of what is compared, the most important first.
        thinned: of the cases and calls, every so many in the dtypes after the first.
        heads, kv_heads, dim, block: of what is timed.
        tokens: length of what is compared.
        method_lengths: of plans of every method, queries and keys.
        model_tokens: of the batch that every family is given.
        compared, families: methods and families that are; default: all that the tests have.
        dims: head dimensions compared beside `dim`, of keys and of values.
        lengths: of the op and of selection, the most important first; kernels are tuned at the
            first.
        densities: of the op's plans.
        methods: parameters of the methods whose plans are timed.
        rounds: at most so many per timing, and 3 per prefill.
        layers, hidden, intermediate, vocabulary: of the model.
        prefills: its prompt lengths, the most important first.
        target, prefill_target: lengths from which on the targets hold.
        processes: how many compare at a time.
    """

    on_gpu: bool
    dtype: torch.dtype
    dtypes: tuple[torch.dtype, ...]
    thinned: int
    heads: int
    kv_heads: int
    dim: int
    block: int
    tokens: int
    method_lengths: tuple[tuple[int, int], ...]
    model_tokens: int
    dims: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    densities: tuple[float, ...]
    rounds: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    prefills: tuple[int, ...]
    target: int
    prefill_target: int
    processes: int
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    compared: tuple[str, ...] = ()
    families: tuple[str, ...] = ()


# Shapes of Llama 3.1 8B, of 8 layers instead of 32: all layers cost the same.
FULL = Scale(
    on_gpu=True,
    dtype=torch.bfloat16,
    dtypes=(torch.bfloat16, torch.float32, torch.float16),
    thinned=1,
    heads=32,
    kv_heads=8,
    dim=128,
    block=128,
    tokens=1024,
    method_lengths=((1500, 1500), (300, 1477)),
    model_tokens=150,
    dims=((64, 64), (80, 80), (96, 96), (192, 192), (256, 256), (192, 128), (64, 24)),
    lengths=(32768, 131072, 8192, 65536, 16384),
    densities=(0.05, 0.1, 0.25, 0.5),
    rounds=15,
    layers=8,
    hidden=4096,
    intermediate=14336,
    vocabulary=128256,
    prefills=(32768, 131072, 8192, 16384, 65536, 262144),
    target=32768,
    prefill_target=131072,
    processes=12,
    methods={
        "strided": {"preset": "fine"},
        "flexprefill": {},
        "proxyattn": {},
        "pbs": {},
        "hip": {},
        "xattention": {},
    },
)

# bfloat16 is not here: the interpreter's products of it are wrong.
TOY = Scale(
    on_gpu=False,
    dtype=torch.float16,
    dtypes=(torch.float32, torch.float16),
    thinned=12,
    heads=2,
    kv_heads=1,
    dim=16,
    block=16,
    tokens=32,
    method_lengths=((33, 97),),
    model_tokens=60,
    compared=("strided", "hip"),
    families=("gemma3",),
    dims=((80, 80), (24, 16)),
    lengths=(48, 32),
    densities=(0.25, 0.5),
    rounds=1,
    layers=1,
    hidden=32,
    intermediate=48,
    vocabulary=50,
    prefills=(48, 32),
    target=48,
    prefill_target=48,
    processes=1,
    methods={
        "strided": {"block_size": 16, "stride": 4, "gamma": 0.6},
        "flexprefill": {"block_size": 16, "min_budget": 16, "gamma": 0.3},
        "proxyattn": {"block_size": 16, "min_budget": 16, "stride_q": 4, "gamma": 0.5},
        "pbs": {"block_size": 16, "segment": 16, "tau": 0.2},
        "hip": {"block_q": 16, "block_k": 4, "mask_k": 8, "sink": 4, "window": 4},
        "xattention": {"block_size": 16, "stride": 4, "gamma": 0.3},
    },
)
