"""The results of `scripts/compile_kernels.py` as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sparse_patch_eval.base.markdown import table

from kernel_checks.binary import Facts
from kernel_checks.checks import complaints, too_long
from kernel_checks.chips import CHIPS, KIB, Chip, Occupancy, occupancy
from kernel_checks.roofline import Roofline, Tile, roofline

Entry = Mapping[str, Any]

ASYNCHRONOUS = ("LDGSTS", "UTMALDG")
TENSOR = ("HGMMA", "UTCHMMA", "HMMA", "MFMA")


def facts_of(entry: Entry) -> Facts | None:
    """What is known of the binary; None: it did not compile."""
    return Facts(**entry["facts"]) if entry["facts"] else None


def failures(entry: Entry) -> list[str]:
    """What is wrong with an entry, each with kernel, chip and configuration."""
    facts, chip = facts_of(entry), CHIPS[entry["chip"]]
    if facts is None:
        wrong = [f"does not compile: {entry['error']}"]
    else:
        wrong = complaints(facts, chip, entry["config"].get("num_stages", 1), entry["default"])
        if entry["default"] and entry.get("most") and facts.loop:
            wrong += too_long(facts, entry["config"]["BLOCK_N"], entry["most"])
    where = f"{kernel_text(entry)} ({case_name(entry)}) on {chip.name}, {config_text(entry)}"
    return [f"{where}: {what}" for what in wrong]


def case_name(entry: Entry) -> str:
    """The same as `Case.name`."""
    return f"{entry['family']}, {entry['shape']}, {entry['dim']}, {entry['dtype']}"


def kernel_text(entry: Entry) -> str:
    """Name of the kernel, numbered where a case launches it with several sets of constants."""
    return str(entry["kernel"]) + (f" ({entry['variant']})" if entry["variant"] > 1 else "")


def config_text(entry: Entry) -> str:
    """`BLOCK_N 64, 8 warps, 3 stages`."""
    config = dict(entry["config"])
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    return ", ".join([*(f"{k} {v}" for k, v in config.items()), f"{warps} warps, {stages} stages"])


def occupancy_of(facts: Facts, chip: Chip) -> Occupancy:
    """Resident programs of a binary."""
    return occupancy(chip, facts.threads, facts.registers, facts.shared, facts.tensor_columns)


def markdown(entries: Sequence[Entry], about: str) -> str:
    """The whole page."""
    chips = [chip for name, chip in CHIPS.items() if any(e["chip"] == name for e in entries)]
    parts = [
        "# What the kernels compile to\n\n"
        f"Output of `scripts/compile_kernels.py`; no GPU took part. {about}\n",
        _verdict(entries),
        _binaries(entries, chips),
        _instructions(entries, chips),
        _roofline(entries, chips),
        _papers(entries),
        _limits(chips),
    ]
    return "\n".join(part for part in parts if part)


def _verdict(entries: Sequence[Entry]) -> str:
    wrong = [line for entry in entries for line in failures(entry)]
    text = f"{len(entries)} binaries, {len(wrong)} faults.\n"
    return text + "".join(f"\n- {line}" for line in wrong) + ("\n" if wrong else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(table(head, "l" * len(head), rows)) + "\n"


def _rows(entries: Iterable[Entry]) -> dict[tuple[str, ...], dict[str, Entry]]:
    """Entries by what a row of the table is, then by chip."""
    rows: dict[tuple[str, ...], dict[str, Entry]] = {}
    for entry in entries:
        fields = ("shape", "dim", "dtype")
        row = (kernel_text(entry), *(str(entry[field]) for field in fields), config_text(entry))
        rows.setdefault(row, {})[entry["chip"]] = entry
    return rows


def _binaries(entries: Sequence[Entry], chips: Sequence[Chip]) -> str:
    rows = (
        [*row, *(_cell(here.get(chip.name), chip) for chip in chips)]
        for row, here in _rows(entries).items()
    )
    return (
        "## Registers / bytes of local memory / KiB of shared memory / programs per multiprocessor"
        "\n\n\\* the default; ! at fault; - not offered there. Local memory in others than the "
        "default is no fault: only tuning, which measures them, picks those. Programs: resident at "
        "once, by registers, shared memory, warps and tensor memory. fp32 products are in full "
        "precision: no tensor cores, on NVIDIA.\n\n"
    ) + _table(["kernel", "case", "dim", "dtype", "configuration", *(c.name for c in chips)], rows)


def _cell(entry: Entry | None, chip: Chip) -> str:
    if entry is None:
        return "-"
    facts = facts_of(entry)
    mark = ("\\*" if entry["default"] else "") + (" !" if failures(entry) else "")
    if facts is None:
        return "none" + mark
    programs = occupancy_of(facts, chip).programs
    return f"{facts.registers}/{facts.local_bytes}/{round(facts.shared / KIB)}/{programs}{mark}"


def _instructions(entries: Sequence[Entry], chips: Sequence[Chip]) -> str:
    rows = (
        [*row, *(_mix(here.get(chip.name)) for chip in chips)]
        for row, here in _rows(e for e in entries if e["default"] and e["dtype"] != "fp16").items()
    )
    return (
        "## Instructions of the defaults: tensor-core / asynchronous copies / exp2 / barriers / all"
        "\n\nCounted once each, however often a loop runs them. Tensor-core: HMMA on sm_80 and "
        "sm_86, HGMMA on sm_90, UTCHMMA on sm_100 (HMMA there for tiles of fewer than 64 rows), "
        "MFMA on gfx942. Copies: LDGSTS, UTMALDG. `kernels.json` has sizes and compile times.\n\n"
    ) + _table(["kernel", "case", "dim", "dtype", "configuration", *(c.name for c in chips)], rows)


def _mix(entry: Entry | None) -> str:
    facts = facts_of(entry) if entry is not None else None
    if facts is None:
        return "-"
    kinds = (TENSOR, ASYNCHRONOUS, ("EX2",), ("BAR",))
    counts = [sum(facts.mix.get(kind, 0) for kind in group) for group in kinds]
    return "/".join(map(str, [*counts, facts.instructions]))


def _forward(entries: Iterable[Entry]) -> list[tuple[Entry, Roofline]]:
    """Forward kernels in bf16 with their estimates."""
    return [
        (e, roofline(Tile.of(e["constants"], e["config"]["num_warps"]), CHIPS[e["chip"]]))
        for e in entries
        if e["kernel"] == "block_sparse_forward" and e["dtype"] == "bf16"
    ]


def _roofline(entries: Sequence[Entry], chips: Sequence[Chip]) -> str:
    """One row per distinct tile: most forms of plans share theirs."""
    seen: dict[tuple[str, ...], dict[str, Roofline]] = {}
    for entry, estimate in _forward(entries):
        rows = str(entry["constants"]["ROWS"])
        seen.setdefault((entry["dim"], rows, config_text(entry)), {})[entry["chip"]] = estimate
    if not seen:
        return ""
    tiles = ([*key, *(_bound(here.get(chip.name)) for chip in chips)] for key, here in seen.items())
    return (
        "## ESTIMATE: the forward kernel against each chip's peak\n\nNot measured. Share of the "
        "dense bf16 peak (keys in L2 / all keys from memory) if copies, products and exp2 overlap "
        "perfectly; in brackets the unit that bounds it with keys in L2, and clocks per tile of "
        "tensor cores, exp2, shared memory, memory. See `scripts/kernel_checks/roofline.py`.\n\n"
    ) + _table(["dim", "rows", "configuration", *(chip.name for chip in chips)], tiles)


def _bound(estimate: Roofline | None) -> str:
    if estimate is None:
        return "-"
    clocks = (estimate.tensor, estimate.exp, estimate.shared, estimate.memory)
    return (
        f"{estimate.share:.0%} / {estimate.share_far:.0%} ({estimate.bound}; "
        f"{', '.join(f'{x:.0f}' for x in clocks)})"
    )


PAPERS = (
    ("FlexPrefill, attention, 128k", "A100", 2.4, "sm_80", 0.72),
    ("FlexPrefill, attention, 128k", "A100", 3.6, "sm_80", 0.72),
    ("HiP, attention, 32k, k=512", "H100", 1.2, "sm_90", 0.75),
    ("HiP, attention, 128k", "H100", 2.0, "sm_90", 0.75),
    ("HiP, attention, 128k", "H100", 4.0, "sm_90", 0.75),
    ("ProxyAttn, attention, 256k", "not given", 10.3, "sm_90", 0.75),
    ("XAttention, attention, 256k", "not given", 13.5, "sm_90", 0.75),
)
"""What, chip, speed-up over dense attention, our chip, and dense attention's share of its peak."""


