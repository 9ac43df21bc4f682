"""Drawing of a report's figures: small panels of inline SVG for phones, light and dark pages.

A figure is several panels rather than one wide picture: a page lays them side by side or below one
another, and their letters stay readable at 360 px. Axes and letters take the page's text colour
(`currentColor`), letters stay letters, and the same runs give the same bytes.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

from sparse_patch_eval.report.sections import Section

# Middle tones: each stands out on white and on near-black. A family of methods shares a colour, its
# members differ in marker and dash.
_COLOURS = (
    "#3987d6", "#e0752d", "#2b9f6a", "#c4569f", "#8f79d8", "#b8921c", "#1a9fb0", "#d8504d",
    "#7c8f38", "#9a715f",
)  # fmt: skip
_MARKERS = "osD^vPX<>ph*"
_DASHES = ("-", "--", "-.", ":")
# A placeholder colour, which becomes the page's text colour.
INK = "#010203"
WIDTH, HEIGHT = 4.6, 3.2
_SETTINGS = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
}


@dataclass(frozen=True)
class Panel:
    """An `<svg>` element and its description in words."""

    svg: str
    words: str


@dataclass(frozen=True)
class Figure:
    """Panels under one heading; `legend`: methods, each with an `<svg>` of its line."""

    title: str
    caption: str
    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    colour: str
    marker: str
    dash: str

    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dash}


def styles(section: Section) -> dict[str, Style]:
    """One style per label; dense is drawn in the page's text colour."""
    families: dict[str, list[str]] = {}
    for label, run in section.runs.items():
        families.setdefault(run.family, []).append(label)
    sparse = [family for family in families if family != "dense"]
    result = {}
    for family, labels in families.items():
        for number, label in enumerate(labels):
            colour = INK
            if family in sparse:
                colour = _COLOURS[sparse.index(family) % len(_COLOURS)]
            marker = _MARKERS[number % len(_MARKERS)]
            result[label] = Style(colour, marker, _DASHES[number % len(_DASHES)])
    return result


def legend(looks: Mapping[str, Style], name: str) -> tuple[tuple[str, str], ...]:
    """Line and marker of each method; `name` must be unique on the page."""
    return tuple(
        (
            label,
            panel(
                partial(_draw_swatch, style=style),
                f"legend {name} {label}",
                words=label,
                size=(0.6, 0.25),
            ).svg,
        )
        for label, style in looks.items()
    )


def _draw_swatch(axes: Any, style: Style) -> None:
    axes.plot([0, 1, 2], [0, 0, 0], **style.line(), markersize=8, linewidth=2, markevery=[1])
    axes.set_axis_off()


def panel(
    draw: Callable[[Any], None],
    name: str,
    *,
    words: str,
    size: tuple[float, float] = (WIDTH, HEIGHT),
) -> Panel:
    """Let `draw(axes)` fill a figure of `size` inches; `name` must be unique on the page."""
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ImportError(
            'a report\'s figures need matplotlib: pip install "sparse-patch[eval]"'
        ) from error
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure = Canvas(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Panel(_inline(file.getvalue(), name, words), words)


def _inline(svg: str, name: str, words: str) -> str:
    """An SVG file as an element of a page: no header, ids of its own, the page's ink."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to groups
    prefix = f"f{zlib.crc32(name.encode()):08x}-"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    return re.sub(
        r"<svg[^>]*>",
        lambda _: f'<svg {box.group()} role="img" aria-label="{escape(words)}">',
        svg,
        count=1,
    )


def set_title(axes: Any, text: str) -> None:
    """A title that fits a panel."""
    axes.set_title(shorten(text, 48), loc="left")


def shorten(text: str, length: int) -> str:
    """Cut in the middle: methods begin with their name and end with what they differ in."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[: length - 1 - half]}…{text[-half:]}"
