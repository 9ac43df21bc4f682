"""What is inside a compiled kernel: registers, spills, shared memory, instructions.

Read from the output of `cuobjdump` and `nvdisasm`, which ship in the Triton wheel, from AMD's
assembler text, and from Triton's own language before lowering (TTIR) and after (TTGIR).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_checks.sass import Code, overwritten, shortest_loop

KINDS = (
    ("HGMMA", r"HGMMA"),
    ("UTCHMMA", r"UTCHMMA"),
    ("HMMA", r"HMMA"),
    ("MFMA", r"v_mfma_\w+"),
    ("LDGSTS", r"LDGSTS"),
    ("UTMALDG", r"UTMALDG"),
    ("EX2", r"MUFU\.EX2|v_exp_f32\w*"),
    ("BAR", r"BAR|s_barrier"),
    ("store local", r"STL|scratch_store\w*"),
    ("load local", r"LDL|scratch_load\w*"),
)
"""Instructions that are counted, by the name under which they are: SASS or CDNA, up to a dot."""

TILE_LOAD = re.compile(r"tt\.load .*tensor<\d+x\d+x!tt\.ptr<b?f|tt\.descriptor_(load|gather)")


@dataclass(frozen=True)
class Product:
    """A matrix product `[rows, depth] @ [depth, columns]` of a kernel.

    Attributes:
        dtype: of the operands, as Triton writes it: bf16, f16, f32.
        looped: it and loads of tiles lie in a loop that Triton is asked to pipeline.
    """

    rows: int
    columns: int
    depth: int
    dtype: str
    looped: bool

    @property
    def half(self) -> bool:
        """Is it one for tensor cores? Products of fp32 are asked for in full precision."""
        return self.dtype != "f32"


@dataclass(frozen=True)
class Facts:
    """What is known of one binary.

    Attributes:
        registers: per thread; on AMD those for vectors, accumulators included.
        local_bytes: stack and local memory per thread (AMD: scratch).
        spills: instructions that read or write local memory.
        shared: bytes of shared memory (LDS) per program.
        tensor_columns: of tensor memory.
        threads: per program.
        instructions: in all; `mix`: of each kind in `KINDS` that occurs.
        binary_bytes: size of the file that is loaded.
        products: distinct ones, as `128x64x128 bf16`; `widest`: most rows of one for tensor cores.
        looped: some product is fed by a loop that Triton is asked to pipeline.
        plain_products: of tensor-core types, but compiled to scalar multiply-adds.
        waiting_loads: of tiles, in loops with products, that are not copied ahead of their use
            (NVIDIA; on AMD all go through registers).
        loop: instructions of the shortest innermost loop with products (NVIDIA).
        overwritten: writes to registers that a product in flight may still read (sm_90).
        serialized: ptxas said that no two products of a warp group overlap (C7515, sm_90).
    """

    registers: int
    local_bytes: int
    spills: int
    shared: int
    tensor_columns: int
    threads: int
    instructions: int
    mix: dict[str, int]
    binary_bytes: int
    products: list[str]
    widest: int
    looped: bool
    plain_products: int
    waiting_loads: int
    loop: int = 0
    overwritten: int = 0
    serialized: bool = False


def facts(kernel: Any, log: str = "") -> Facts:
    """Facts of what `triton.compile` gave back; `log`: what ptxas said meanwhile."""
    nvidia = "cubin" in kernel.asm
    found = products(kernel.asm["ttir"])
    read = _nvidia(kernel.asm["cubin"], kernel.asm["ptx"]) if nvidia else _amd(kernel.asm["amdgcn"])
    mix = read["mix"]
    return Facts(
        **read,
        spills=mix.get("store local", 0) + mix.get("load local", 0),
        shared=kernel.metadata.shared,
        tensor_columns=getattr(kernel.metadata, "tmem_size", 0),
        binary_bytes=len(kernel.asm["cubin" if nvidia else "hsaco"]),
        products=sorted({f"{p.rows}x{p.columns}x{p.depth} {p.dtype}" for p in found}),
        widest=max([p.rows for p in found if p.half], default=0),
        looped=any(p.looped for p in found),
        plain_products=plain_products(kernel.asm["ttgir"]),
        waiting_loads=waiting_loads(kernel.asm["ttgir"]) if nvidia else 0,
        serialized=serialized(log),
    )


def _nvidia(cubin: bytes, ptx: str) -> dict[str, Any]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file))
        code = Code.parse(_output(knobs.nvidia.nvdisasm.path, "--print-code", str(file)))
    registers, local_bytes = resource_usage(usage)
    instructions, mix = count([one.opcode for one in code.instructions])
    return {
        "registers": registers,
        "local_bytes": local_bytes,
        "threads": ptx_threads(ptx),
        "instructions": instructions,
        "mix": mix,
        "loop": shortest_loop(code),
        "overwritten": overwritten(code),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd(assembler: str) -> dict[str, Any]:
    instructions, mix = count(amd_opcodes(assembler))
    return {
        "registers": amd_entry(assembler, "vgpr_count"),
        "local_bytes": amd_entry(assembler, "private_segment_fixed_size"),
        "threads": amd_entry(assembler, "max_flat_workgroup_size"),
        "instructions": instructions,
        "mix": mix,
    }


def resource_usage(text: str) -> tuple[int, int]:
    """Registers per thread, and bytes of stack and local memory, from `cuobjdump`.

    Raises:
        ValueError: there is not exactly one kernel in the text.
    """
    lines = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if len(lines) != 1:
        raise ValueError(f"cuobjdump: {len(lines)} kernels in one file: {text!r}")
    registers, stack, local = map(int, lines[0])
    return registers, stack + local


def ptx_threads(text: str) -> int:
    """Threads per program, from the PTX."""
    return int(_only(r"\.reqntid (\d+)", text))


def amd_entry(text: str, key: str) -> int:
    """A number of the kernel's metadata, from AMD's assembler."""
    return int(_only(rf"\.{key}:\s+(\d+)", text))


def _only(pattern: str, text: str) -> str:
    found = re.findall(pattern, text)
    if len(found) != 1:
        raise ValueError(f"{pattern!r} occurs {len(found)} times, not once")
    return str(found[0])


def serialized(log: str) -> bool:
    """Does ptxas say that it made products of a warp group wait for one another?"""
    return "wgmma.mma_async instructions are serialized" in log


def amd_opcodes(text: str) -> list[str]:
    """Instructions in the order of AMD's assembler text."""
    return re.findall(r"^\s+([a-z]\w+)(?=\s|$)", text, re.MULTILINE)


