"""`sparse-patch report`: runs in, Markdown, CSV and an HTML page out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparse_patch_eval.base.console import note, user_errors


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders of `sparse-patch eval`, or folders that hold some."),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for report.html, report.md, summary.csv, samples.csv.")
    ] = Path("report"),
    answers: Annotated[
        int, typer.Option(min=0, help="Number of differing answers to show per method.")
    ] = 20,
) -> None:
    """Compare finished or half-finished runs with their dense baseline.

    Writes one HTML page that needs no network (tables, figures, differing answers, the command that
    reproduces the runs), the main table as Markdown, and two CSV files with unformatted numbers.
    """
    with user_errors():
        # Imported here, so that the other commands work without the packages of a report.
        from sparse_patch_eval.base.early import check_output, require
        from sparse_patch_eval.report.comparison import compare_section
        from sparse_patch_eval.report.page import page
        from sparse_patch_eval.report.sections import sections
        from sparse_patch_eval.report.text import markdown, write_samples, write_summary
        from sparse_patch_eval.runs.reading import find_runs

        require("a report", "jinja2", "matplotlib", "scipy", extra="eval")
        check_output(output)
        loaded = find_runs(runs)
        parts = sections(loaded)
        rows = [row for part in parts for row in compare_section(part)]
        if not rows:
            raise ValueError(f"RUNS: {len(loaded)} runs, none with a finished sample yet")
        html = page(parts, rows, answers=answers)
        output.mkdir(parents=True, exist_ok=True)
        (output / "report.html").write_text(html, encoding="utf-8")
        (output / "report.md").write_text(markdown(rows), encoding="utf-8")
        write_summary(output / "summary.csv", rows)
        write_samples(output / "samples.csv", parts)
    for run in loaded:
        for line in run.notes:
            note(f"{run.folder}: {line}")
    for name in ("report.html", "report.md", "summary.csv", "samples.csv"):
        print(f"wrote {output / name}")
