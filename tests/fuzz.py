"""Random cases against the reference, for as long as you like.

    python tests/fuzz.py --minutes 10 --seed 0   # every failure with the command that repeats it
    python tests/fuzz.py --case 123              # one case

The cases of a seed come in a fixed order; time only says how far it goes. What they are is in
`fuzz_cases.py`. They are small: on a busy machine OMP_NUM_THREADS=1 gets through many more.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "kernels", "eval") if __name__ == "__main__"]

from tests.fuzz_cases import CHECKS  # noqa: E402

CASES_PER_SEED = 1_000_000


@dataclass(frozen=True)
class Outcome:
    """What one case drew, and what went wrong, if anything."""

    number: int
    says: str
    error: str | None = None


def run_case(number: int) -> Outcome:
    check = CHECKS[number % len(CHECKS)]
    try:
        return Outcome(number, check(number))
    except Exception as error:
        repeat = f"python tests/fuzz.py --case {number}"
        return Outcome(number, repeat, f"{repeat}\n{error}\n{traceback.format_exc()}")


def cases(seconds: float, seed: int) -> Iterator[Outcome]:
    """One of each kind at least, then as many as time allows."""
    end = time.monotonic() + seconds
    for i in range(CASES_PER_SEED):
        if i >= len(CHECKS) and time.monotonic() > end:
            return
        yield run_case(seed * CASES_PER_SEED + i)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--verbose", action="store_true", help="say what each case was")
    options = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")  # exact calls are expected here
    if options.case is not None:
        outcomes = iter([run_case(options.case)])
    else:
        outcomes = cases(60 * options.minutes, options.seed)
    done: Counter[str] = Counter()
    for outcome in outcomes:
        done["failed" if outcome.error else outcome.says.partition(":")[0]] += 1
        if outcome.error:
            print(outcome.error, flush=True)
        elif options.verbose or options.case is not None:
            print(outcome.number, outcome.says, flush=True)
    print(", ".join(f"{kind} {n}" for kind, n in sorted(done.items())))
    return 1 if done["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