def count(opcodes: list[str]) -> tuple[int, dict[str, int]]:
    """How many there are, and how many of each kind in `KINDS` that occurs."""
    names = Counter(opcodes)
    mix = {}
    for kind, pattern in KINDS:
        whole = re.compile(rf"(?:{pattern})(?:\..*)?")
        number = sum(n for op, n in names.items() if whole.fullmatch(op))
        if number:
            mix[kind] = number
    return len(opcodes), mix


def products(ttir: str) -> list[Product]:
    """The matrix products of a kernel in TTIR, in order."""
    lines = ttir.splitlines()
    looped: set[int] = set()
    for first, end in _loops(lines):
        loads = any(TILE_LOAD.search(line) for line in lines[first:end])
        if loads and "tt.num_stages = 1 :" not in lines[end]:
            looped.update(range(first, end))
    found = []
    for number, line in enumerate(lines):
        shapes = re.search(
            r"tt\.dot\S* .*: tensor<(?:\d+x)?(\d+)x(\d+)x(\w+)> \* tensor<(?:\d+x)?\d+x(\d+)x", line
        )
        if shapes:
            rows, depth, dtype, columns = shapes.groups()
            found.append(Product(int(rows), int(columns), int(depth), dtype, number in looped))
    return found


def _loops(lines: list[str]) -> list[tuple[int, int]]:
    """First line and closing line of the body of each loop; a while loop counts from its `do`."""
    loops: list[tuple[int, int]] = []
    open_: list[tuple[int, int]] = []
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if open_ and line.lstrip().startswith("}") and indent == open_[-1][0]:
            loops.append((open_.pop()[1], number))
        if re.search(r"scf\.for .*\{$|^\s*\} do \{$", line):
            open_.append((indent, number))
    return loops


def plain_products(ttgir: str) -> int:
    """Products of 16-bit types that did not become tensor-core instructions."""
    line = r"tt\.dot .*: tensor<[\dx]+x(?:bf16|f16), #ttg\.dot_op<\{opIdx = 0, parent = #blocked"
    return len(re.findall(line, ttgir))


def waiting_loads(ttgir: str) -> int:
    """Loads of tiles, in loops with products, that are not asynchronous copies."""
    lines = ttgir.splitlines()
    waiting: set[int] = set()
    for first, end in _loops(lines):
        body = range(first, end)
        if any(re.search(r"tt\.dot |warp_group_dot |tc_gen5_mma ", lines[i]) for i in body):
            waiting.update(i for i in body if TILE_LOAD.search(lines[i]))
    return len(waiting)
