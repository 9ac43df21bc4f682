"""The whole check: stages one after the other, and the files that come of them."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparse_patch_eval.base.fetch import staged
from sparse_patch_eval.base.machine import machine
from sparse_patch_eval.base.rows import read_rows

from gpu_checks import report
from gpu_checks.device import Device
from gpu_checks.process import Process, watch
from gpu_checks.scale import FULL, TOY
from gpu_checks.stage import COMPARING

# A process that has not stopped by itself so long after its deadline is stopped.
GRACE_SECONDS = 30.0


def check(options: argparse.Namespace, shares: Mapping[str, float]) -> int:
    """Run the stages, each with its share of the time, and return how many failures there were.

    Args:
        options: the command line's.
        shares: of each stage; what one leaves is for those after it.
    """
    started, scale = time.time(), TOY if options.dry_run else FULL
    about = machine() | ({"git": options.commit} if options.commit else {})
    gpu = Device(scale.on_gpu).describe()
    name = options.name or re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"gpu_{name}.json"
    rows = path.with_suffix(".jsonl")
    rows.unlink(missing_ok=True)
    results: dict[str, Any] = {
        "gpu": gpu,
        "machine": {**about, "triton": version("triton")},
        "commit": about["git"],
        "command": " ".join(["scripts/gpu_check.sh", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "dry_run": options.dry_run,
        "stages": [],
    }
    # Stopped from outside, it stops its processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as scratch:
        # What an earlier run compiled or tuned is not to be seen.
        os.environ["TRITON_CACHE_DIR"] = str(Path(scratch) / "triton")
        left = dict(shares)
        while left:
            stage, now = next(iter(left)), time.time()
            seconds = max(0.0, started + options.minutes * 60 - now) * left[stage]
            seconds /= sum(left.values())
            del left[stage]
            print(f"[{stage}] at most {seconds:.0f} s", flush=True)
            _run(options, stage, rows, now + seconds, Path(scratch))
            results["stages"].append({"name": stage, "seconds": time.time() - now})
            found = read_rows(rows)
            targets = [asdict(target) for target in report.targets(found, scale)]
            failures = report.failures(found)
            results |= {"seconds": time.time() - started, "targets": targets}
            results |= {"failures": failures, "rows": found}
            with staged(path) as new:
                new.write_text(json.dumps(results, indent=1) + "\n")
            with staged(path.with_suffix(".md")) as new:
                new.write_text(report.markdown(results))
    rows.unlink()
    print(path.with_suffix(".md").read_text())
    print(f"{path}: {len(failures)} failures")
    return len(failures)


def _run(
    options: argparse.Namespace, stage: str, rows: Path, deadline: float, scratch: Path
) -> None:
    """One stage, in one process; in several if it times nothing, as it mostly compiles then."""
    parts = 1
    if stage in COMPARING:
        most = (TOY if options.dry_run else FULL).processes
        parts = max(1, min(most, (os.cpu_count() or 1) - 1))
    command = [sys.executable, str(Path(__file__).parents[1] / "gpu_check.py"), "--stage", stage]
    command += ["--rows", str(rows), "--deadline", str(deadline)]
    command += ["--dry-run"] if options.dry_run else []
    processes = [
        Process([*command, "--part", f"{part}/{parts}"], scratch / f"{stage}_{part}.log")
        for part in range(parts)
    ]
    watch(processes, deadline + GRACE_SECONDS, functools.partial(_say, stage, rows))
    for part, one in enumerate(processes):
        if error := one.error():
            row = {"stage": stage, "kind": "error", "item": f"process {part + 1}", "error": error}
            with rows.open("a") as lines:
                lines.write(json.dumps(row) + "\n")


def _say(stage: str, rows: Path) -> None:
    done = len(report.of_kind(report.of_stage(read_rows(rows), stage), "end"))
    print(f"[{stage}] {done} items done", flush=True)
