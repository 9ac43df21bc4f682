"""One inspected prompt as an HTML page (see `html`): tables, and a map per head to zoom into."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparse_patch import HeadView, Inspection, LayerView
from sparse_patch_eval.base.html import render

WORST = 12
# Colours of a map, RGB: keys left out, keys kept; attention kept, attention lost.
_HIDDEN, _SHOWN = (1.0, 1.0, 1.0), (0.86, 0.92, 0.98)
_KEPT, _LOST = (0.03, 0.29, 0.57), (0.80, 0.09, 0.11)
# Smallest visible mass per band; a whole row's attention is the darkest.
_LEAST = 1e-4


@dataclass(frozen=True)
class Worst:
    """A head that loses much attention, and the text that ends at its worst row."""

    layer: int
    head: HeadView
    text: str


def page(
    found: Inspection,
    about: Mapping[str, str],
    text_until: Callable[[int], str],
    next_tokens: tuple[str, str],
) -> str:
    """The HTML text.

    Args:
        about: descriptions of model, prompt and machine, by name.
        text_until: a few words of the prompt that end at a position.
        next_tokens: text of the next token, dense and sparse.

    Raises:
        ImportError: jinja2 or matplotlib is missing.
    """
    worst = [
        Worst(layer, head, text_until(head.worst_row)) for layer, head in found.worst_heads(WORST)
    ]
    rest = max(0.0, found.sparse_seconds - found.plan_seconds - found.op_seconds)
    return render(
        "inspect.html.j2",
        scripts=["report.js", "inspect.js"],
        styles=["report.css", "inspect.css"],
        found=found,
        about=about,
        worst=worst,
        next_tokens=next_tokens,
        seconds=[
            ("choosing keys", found.plan_seconds),
            ("sparse attention", found.op_seconds),
            ("the rest of the model", rest),
        ],
        layers=[(layer, _maps(layer)) for layer in found.layers],
        legend=[(name, _css(colour)) for name, colour in (
            ("attention kept", _KEPT), ("attention lost", _LOST), ("kept, little attention", _SHOWN)
        )],
    )  # fmt: skip


def _maps(layer: LayerView) -> list[tuple[HeadView, str]]:
    """Each head with its map as a `data:` URI."""
    if layer.mass is None or layer.lost is None or layer.kept is None:
        return []
    images = zip(layer.mass, layer.lost, layer.kept, strict=True)
    return [
        (head, "data:image/png;base64," + base64.b64encode(png(*maps)).decode())
        for head, maps in zip(layer.heads, images, strict=True)
    ]


def png(mass: Tensor, lost: Tensor, kept: Tensor) -> bytes:
    """A picture of one head, a pixel per band of queries (down) and of keys (across).

    Args:
        mass, lost, kept: `[bands, bands]`, see `LayerView`.
    """
    from matplotlib.image import imsave

    pixels = torch.tensor(_HIDDEN).expand(*mass.shape, 3)
    pixels = _towards(pixels, _SHOWN, kept)
    pixels = _towards(pixels, _KEPT, _strength(mass - lost))
    pixels = _towards(pixels, _LOST, _strength(lost))
    seen = torch.ones_like(mass).tril()[..., None]
    file = io.BytesIO()
    rgba = (torch.cat([pixels, seen], -1) * 255).round().to(torch.uint8).numpy()
    imsave(file, np.ascontiguousarray(rgba), format="png")
    return file.getvalue()


def _strength(mass: Tensor) -> Tensor:
    """0 to 1, by the logarithm."""
    return 1 - (mass.clamp(min=_LEAST, max=1).log10() / torch.tensor(_LEAST).log10())


def _towards(pixels: Tensor, colour: tuple[float, float, float], share: Tensor) -> Tensor:
    return pixels + (torch.tensor(colour) - pixels) * share.clamp(0, 1)[..., None]


def _css(colour: tuple[float, float, float]) -> str:
    return f"rgb({', '.join(str(round(255 * x)) for x in colour)})"
