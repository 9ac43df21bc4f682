"""`sparse-patch doctor`: the machine, what will run on it and why, and a short self-test."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from sparse_patch_eval.base.console import note, visible


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say what runs on this machine and why, and test it in about ten seconds.

    Versions, the processor, GPUs, the compiler, the backend on each device with the reason, caches
    with their size, environment variables that matter. Then the op is compared with its definition
    in every dtype, and a tiny patched model with itself, on every device. Paste all of it into a
    bug report. Exit status 1 where a check fails.
    """
    from sparse_patch_eval.ask.doctor import about_this_machine, devices
    from sparse_patch_eval.ask.self_test import self_test

    facts, checks = about_this_machine(), []
    if not as_json:
        for section, lines in facts.items():
            typer.echo(f"{section}")
            for name, value in lines.items():
                typer.echo(visible(f"  {name}: {value}" if value != "" else f"  {name}"))
        typer.echo("self-test")
    for check in self_test(devices()):
        checks.append(check)
        if not as_json:
            word = "ok" if check.ok else "FAILS"
            typer.echo(visible(f"  {word}  {check.name}: {check.found} ({check.seconds:.1f} s)"))
    failed = sum(not check.ok for check in checks)
    if as_json:
        tested = [asdict(check) for check in checks]
        typer.echo(json.dumps({**facts, "self-test": tested, "ok": not failed}, indent=1))
    elif failed:
        note(f"{failed} of {len(checks)} checks fail: paste all of the above into a bug report")
    else:
        typer.echo(f"all {len(checks)} checks hold")
    if failed:
        raise typer.Exit(1)
