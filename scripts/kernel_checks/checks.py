"""What must hold of a binary before it ever meets a GPU."""

from __future__ import annotations

from kernel_checks.binary import Facts
from kernel_checks.chips import WIDE_ROWS, Chip

ASYNCHRONOUS = ("LDGSTS", "UTMALDG")


def complaints(facts: Facts, chip: Chip, num_stages: int, default: bool) -> list[str]:
    """What is wrong with a binary, one line each.

    Args:
        num_stages: of its configuration; above 1, loops copy tiles ahead of their use.
        default: is it the configuration that runs where nothing is tuned? Only there spills are
            a fault: elsewhere tuning measures what they cost.
    """
    return [
        *(_spills(facts) if default else ()),
        *_products(facts, chip),
        *_memory(facts, chip),
        *_copies(facts, chip, num_stages),
        *_warp_groups(facts),
    ]


def _spills(facts: Facts) -> list[str]:
    if not facts.spills and not facts.local_bytes:
        return []
    return [
        f"{facts.local_bytes} bytes of local memory per thread, {facts.spills} instructions on it"
    ]


def _products(facts: Facts, chip: Chip) -> list[str]:
    """Products of 16-bit numbers must run on tensor cores; those of fp32 are exempt.

    They are asked for in full precision ("ieee"), which NVIDIA's tensor cores do not offer.
    """
    found = []
    if facts.plain_products:
        found.append(f"{facts.plain_products} products of 16-bit numbers without tensor cores")
    if facts.widest:
        wanted = chip.tensor_core if facts.widest < WIDE_ROWS else chip.tensor_core[:1]
        if not any(facts.mix.get(kind) for kind in wanted):
            found.append(f"no {' or '.join(wanted)} for products of up to {facts.widest} rows")
    return found


def _memory(facts: Facts, chip: Chip) -> list[str]:
    found = []
    if facts.shared > chip.block_shared:
        found.append(f"{facts.shared} bytes of shared memory; the chip has {chip.block_shared}")
    if facts.tensor_columns > chip.tensor_columns:
        found.append(
            f"{facts.tensor_columns} columns of tensor memory; the chip has {chip.tensor_columns}"
        )
    return found


def _copies(facts: Facts, chip: Chip, num_stages: int) -> list[str]:
    if not chip.asynchronous or num_stages < 2 or not facts.looped:
        return []
    if any(facts.mix.get(kind) for kind in ASYNCHRONOUS):
        return []
    return [f"no asynchronous copies in a loop of {num_stages} stages"]


def _warp_groups(facts: Facts) -> list[str]:
    """Asynchronous products of warp groups (HGMMA) must overlap, and find what they read."""
    found = []
    if facts.serialized:
        found.append("products of a warp group wait for one another (C7515)")
    if facts.overwritten:
        found.append(f"{facts.overwritten} writes to registers that a product may still read")
    return found


def too_long(facts: Facts, keys: int, most: int) -> list[str]:
    """Where the loop over keys that all rows see takes more than `most` instructions.

    Args:
        keys: of a turn of the loop.
        most: instructions a warp may spend on 128 keys.
    """
    spent = facts.loop * 128 // keys
    return [f"{spent} instructions for 128 keys, more than {most}"] if spent > most else []
