"""The chips that kernels are compiled for: published limits, and how many programs fit.

Sources. NVIDIA limits: CUDA C++ Programming Guide, "Compute Capabilities", table of technical
specifications (registers, warps, blocks and shared memory per multiprocessor and per block) and
table of arithmetic throughput (exp2: 16 per clock and multiprocessor); 1 KiB of shared memory is
taken from every block by the system (tuning guides of Ampere, Hopper, Blackwell); registers are
handed out per warp in units of 256, shared memory in units of 128 bytes (CUDA occupancy
calculator); tensor memory: 512 columns (PTX ISA, tcgen05.alloc). Shared memory moves 32 banks of
4 bytes a clock. gfx942: AMD CDNA3 ISA guide (512 vector registers per lane and SIMD, 64 KiB LDS of
32 banks per compute unit) and LLVM's AMDGPU target (8 waves per SIMD, registers in units of 8,
LDS in units of 512 bytes, 16 work groups per unit; v_exp_f32 at a quarter of the rate of 64 lanes).

Rates belong to one product of each chip, from its data sheet: dense bf16 with fp32 accumulation
at boost clock, and memory bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KIB = 1024


@dataclass(frozen=True)
class Chip:
    """Limits of one multiprocessor (compute unit), and rates of one product.

    Attributes:
        product: what the rates belong to.
        tensor_core: instructions that count as tensor-core products, best first; for tiles of
            fewer than `wide_rows` rows the second is as good.
        units: multiprocessors of the product.
        tflops: dense bf16, fp32 accumulation, 1e12 operations a second.
        memory: bytes per second from HBM (GDDR on sm_86).
        exps: exp2 per clock and multiprocessor.
        lanes: threads per warp (wave).
        warps, blocks, shared: resident at most, per multiprocessor; bytes.
        registers: per SIMD (a quarter of a multiprocessor) and lane of a warp.
        register_unit, shared_unit: granules in which they are handed out.
        block_shared: bytes one block may use.
        block_overhead: bytes the system adds to each block.
        tensor_columns: of tensor memory; 0: the chip has none.
    """

    name: str
    product: str
    tensor_core: tuple[str, ...]
    units: int
    clock: float
    tflops: float
    memory: float
    warps: int
    blocks: int
    shared: int
    block_shared: int
    lanes: int = 32
    registers: int = 512
    register_unit: int = 8
    shared_unit: int = 128
    block_overhead: int = KIB
    tensor_columns: int = 0
    exps: int = 16
    shared_rate: int = 128
    asynchronous: bool = True

    @property
    def flops(self) -> float:
        """Tensor-core operations per clock and multiprocessor."""
        return self.tflops * 1e12 / self.units / self.clock

    def target(self) -> Any:
        """The `GPUTarget` to compile for."""
        from triton.backends.compiler import GPUTarget

        if self.name.startswith("gfx"):
            return GPUTarget("hip", self.name, self.lanes)
        return GPUTarget("cuda", int(self.name.removeprefix("sm_")), self.lanes)


# 512 registers a lane: 64 K of 32 bits per multiprocessor are 16 K a quarter, over 32 lanes; CDNA3
# has as many for 64 lanes. Clocks are those at which the data sheet's TFLOPS come about.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "sm_80", "A100 SXM 80 GB", ("HMMA",), units=108, clock=1.41e9, tflops=312,
            memory=2.039e12, warps=64, blocks=32, shared=164 * KIB, block_shared=163 * KIB,
        ),
        Chip(
            "sm_86", "A10", ("HMMA",), units=72, clock=1.695e9, tflops=125,
            memory=0.6e12, warps=48, blocks=16, shared=100 * KIB, block_shared=99 * KIB,
        ),
        Chip(
            "sm_90", "H100 SXM", ("HGMMA", "HMMA"), units=132, clock=1.83e9, tflops=989.4,
            memory=3.35e12, warps=64, blocks=32, shared=228 * KIB, block_shared=227 * KIB,
        ),
        Chip(
            "sm_100", "B200", ("UTCHMMA", "HMMA"), units=148, clock=1.85e9, tflops=2250,
            memory=8e12, warps=64, blocks=32, shared=228 * KIB, block_shared=227 * KIB,
            tensor_columns=512,
        ),
        Chip(
            "gfx942", "MI300X", ("MFMA",), units=304, clock=2.1e9, tflops=1307.4,
            memory=5.3e12, warps=32, blocks=16, shared=64 * KIB, block_shared=64 * KIB, lanes=64,
            shared_unit=512, block_overhead=0, asynchronous=False,
        ),
    )
}  # fmt: skip
WIDE_ROWS = 64
"""Rows of the smallest product that HGMMA and UTCHMMA take: 64 (PTX ISA, wgmma and tcgen05.mma)."""


@dataclass(frozen=True)
class Occupancy:
    """Programs resident on one multiprocessor: the fewest that any of its resources allows."""

    by_registers: int
    by_shared: int
    by_warps: int
    by_tensor_memory: int | None = None

    @property
    def programs(self) -> int:
        limits = (self.by_registers, self.by_shared, self.by_warps, self.by_tensor_memory)
        return min(limit for limit in limits if limit is not None)


def occupancy(
    chip: Chip, threads: int, registers: int, shared: int, tensor_columns: int = 0
) -> Occupancy:
    """How many programs of one kernel are resident on one multiprocessor.

    Args:
        threads: of a program.
        registers: per thread.
        shared: bytes per program, without what the system adds.
        tensor_columns: of tensor memory per program.
    """
    warps = -(-threads // chip.lanes)
    per_quarter = chip.registers // _up(max(registers, 1), chip.register_unit)
    per_program = _up(shared, chip.shared_unit) + chip.block_overhead
    return Occupancy(
        by_registers=min(4 * per_quarter // warps, chip.blocks),
        by_shared=chip.shared // per_program if per_program else chip.blocks,
        by_warps=min(chip.warps // warps, chip.blocks),
        by_tensor_memory=chip.tensor_columns // tensor_columns if tensor_columns else None,
    )


def _up(amount: int, unit: int) -> int:
    return -(-amount // unit) * unit
