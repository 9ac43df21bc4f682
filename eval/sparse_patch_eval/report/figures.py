"""The figures of a report: score against density and length, differences to dense, speed-up."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from sparse_patch_eval.report.comparison import Comparison, speed_ups
from sparse_patch_eval.report.heatmaps import heat_maps
from sparse_patch_eval.report.plots import (
    INK,
    WIDTH,
    Figure,
    Style,
    legend,
    panel,
    set_title,
    shorten,
    styles,
)
from sparse_patch_eval.report.scores import Score
from sparse_patch_eval.report.sections import Section


def figures(section: Section, rows: Sequence[Comparison]) -> list[Figure]:
    """All figures that a section's rows have data for."""
    looks = styles(section)
    drawn = [
        _against_density(section, rows, looks),
        _forest(rows, looks),
        _against_length(section, rows, looks),
        _speed_up(section, looks),
        *heat_maps(section),
    ]
    return [figure for figure in drawn if figure.panels]


def overall(rows: Sequence[Comparison]) -> list[list[Comparison]]:
    """Per benchmark and length, the rows of its average, or of its only task."""
    groups: dict[tuple[str, int | None], list[Comparison]] = {}
    averaged = {row.benchmark for row in rows if row.is_average}
    for row in rows:
        if row.is_average or row.benchmark not in averaged:
            groups.setdefault((row.benchmark, row.length), []).append(row)
    return list(groups.values())


def cells(rows: Sequence[Comparison]) -> list[tuple[str, list[Comparison]]]:
    """The content of each panel: a score and the rows that have it, by benchmark and score."""
    pairs = [
        (name, [row for row in group if name in row.scores])
        for group in overall(rows)
        for name in shown(group)
    ]
    first = {cell: number for number, cell in enumerate(dict.fromkeys(map(_series, pairs)))}
    return sorted(pairs, key=lambda cell: first[_series(cell)])  # keeps the order of lengths


def _series(cell: tuple[str, list[Comparison]]) -> tuple[str, str]:
    name, rows = cell
    return rows[0].benchmark, name


def shown(rows: Sequence[Comparison]) -> list[str]:
    """The scores to draw: those that can be measured, without perplexity."""
    names = dict.fromkeys(name for row in rows for name in row.scores)
    return [
        name
        for name in names
        if name != "perplexity"
        and not any(row.scores[name].measurable is False for row in rows if name in row.scores)
    ]


def where(row: Comparison) -> str:
    """`ruler average, 4,096 tokens`."""
    name = f"{row.benchmark} average" if row.is_average else row.task
    return name if row.length is None else f"{name}, {row.length:,} tokens"


def axis_name(score: Score) -> str:
    return f"{score.name} ({'higher' if score.higher_is_better else 'lower'} is better)"


def front(points: Sequence[tuple[float, float]], *, higher_is_better: bool) -> list[int]:
    """Indices of the (density, score) points that no other point beats in both, by density."""
    sign = 1 if higher_is_better else -1
    kept: list[int] = []
    for number in sorted(range(len(points)), key=lambda n: (points[n][0], -sign * points[n][1])):
        if not kept or sign * points[number][1] > sign * points[kept[-1]][1]:
            kept.append(number)
    return kept


def _against_density(
    section: Section, rows: Sequence[Comparison], looks: dict[str, Style]
) -> Figure:
    panels = []
    for name, group in cells(rows):
        has = [row for row in group if row.density is not None]
        if any(not section.runs[row.method].is_dense for row in has):
            title = where(group[0])
            panels.append(
                panel(
                    partial(_draw_density, section=section, rows=has, name=name, looks=looks),
                    f"density {section.model} {section.settings} {title} {name}",
                    words=f"{name} against density, {title}",
                )
            )
    return Figure(
        "Score against density",
        "Left is cheaper. Filled and joined: a method's Pareto front over its settings; hollow: "
        "another setting of the method keeps less and scores no worse. Faint: most calls ran "
        "exact, so the score is dense's. Dashed: dense.",
        tuple(panels),
        legend(looks, f"density {section.model} {section.settings}"),
    )


def _draw_density(
    axes: Any, section: Section, rows: list[Comparison], name: str, looks: dict[str, Style]
) -> None:
    families: dict[str, list[Comparison]] = {}
    for row in rows:
        families.setdefault(section.runs[row.method].family, []).append(row)
    for family, members in families.items():
        if family == "dense":
            axes.axhline(members[0].scores[name].mean, color=INK, linestyle="--", linewidth=1)
            continue
        better = members[0].scores[name].higher_is_better
        points = [(row.density or 0.0, row.scores[name].mean) for row in members]
        best = front(points, higher_is_better=better)
        colour = looks[members[0].method].colour
        axes.plot(*zip(*(points[n] for n in best), strict=True), color=colour, linewidth=1.3)
        for number, (point, row) in enumerate(zip(points, members, strict=True)):
            inside = colour if number in best else "none"
            axes.plot(*point, **_marker(row, looks, inside))
    axes.set_xlim(0, 1.03)
    axes.set_xlabel("density (kept / causal blocks)")
    axes.set_ylabel(axis_name(rows[0].scores[name]))
    axes.grid()
    set_title(axes, where(rows[0]))


