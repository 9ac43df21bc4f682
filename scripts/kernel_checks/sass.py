"""What the loops of a disassembly do: how long they are, and what they overwrite too early.

Reads what `nvdisasm --print-code` prints. A loop is what a branch to an earlier label repeats; only
the innermost that hold tensor-core products are of interest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")
STORES = (
    "BAR", "BRA", "CCTL", "DEPBAR", "ERRBAR", "EXIT", "FENCE", "HGMMA", "LDGDEPBAR", "LDGSTS",
    "MEMBAR", "NOP", "RED", "ST", "SYNCS", "UTMA", "WARPGROUP",
)  # fmt: skip
"""Beginnings of instructions whose first register, if they name one, is read and not written."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, without its predicate.

    Attributes:
        opcode: with its modifiers, as in `LDG.E.128`.
        operands: the rest, as text.
    """

    opcode: str
    operands: str


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel, NOPs left out, and the place of each label among them."""

    instructions: list[Instruction]
    labels: dict[str, int]

    @classmethod
    def parse(cls, text: str) -> Code:
        """From the output of `nvdisasm --print-code`."""
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        line = re.compile(
            r"^(?:(\.L_\w+):|\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);?)",
            re.MULTILINE,
        )
        for label, opcode, operands in line.findall(text):
            if label:
                labels[label] = len(instructions)
            elif opcode != "NOP":
                instructions.append(Instruction(opcode, operands.strip()))
        return cls(instructions, labels)

    def product_loops(self) -> list[list[Instruction]]:
        """Bodies of the innermost loops that hold tensor-core products."""
        loops = [(first, last) for first, last in self._loops() if self._has_products(first, last)]
        return [
            self.instructions[first : last + 1]
            for first, last in loops
            if not any((a, b) != (first, last) and first <= a and b <= last for a, b in loops)
        ]

    def _loops(self) -> Iterator[tuple[int, int]]:
        """First and last instruction of each loop; two branches back to one label make one."""
        ends: dict[int, int] = {}
        for place, one in enumerate(self.instructions):
            target = re.search(r"`\((\.L_\w+)\)", one.operands) if one.opcode == "BRA" else None
            first = self.labels.get(target[1], place + 1) if target else place + 1
            if first <= place:
                ends[first] = place
        yield from ends.items()

    def _has_products(self, first: int, last: int) -> bool:
        body = self.instructions[first : last + 1]
        return any(one.opcode.startswith(TENSOR_CORE) for one in body)


def shortest_loop(code: Code) -> int:
    """Instructions of the shortest innermost loop with products, 0 where there is none.

    In the forward kernel that is the loop over keys which all rows see: the others mask as well.
    """
    return min((len(body) for body in code.product_loops()), default=0)


def overwritten(code: Code) -> int:
    """Writes to registers that a product in flight may still read.

    A warp-group product (HGMMA) that takes its first factor from registers reads them until the
    next wait (WARPGROUP.DEPBAR). ptxas before 13.3 was seen to reuse such registers earlier.
    Loops are gone through twice, since a product may still run when the next turn begins.
    """
    found = _overwritten(code.instructions)
    return found + sum(_overwritten(body * 2) for body in code.product_loops())


def _overwritten(instructions: list[Instruction]) -> int:
    found = 0
    in_flight: set[int] = set()
    for one in instructions:
        factors = re.match(r"R\d+, R(\d+)", one.operands)
        if one.opcode.startswith("WARPGROUP.DEPBAR"):
            in_flight.clear()
        elif one.opcode.startswith("HGMMA") and factors:
            first = int(factors[1])
            in_flight.update(range(first, first + 4))
        else:
            found += len(written(one) & in_flight)
    return found


def written(one: Instruction) -> set[int]:
    """The general registers that an instruction writes; those of products are left out."""
    if one.opcode.startswith(STORES) or "SETP" in one.opcode:
        return set()
    first = re.match(r"(?:(?:P\d|PT), )*R(\d+)\b", one.operands)
    if first is None:
        return set()
    modifiers = one.opcode.split(".")
    size = 1
    if "128" in modifiers or (modifiers[0] == "LDSM" and "4" in modifiers):
        size = 4
    elif {"64", "WIDE"} & set(modifiers) or modifiers[0] == "CS2R":
        size = 2
    return set(range(int(first[1]), int(first[1]) + size))
