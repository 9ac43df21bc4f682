#!/usr/bin/env python
"""Are the Triton kernels right and fast on this machine's GPU?

    scripts/gpu_check.sh             # in full: under 8 minutes on an H100, no network
    scripts/gpu_check.sh --dry-run   # the same code at toy size, in Triton's interpreter on the CPU

Stages run one after the other, each in processes of its own and with a time of its own:

    parity      the op against the reference, estimators and plans against plain functions
    methods     every method: its plans against the CPU's, patched into every family of the tests
    op          the op's speed against FlashAttention and FlexAttention
    selection   the cost of estimators and of whole plans
    prefill     time-to-first-token of a model shaped like Llama 3.1 8B

Results go to `gpu_NAME.json` and, as a report, to `gpu_NAME.md` after every stage; rows of the
stage that runs are in `gpu_NAME.jsonl`. A stage that fails, hangs or dies leaves the others alone.
Exit code: 0, also where a target is missed; 1 if something failed; 2 if the machine lacks
something, which is then named.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

from gpu_checks import preflight

# Stages, and their shares of the time; what one leaves is for those after it.
STAGES = {"parity": 0.26, "methods": 0.2, "op": 0.18, "selection": 0.12, "prefill": 0.24}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = Path(__file__).resolve().parents[1] / "results"
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, interpreted on the CPU")
    parser.add_argument("--output", type=Path, default=results, help="folder to write to")
    parser.add_argument("--name", help="for gpu_NAME.json; default: the GPU's")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}")
    parser.add_argument("--commit", help="where git cannot tell it")
    # How the processes of a stage are called.
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    wanted = options.stages.split(",")
    if not set(wanted) <= set(STAGES):
        parser.error(f"--stages {options.stages}: choose of {', '.join(STAGES)}")
    if options.dry_run:  # before Triton is imported, here and in the stages
        os.environ["TRITON_INTERPRET"] = "1"
    if not options.stage and (missing := preflight.missing(on_gpu=not options.dry_run)):
        print("gpu_check: this machine lacks\n  " + "\n  ".join(missing), file=sys.stderr)
        return 2
    # Imported here: without torch, what is missing could not be said.
    if options.stage:
        code: int = importlib.import_module("gpu_checks.worker").work(options)
        return code
    shares = {name: STAGES[name] for name in wanted}
    failures: int = importlib.import_module("gpu_checks.check").check(options, shares)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
