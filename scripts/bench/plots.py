"""Plots of the scripts: written to files, left out where matplotlib is not installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_patch_eval.base.console import note

# Hollow, so that points on top of one another stay visible.
_MARKERS = "osD^v<>ph*PX"


def plot(path: Path, draw: Callable[[Any], None], size: tuple[float, float] = (7, 4.2)) -> None:
    """Let `draw(axes)` fill a figure and save it; says what to install where it cannot."""
    try:
        import matplotlib
    except ImportError:
        note("no plot: pip install 'sparse-patch[plot]' for matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    draw(axes)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def style(number: int) -> dict[str, Any]:
    """Colour and marker of the n-th of many series, each pair once in sixty."""
    return {
        "color": f"C{number % 10}",
        "marker": _MARKERS[number % len(_MARKERS)],
        "markerfacecolor": "none",
        "linewidth": 1,
    }


def legend_outside(axes: Any) -> None:
    """A small legend to the right of the axes: many methods hide the data otherwise."""
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
