"""An estimate of the forward kernel's speed: what its inner loop asks of each unit of a chip.

Per tile of keys and multiprocessor, in clocks, each unit as if it had the chip to itself:

    tensor cores    2 rows keys (dim + v_dim), padded, over the chip's rate
    exp2            rows keys + rows, over 16 a clock
    shared memory   keys (dim + v_dim) written once and read by each group of rows, over 128 bytes;
                    where the tensor cores read q from there too (HGMMA, UTCHMMA), q as well
    memory          keys (dim + v_dim), over an equal share of the bandwidth; nothing where another
                    program left the keys in L2

The slowest bounds the loop when all overlap perfectly. Nothing else is in it: no latency, no index
lists, no masks, no other arithmetic of the softmax. An upper bound, not a prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kernel_checks.chips import Chip

ROW_GROUP = {"HGMMA": 64, "UTCHMMA": 128}
"""Rows for which one instruction reads keys from shared memory; elsewhere every warp reads them."""


@dataclass(frozen=True)
class Tile:
    """One step of the inner loop.

    Attributes:
        rows: query rows; keys: of the tile.
        dim, v_dim: head dimensions; padded: both together as the tile has them.
        warps: of the program.
        itemsize: bytes a number.
    """

    rows: int
    keys: int
    dim: int
    v_dim: int
    padded: int
    warps: int
    itemsize: int = 2

    @classmethod
    def of(cls, constants: Mapping[str, Any], warps: int) -> Tile:
        """From the constants of `block_sparse_forward`."""
        return cls(
            rows=constants["ROWS"],
            keys=constants["BLOCK_N"],
            dim=constants["D"],
            v_dim=constants["V"],
            padded=sum(constants[name] for name in ("D0", "D1", "V0", "V1")),
            warps=warps,
        )


@dataclass(frozen=True)
class Roofline:
    """Clocks per tile that each unit takes, and what share of the chip's peak remains.

    Attributes:
        share: useful products over peak, keys in L2; `share_far`: all keys from memory.
        bound: the slowest unit, keys in L2.
    """

    tensor: float
    exp: float
    shared: float
    memory: float
    share: float
    share_far: float
    bound: str


def roofline(tile: Tile, chip: Chip) -> Roofline:
    """The estimate for a tile of 16-bit numbers."""
    useful = 2 * tile.rows * tile.keys * (tile.dim + tile.v_dim) / chip.flops
    near = {
        "tensor": 2 * tile.rows * tile.keys * tile.padded / chip.flops,
        "exp": tile.rows * (tile.keys + 1) / chip.exps,
        "shared": _shared_bytes(tile, chip) / chip.shared_rate,
    }
    wanted = tile.keys * (tile.dim + tile.v_dim) * tile.itemsize
    memory = wanted / (chip.memory / chip.units / chip.clock)
    slowest = max(near.values())
    return Roofline(
        **near,
        memory=memory,
        share=useful / slowest,
        share_far=useful / max(slowest, memory),
        bound=max(near, key=lambda unit: near[unit]),
    )


def _shared_bytes(tile: Tile, chip: Chip) -> float:
    """Bytes that go to and from shared memory for one tile."""
    keys = tile.keys * tile.padded * tile.itemsize
    group = ROW_GROUP.get(chip.tensor_core[0])
    if group is None or tile.rows < 64:
        # A warp has 16 rows or more; q stays in its registers.
        return keys + min(tile.warps, tile.rows // 16) * keys
    q = tile.rows * tile.dim * tile.itemsize
    return keys + -(-tile.rows // group) * keys + q