def _marker(row: Comparison, looks: dict[str, Style], inside: str) -> dict[str, Any]:
    style = looks[row.method]
    return {
        "marker": style.marker,
        "markersize": 7,
        "color": style.colour,
        "markerfacecolor": inside,
        "alpha": 0.35 if row.is_mostly_exact else 1,
    }


def _forest(rows: Sequence[Comparison], looks: dict[str, Style]) -> Figure:
    panels = []
    for name, group in cells(rows):
        has = [row for row in group if row.scores[name].difference is not None]
        if has:
            section, title = has[0].section, where(group[0])
            panels.append(
                panel(
                    partial(_draw_forest, rows=has, name=name, looks=looks),
                    f"forest {section.model} {section.settings} {title} {name}",
                    words=f"difference to dense in {name}, {title}",
                    size=(WIDTH, 1.15 + 0.5 * len(has)),
                )
            )
    return Figure(
        "Difference to dense",
        "Mean over paired samples and its 95 % bootstrap interval; the line at 0 is dense. Filled: "
        "the interval excludes 0. Faint: most calls ran exact, so the score is dense's.",
        tuple(panels),
    )


def _draw_forest(axes: Any, rows: list[Comparison], name: str, looks: dict[str, Style]) -> None:
    for place, row in enumerate(rows):
        gap = row.scores[name].difference
        assert gap is not None
        style = looks[row.method]
        inside = style.colour if row.scores[name].is_clear else "none"
        axes.plot([gap.low, gap.high], [place, place], color=style.colour, linewidth=2)
        axes.plot(gap.mean, place, **_marker(row, looks, inside))
        axes.text(
            0.01, place - 0.36, shorten(row.method, 46), fontsize=10, va="center",
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    axes.axvline(0, color=INK, linestyle="--", linewidth=1)
    axes.set_ylim(len(rows) - 0.5, -0.8)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"difference in {axis_name(rows[0].scores[name])}", fontsize=10)
    axes.grid(axis="x")
    set_title(axes, where(rows[0]))


def _against_length(
    section: Section, rows: Sequence[Comparison], looks: dict[str, Style]
) -> Figure:
    lines: dict[tuple[str, str], list[Comparison]] = {}
    for row in rows:
        if row.length is not None:
            lines.setdefault((row.benchmark, row.task), []).append(row)
    panels = []
    for (benchmark, task), group in lines.items():
        if len({row.length for row in group}) < 2:
            continue
        for name in shown(group):
            title = f"{benchmark} {task}" if group[0].is_average else task
            has = [row for row in group if name in row.scores]
            points = [(row.method, row.length, row.scores[name].mean) for row in has]
            panels.append(
                panel(
                    partial(
                        _draw_length,
                        points=points,
                        looks=looks,
                        y_name=axis_name(has[0].scores[name]),
                        title=title,
                    ),
                    f"length {section.model} {section.settings} {title} {name}",
                    words=f"{name} against length, {title}",
                )
            )
    return Figure(
        "Score against length",
        "Tasks with at least two lengths, and scores that can be measured at all of these.",
        tuple(panels),
        legend(looks, f"length {section.model} {section.settings}"),
    )


def _speed_up(section: Section, looks: dict[str, Style]) -> Figure:
    points = [
        (label, length, ratio)
        for (label, length), ratio in speed_ups(section).items()
        if length is not None
    ]
    used = {label: style for label, style in looks.items() if label in {p[0] for p in points}}
    panels = []
    if points:
        name = f"speed-up {section.model} {section.settings}"

        def draw(axes: Any) -> None:
            _draw_length(axes, points, looks, "dense time / time", "Prefill speed-up over dense")
            axes.axhline(1, color=INK, linestyle="--", linewidth=1)

        panels.append(panel(draw, name, words="prefill speed-up over dense against length"))
    return Figure(
        "Speed-up",
        "Prefill time of dense over the method's, median over paired samples of all tasks on one "
        "machine. Below the dashed line the method is slower than dense.",
        tuple(panels),
        legend(used, f"speed-up {section.model} {section.settings}"),
    )


def _draw_length(
    axes: Any,
    points: Sequence[tuple[str, Any, float]],
    looks: dict[str, Style],
    y_name: str,
    title: str,
) -> None:
    lengths = sorted({length for _, length, _ in points})
    for label, style in looks.items():
        line = sorted((length, y) for name, length, y in points if name == label)
        if line:
            axes.plot(*zip(*line, strict=True), **style.line(), linewidth=1.3, markersize=5)
    if len(lengths) > 1:
        axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel(y_name)
    axes.grid()
    set_title(axes, title)
