#!/usr/bin/env python
"""Which families of Transformers can be patched, and do they answer as they did?

    python scripts/compatibility.py                            # every family, a few minutes
    python scripts/compatibility.py --families llama,jamba     # these, and no page
    python scripts/compatibility.py --again                    # also those that have a row

A tiny random model of each causal family, and of each family of images and text, in float32 on the
CPU. Patched with `dense`, which keeps everything, it must give the logits that it gives unpatched:
of a padded batch, of a longer prompt, of a second turn with a cache; and the tokens of `generate`.
Patched with `a_shape` and `flexprefill` it must answer a padded row as that row alone. Unpatched
again it must be what it was, bit for bit. What the unpatched model itself does not do is the
family's own, and compared no further.

Families run in a process that may hang or die. Each has a row in `compatibility.jsonl`, so that a
run goes on where it was stopped; after a change of the library, take `--again`. When every family
has one, they go to `compatibility.json`, and the tables into the page for users.

Exit code: 0; 1 if a family is wrong; 2 if there is no such family.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", help="model types, joined by commas; default: all")
    parser.add_argument("--again", action="store_true", help="also families that have a row")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the rows")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "compatibility.md")
    parser.add_argument("--seconds", type=float, default=120, help="that one family may take")
    # How the process is called that checks families.
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    # The tiny models of the tests lie beside this folder, and are not installed.
    sys.path.insert(0, str(ROOT))
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is built from configs
    compat = {name: importlib.import_module(f"compat.{name}") for name in ("families", "run")}
    path = options.output / "compatibility.jsonl"
    if options.work:
        compat["run"].work(options.work.split(","), path, options.seconds)
        return 0
    known = list(compat["families"].families())
    wanted = options.families.split(",") if options.families else known
    if unknown := sorted(set(wanted) - set(known)):
        parser.error(f"--families: Transformers has no {', '.join(unknown)}")
    if options.again:
        compat["run"].forget(path, wanted)
    command = [sys.executable, __file__, "--output", str(options.output)]
    command += ["--seconds", str(options.seconds), "--work"]
    started = time.time()
    compat["run"].run(wanted, path, command)
    rows = [row for row in compat["run"].open_rows(path).rows if row["family"] in known]
    if len(rows) == len(known):
        write(rows, options.output / "compatibility.json", options.page)
    print(f"{len(wanted)} families, {time.time() - started:.0f} s")
    return int(any(row["status"] == "WRONG" for row in rows if row["family"] in wanted))


def write(rows: list[dict[str, Any]], file: Path, page: Path) -> None:
    """The rows as one JSON file with what they were made with, and as tables of the page."""
    table, fetch = map(importlib.import_module, ("compat.table", "sparse_patch_eval.base.fetch"))
    machines = [row.pop("machine") for row in rows]
    versions = {name: rows[0].pop(name) for name in ("torch", "transformers")}
    for row in rows[1:]:
        del row["torch"], row["transformers"]
    commits = sorted({str(machine["git"]) for machine in machines})
    results = {
        "command": "scripts/compatibility.py",
        **versions,
        "commits": commits,
        "machine": machines[-1],
        "summary": table.summary(rows),
        "families": sorted(rows, key=lambda row: row["family"]),
    }
    with fetch.staged(file) as new:
        new.write_text(json.dumps(results, indent=1) + "\n")
    with fetch.staged(page) as new:
        new.write_text(table.page(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(f"{file}, {page}: {results['summary']}")


if __name__ == "__main__":
    sys.exit(main())
