"""Small kernels, good and bad, compiled and checked: prints complaints and facts as JSON.

A process of its own, since Triton decides once in each whether kernels are compiled at all.
"""

import json
import sys
from dataclasses import asdict

import torch
import triton
import triton.language as tl
from kernel_checks.binary import facts
from kernel_checks.build import Build, door_chip
from kernel_checks.checks import complaints
from kernel_checks.chips import CHIPS
from sparse_patch_kernels.triton.launch import launch, recording


@triton.jit
def matmul(a, b, c, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, n, DEPTH):
        x = tl.load(a + row[:, None] * n + first + inner[None, :])
        y = tl.load(b + (first + inner)[:, None] * n + column[None, :])
        total = tl.dot(x, y, total, input_precision="ieee")
    total = tl.exp2(total)
    tl.store(c + row[:, None] * n + column[None, :], total.to(c.dtype.element_ty))


@triton.jit
def matmul_while(a, b, c, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Triton pipelines no while loop."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = 0
    while first < n:
        x = tl.load(a + row[:, None] * n + first + inner[None, :])
        y = tl.load(b + (first + inner)[:, None] * n + column[None, :])
        total = tl.dot(x, y, total, input_precision="ieee")
        first += DEPTH
    tl.store(c + row[:, None] * n + column[None, :], total.to(c.dtype.element_ty))


# kernel, type, rows, columns, depth, warps, stages, chips
TOYS = {
    "good": (matmul, torch.bfloat16, 64, 64, 32, 4, 3, ("sm_80", "sm_90", "sm_100", "gfx942")),
    "spills": (matmul, torch.bfloat16, 128, 256, 32, 2, 2, ("sm_80", "gfx942")),
    "two warps": (matmul, torch.bfloat16, 64, 64, 32, 2, 3, ("sm_80", "sm_90")),
    "few rows": (matmul, torch.bfloat16, 16, 64, 32, 4, 3, ("sm_90",)),
    "full precision": (matmul, torch.float32, 32, 32, 32, 4, 3, ("sm_90",)),
    "too much shared": (matmul, torch.bfloat16, 64, 64, 128, 4, 5, ("sm_80", "sm_86", "gfx942")),
    "too much tensor memory": (matmul, torch.bfloat16, 256, 512, 32, 8, 2, ("sm_100",)),
    "while": (matmul_while, torch.bfloat16, 64, 64, 32, 4, 3, ("sm_90", "gfx942")),
    "while, one stage": (matmul_while, torch.bfloat16, 64, 64, 32, 4, 1, ("sm_90",)),
}


def check(kernel, dtype, rows, columns, depth, warps, stages, chip):
    x = torch.empty(4096, 4096, dtype=dtype, device="meta")
    sizes = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth}
    config = triton.Config(sizes, num_warps=warps, num_stages=stages)
    with recording(door_chip(chip)) as launches:
        launch(kernel, (1, 1), {"a": x, "b": x, "c": x, "n": 4096}, [config], [])
    compiled = Build.of(launches[0], config, chip).compile()
    found = facts(compiled.kernel, compiled.log)
    as_default, else_ = (complaints(found, chip, stages, default) for default in (True, False))
    return {"default": as_default, "other": else_, "facts": asdict(found)}


def main():
    results = {}
    for name, (*toy, chips) in TOYS.items():
        results[name] = {chip: check(*toy, CHIPS[chip]) for chip in chips}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
