"""Self-contained HTML pages: no network, no other files.

All text of a run or a prompt goes through jinja2's autoescape; control characters are written out
(`console.visible`). A Content-Security-Policy in the page allows only its own style, its own script
(by hash) and its own images, so even unescaped text could load or run nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from sparse_patch_eval.base.console import visible


def render(template: str, *, scripts: Sequence[str], styles: Sequence[str], **values: Any) -> str:
    """The HTML of `templates/TEMPLATE`, which gets `policy`, `script`, `style` and `values`.

    Raises:
        ImportError: jinja2 is missing.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError('a page needs jinja2: pip install "sparse-patch[eval]"') from error
    environment = Environment(
        loader=PackageLoader("sparse_patch_eval.base"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    script, style = ("\n".join(map(_asset, names)) for names in (scripts, styles))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(template).render(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        script=Markup(script),
        style=Markup(style),
        **values,
    )
    return visible(page)


def _asset(name: str) -> str:
    return (files("sparse_patch_eval.base") / "templates" / name).read_text(encoding="utf-8")
