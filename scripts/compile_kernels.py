#!/usr/bin/env python
"""Compile every Triton kernel for chips that are not there, and look at what comes out.

    python scripts/compile_kernels.py --output results

Calls the launchers on tensors without memory, compiles every launch they make with every
configuration they offer for sm_80, sm_86, sm_90, sm_100 and gfx942, and reads registers, spills,
shared memory and instructions from the binaries. Needs Triton; no GPU.

Writes `kernels.json` (an entry per binary) and `kernels.md` into the output folder. A binary whose
source, types, constants and options have not changed is not compiled again. Ends with exit code 1
if one has a fault: local memory in a default, no tensor cores for products, more shared memory than
the chip has, no asynchronous copies in a pipelined loop, products of warp groups that wait for one
another or whose registers are overwritten, or too many instructions a key in the forward kernel.

Triton brings its own ptxas, and another version makes other binaries. What holds under one Triton
is asked of another in an environment of its own, with results in a folder of their own:

    pip install --no-deps --target /tmp/triton-3.6 triton==3.6.0
    PYTHONPATH=/tmp/triton-3.6 python scripts/compile_kernels.py --output /tmp/kernels-3.6
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer
from kernel_checks.binary import facts
from kernel_checks.chips import CHIPS, Chip
from kernel_checks.report import Entry, case_name, config_text, failures, markdown
from sparse_patch_eval.base.console import console, fail, progress
from sparse_patch_eval.base.fetch import staged
from sparse_patch_eval.base.machine import machine

try:
    import triton
    from kernel_checks.build import Build, assembler, door_chip
    from kernel_checks.case import Case
    from kernel_checks.cases import cases
    from sparse_patch_kernels.triton.launch import INTERPRETED, Launch, recording
    from triton import knobs
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install triton (Linux only)") from error

QUICK_CHIPS = ("sm_80", "sm_90", "gfx942")
SAVE_EVERY = 20.0
"""Seconds between writes of the entries so far."""


@dataclass(frozen=True)
class Job:
    """A binary to make: configuration number `config` of launch number `launch` of a case.

    Attributes:
        about: the fields of its entry that are known beforehand, `key` (see `Build.key`) included.
    """

    case: Case
    launch: int
    config: int
    chip: str
    about: Entry


def main(
    output: Annotated[Path, typer.Option(help="Folder for kernels.json and kernels.md.")] = Path(
        "results"
    ),
    chips: Annotated[str, typer.Option(help="As in `sm_90,gfx942`. Default: all.")] = "",
    kernels: Annotated[str, typer.Option(help="Only cases with this in their name.")] = "",
    quick: Annotated[bool, typer.Option(help="A few cases on three chips, in a minute.")] = False,
    every_config: Annotated[
        bool, typer.Option(help="All configurations even where the default stands for them.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = min(8, os.cpu_count() or 1),
) -> None:
    """Compile the kernels ahead of time and check the binaries."""
    if INTERPRETED:
        fail("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    on = chips.split(",") if chips else [*(QUICK_CHIPS if quick else CHIPS)]
    if unknown := set(on) - set(CHIPS):
        fail(f"--chips {chips}: no {', '.join(sorted(unknown))}; there are {', '.join(CHIPS)}")
    chosen = [case for case in cases() if kernels in case.name and (case.quick or not quick)]
    if not chosen:
        fail(f"--kernels {kernels}: no case has that in its name")
    offered = [job for case in chosen for name in on for job in jobs_of(case, CHIPS[name])]
    todo = [
        job
        for job in offered
        if job.about["default"] or every_config or (job.case.every_config and not quick)
    ]
    file = output / "kernels.json"
    output.mkdir(parents=True, exist_ok=True)
    known = _current(_read(file), chosen, on, offered)
    entries = run(todo, known, file, jobs)
    mine = {_place(job.about) for job in todo}
    wrong = [line for entry in entries if _place(entry) in mine for line in failures(entry)]
    (output / "kernels.md").write_text(markdown(entries, describe(environment())))
    for line in wrong:
        typer.echo(f"FAULT: {line}", err=True)
    console.print(f"{len(todo)} binaries, {len(wrong)} faults; see {output / 'kernels.md'}")
    raise typer.Exit(1 if wrong else 0)


def jobs_of(case: Case, chip: Chip) -> list[Job]:
    """The binaries that a case comes down to on a chip; launches of the same one count once."""
    jobs: dict[str, Job] = {}
    variants: Counter[str] = Counter()
    for i, launch in enumerate(_launches(case, chip)):
        if Build.of(launch, launch.configs[0], chip).key in jobs:
            continue
        variants[launch.kernel.__name__] += 1
        for j, config in enumerate(launch.configs):
            build = Build.of(launch, config, chip)
            about = {
                "family": case.family,
                "kernel": build.kernel,
                "variant": variants[build.kernel],
                "shape": case.shape,
                "dim": case.width,
                "dtype": case.dtype,
                "config": {
                    **config.kwargs,
                    "num_warps": config.num_warps,
                    "num_stages": config.num_stages,
                },
                "default": j == 0,
                "chip": chip.name,
                "most": case.most.get(chip.name),
                "constants": _plain(build.constants),
                "key": build.key,
            }
            jobs.setdefault(build.key, Job(case, i, j, chip.name, about))
    return list(jobs.values())


def _launches(case: Case, chip: Chip) -> list[Launch]:
    with recording(door_chip(chip)) as launches:
        case.call()
    if not launches:
        raise RuntimeError(f"{case.name}: launches nothing on {chip.name}")
    if without := [x.kernel.__name__ for x in launches if not x.configs]:
        raise RuntimeError(f"{case.name}: no configuration of {without} fits {chip.name}")
    return launches


def compiled(job: Job) -> dict[str, Any]:
    """The entry of a job. Runs in any process: the launch is recorded anew."""
    chip = CHIPS[job.chip]
    launch = _launches(job.case, chip)[job.launch]
    build = Build.of(launch, launch.configs[job.config], chip)
    try:
        made = build.compile()
    except Exception as error:
        # Whatever Triton, LLVM or ptxas object to is a finding, and no reason to stop. A message of
        # Triton's quotes the source first.
        message = (str(error).strip().splitlines() or [""])[-1]
        return {**job.about, "facts": None, "error": f"{type(error).__name__}: {message}"}
    known = asdict(facts(made.kernel, made.log))
    return {**job.about, "facts": known, "seconds": round(made.seconds, 2)}


def _current(
    entries: Sequence[Entry], chosen: Sequence[Case], on: Sequence[str], offered: Sequence[Job]
) -> list[Entry]:
    """Entries without those whose case is gone, or offers that binary no more."""
    names = {case.name for case in cases()}
    looked_at = {(case.name, chip) for case in chosen for chip in on}
    keys = {(job.case.name, job.chip, job.about["key"]) for job in offered}
    return [
        entry
        for entry in entries
        if (case_name(entry), entry["chip"], entry["key"]) in keys
        or (case_name(entry) in names and (case_name(entry), entry["chip"]) not in looked_at)
    ]


def run(todo: Sequence[Job], known: Sequence[Entry], file: Path, processes: int) -> list[Entry]:
    """Compile what `known` does not have; write all entries to `file`, and now and then."""
    done = {entry["key"]: entry for entry in known if entry["facts"]}
    places = {_place(job.about) for job in todo}
    entries = [entry for entry in known if _place(entry) not in places]
    entries += [{**done[job.about["key"]], **job.about} for job in todo if job.about["key"] in done]
    missing = [job for job in todo if job.about["key"] not in done]
    # Defaults first: most of what can be a fault is theirs.
    missing.sort(key=lambda job: not job.about["default"])
    saved = time.monotonic()
    try:
        # Workers first: once the bar's thread is there, a fork would copy its locks.
        with _workers(missing, processes) as ready, progress() as bar:
            task = bar.add_task("kernels", total=len(todo), completed=len(todo) - len(missing))
            for entry in ready:
                entries.append(entry)
                bar.update(task, advance=1, description=f"{entry['kernel']}, {entry['chip']}")
                if time.monotonic() - saved > SAVE_EVERY:
                    _write(file, entries)
                    saved = time.monotonic()
    finally:
        _write(file, entries)
    return sorted(entries, key=_place)


@contextlib.contextmanager
def _workers(jobs: Sequence[Job], processes: int) -> Iterator[Iterator[dict[str, Any]]]:
    """Entries of the jobs as they get ready."""
    if processes == 1 or len(jobs) < 2:
        yield map(compiled, jobs)
        return
    pool = ProcessPoolExecutor(processes, mp_context=get_context("fork"))
    futures = [pool.submit(compiled, job) for job in jobs]
    try:
        yield (future.result() for future in as_completed(futures))
    finally:
        pool.shutdown(cancel_futures=True)


def _place(entry: Entry) -> tuple[Any, ...]:
    """Where an entry stands among the others; differs between any two."""
    dims = tuple(map(int, re.findall(r"\d+", entry["dim"])))
    case = (entry["family"], entry["shape"], dims, entry["dtype"])
    binary = (entry["kernel"], entry["variant"], config_text(entry))
    return (*case, *binary, list(CHIPS).index(entry["chip"]))


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    entries: list[dict[str, Any]] = json.loads(file.read_text())["entries"]
    return entries


def _write(file: Path, entries: Sequence[Entry]) -> None:
    """All at once, an entry a line: a kill leaves the old file."""
    lines = ",\n".join(json.dumps(entry) for entry in sorted(entries, key=_place))
    head = json.dumps(environment(), indent=1).removesuffix("\n}")
    with staged(file) as new:
        new.write_text(f'{head},\n "entries": [\n{lines}\n]}}\n')


@functools.cache
def environment() -> dict[str, Any]:
    """Machine, versions of the compilers, and commit."""
    about = machine()
    return {
        "machine": {name: about[name] for name in ("device", "platform", "python", "torch")},
        "versions": {
            "triton": triton.__version__,
            **{
                f"ptxas ({name})": assembler(chip)
                for name, chip in CHIPS.items()
                if chip.target().backend == "cuda"
            },
            "nvdisasm": knobs.nvidia.nvdisasm.version,
        },
        "commit": about["git"],
    }


def describe(about: dict[str, Any]) -> str:
    """The environment in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"Commit {about['commit']}; {versions}; {about['machine']['device']}."


if __name__ == "__main__":
    typer.run(main)