def _papers(entries: Sequence[Entry]) -> str:
    best = {
        entry["chip"]: estimate
        for entry, estimate in _forward(entries)
        if entry["default"] and entry["dim"] == "128" and entry["shape"] == "blocks of 128"
    }
    rows = []
    for what, chip, speed_up, ours, dense in PAPERS:
        if ours in best:
            shares = (best[ours].share, best[ours].share_far)
            densities = [f"{min(1, share / dense / speed_up):.2f}" for share in shares]
            rows.append([what, chip, f"{speed_up}x", ours, f"{dense:.0%}", *densities])
    if not rows:
        return ""
    return (
        "## ESTIMATE beside what papers measured\n\nThe density below which the default at head "
        "dimension 128 would be as many times faster than dense attention as the paper measured, "
        "at the estimated share of the peak and with selection for free. Dense attention's share "
        "of the peak, as published: 72 % on A100 (FlashAttention-2, arXiv 2307.08691), 75 % on "
        "H100 (FlashAttention-3, arXiv 2407.08608). Where the paper's chip is not known, H100 is "
        "assumed.\n\n"
    ) + _table(
        ["measured", "chip", "speed-up", "ours", "dense", "density, keys in L2", "from memory"],
        rows,
    )


def _limits(chips: Sequence[Chip]) -> str:
    columns: dict[str, Callable[[Chip], float | str]] = {
        "chip": lambda chip: chip.name,
        "warps": lambda chip: chip.warps,
        "programs": lambda chip: chip.blocks,
        "Ki registers": lambda chip: 4 * chip.registers * chip.lanes // KIB,
        "shared, KiB": lambda chip: chip.shared // KIB,
        "of one program": lambda chip: chip.block_shared // KIB,
        "product": lambda chip: chip.product,
        "multiprocessors": lambda chip: chip.units,
        "GHz": lambda chip: chip.clock / 1e9,
        "TFLOPS, bf16": lambda chip: chip.tflops,
        "TB/s": lambda chip: chip.memory / 1e12,
    }
    rows = ([str(of(chip)) for of in columns.values()] for chip in chips)
    return (
        "## The chips\n\nLimits per multiprocessor: CUDA C++ Programming Guide, table of compute "
        "capabilities; AMD CDNA3 ISA guide and LLVM's AMDGPU target. Rates: data sheets of the "
        "product. All sources: `scripts/kernel_checks/chips.py`.\n\n"
    ) + _table([*columns], rows)
