"""Needle heat maps: the score by depth of the needle and length of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

from sparse_patch_eval.report.plots import WIDTH, Figure, panel, set_title
from sparse_patch_eval.report.sections import Section
from sparse_patch_eval.runs.format import Sample

# Blue to yellow, even in lightness: readable with every kind of colour blindness, in print and on
# a dark page, which the usual red-yellow-green is not (Nunez et al. 2018, cividis).
_COLOURS = "cividis"
_ROWS = 11
Grid = dict[tuple[str, int], float]


def heat_maps(section: Section) -> list[Figure]:
    """A figure per task whose samples have depths, a panel per method; primary score."""
    tasks: dict[str, dict[str, list[Sample]]] = {}
    for label, run in section.runs.items():
        for sample in run.samples:
            if sample.depth is not None and sample.length is not None and sample.scores:
                tasks.setdefault(sample.task, {}).setdefault(label, []).append(sample)
    return [
        figure for task, by_label in tasks.items() if (figure := _figure(section, task, by_label))
    ]


def _figure(section: Section, task: str, by_label: dict[str, list[Sample]]) -> Figure | None:
    everyone = [sample for samples in by_label.values() for sample in samples]
    depths = sorted({sample.depth for sample in everyone if sample.depth is not None})
    if len(depths) < 2:
        return None
    name = next(iter(everyone[0].scores))
    grids = {label: grid(samples, name, depths) for label, samples in by_label.items()}
    values = [value for cells in grids.values() for value in cells.values()]
    bounded = all(0 <= value <= 1 for value in values)
    low, high = (0.0, 1.0) if bounded else (min(values), max(values))
    rows = list(dict.fromkeys(depth_name(depth, depths) for depth in depths))
    columns = sorted({sample.length for sample in everyone if sample.length is not None})
    panels = tuple(
        panel(
            partial(
                _draw, cells=cells, rows=rows, columns=columns, low=low, high=high, title=label
            ),
            f"heat {section.model} {section.settings} {task} {label}",
            words=f"{name} by length and depth, {task}, {label}",
            size=(WIDTH, 1.1 + 0.3 * len(rows)),
        )
        for label, cells in grids.items()
    )
    return Figure(
        f"Needle heat maps: {task}",
        f"{name}, mean over the samples of a cell; rows: depth of the needle (0 is the start), "
        "columns: length. Colours run from dark blue (low) to yellow (high): even in lightness, "
        "so they can be told apart with any kind of colour blindness.",
        panels,
    )


def grid(samples: Sequence[Sample], name: str, depths: Sequence[float]) -> Grid:
    """Mean score by (depth, length)."""
    cells: dict[tuple[str, int], list[float]] = {}
    for sample in samples:
        if sample.depth is not None and sample.length is not None and name in sample.scores:
            key = (depth_name(sample.depth, depths), sample.length)
            cells.setdefault(key, []).append(sample.scores[name])
    return {key: fmean(values) for key, values in cells.items()}


def depth_name(depth: float, depths: Sequence[float]) -> str:
    """A row's name: the depth itself, or tenths where there are more depths than rows."""
    if len(depths) <= _ROWS:
        return f"{depth:.0%}" if len({f"{d:.0%}" for d in depths}) == len(depths) else f"{depth:g}"
    tenth = min(int(depth * 10), 9)
    return f"{10 * tenth}-{10 * tenth + 10}%"


def _draw(
    axes: Any,
    cells: Grid,
    rows: list[str],
    columns: list[int],
    low: float,
    high: float,
    title: str,
) -> None:
    table = [[cells.get((row, column), float("nan")) for column in columns] for row in rows]
    axes.pcolormesh(table, cmap=_COLOURS, vmin=low, vmax=high, edgecolors="face", linewidth=0.5)
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if value == value:
                dark = value - low < 0.55 * (high - low)
                axes.text(
                    x + 0.5, y + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=10,
                    color="#ffffff" if dark else "#000000",
                )  # fmt: skip
    axes.set_xticks([x + 0.5 for x in range(len(columns))], [f"{n:,}" for n in columns])
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth")
    set_title(axes, title)
