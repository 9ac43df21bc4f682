"""What the pages do not say by hand, because the code says it: a hook of MkDocs.

A page holds a marker, alone on its line, in whose place comes what is read from the code:

    <!-- parameters: NAME -->    the parameters and presets of a method
    <!-- methods -->             a table of all methods
    <!-- commands -->            every command of `sparse-patch` with its options
    <!-- scripts -->             the scripts that measure, and what each does
    <!-- exact: silent -->       reasons for which a call runs exact, without a warning
    <!-- exact: warned -->       the same with one, and what it says
    <!-- readme -->              README.md, which is the first page

Every method has a page, in the order of their names: `methods/NAME.md`, or where there is none the
docstring of its module. Tables and figures under `results/`, and documents beside
README.md, become pages of the site.
Links are written as files lie in the repository; the site has them where they lie in it.
"""

from __future__ import annotations

import ast
import inspect
import posixpath
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from sparse_patch_eval.cli.app import app

import sparse_patch

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"^<!-- ([a-z]+)(?:: (\w+))? -->$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
BESIDE_README = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the methods behind that which lists them."""
    section = next(one["Methods"] for one in config.nav or [] if "Methods" in one)
    section += [{name: f"methods/{name}.md"} for name in sparse_patch.list_methods()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages of methods that are not written, and what lies outside of `docs/`: tables and
    figures of results, documents of the project."""
    for name in sparse_patch.list_methods():
        if not files.get_file_from_path(f"methods/{name}.md"):
            page = File.generated(config, f"methods/{name}.md", content=method_page(name))
            files.append(page)
    results = (path for path in (ROOT / "results").rglob("*") if path.suffix in (".md", ".png"))
    for path in sorted([*results, *(ROOT / name for name in BESIDE_README)]):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Replace markers and links; title tables of results by their path, and do not search them.

    Raises:
        KeyError: a marker has no such name.
    """
    path = page.file.abs_src_path or ROOT / "docs" / page.file.src_uri  # what is not written
    source = Path(path).relative_to(ROOT).as_posix()
    if source.startswith("results/"):
        page.meta["search"] = {"exclude": True}
        return markdown if markdown.startswith("# ") else f"# {source}\n\n{markdown}"
    markdown = MARKER.sub(lambda found: FILLERS[found[1]](found[2] or ""), markdown)
    return site_links(markdown, source if source != "docs/index.md" else "README.md")


def site_links(markdown: str, source: str) -> str:
    """Links of a page that lies at `source` in the repository, as the site needs them.

    What lies in `docs/` lies at the root of the site, and so does all else.
    """
    folder = posixpath.dirname(source.removeprefix("docs/"))

    def moved(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        return posixpath.relpath(target.removeprefix("docs/"), folder or ".")

    return LINK.sub(moved, markdown)


def readme(_: str) -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def method_page(name: str) -> str:
    """The page of a method by the docstring of its module."""
    text = inspect.getmodule(type(sparse_patch.get_method(name))).__doc__
    return f"# {name}\n\n{text}\n## Parameters\n\n<!-- parameters: {name} -->\n"


def parameters(name: str) -> str:
    info = sparse_patch.describe(name)
    rows = [
        (f"`{one.name}`", f"`{one.default!r}`", one.allowed, one.help) for one in info.parameters
    ]
    text = table(("parameter", "default", "may be", "meaning"), rows)
    for preset, values in info.presets.items():
        settings = ", ".join(f"{key}={value!r}" for key, value in values.items())
        settings = f"`{settings}`" if settings else "the defaults"
        text += f"\n`preset={preset!r}`: {settings}\n"
    return text


def methods(_: str) -> str:
    infos = [sparse_patch.describe(name) for name in sparse_patch.list_methods()]
    rows = [
        (f"[`{one.name}`]({one.name}.md)", one.summary.rstrip("."), one.source) for one in infos
    ]
    return table(("method", "what it does", "source"), rows)


def commands(_: str) -> str:
    parts = []
    for name, command in sorted(typer.main.get_command(app).commands.items()):
        parts.append(f"## sparse-patch {name}\n\n{command.help}\n")
        rows = [(_flags(one), _default(one), one.help or "") for one in command.params]
        parts.append(table(("option", "default", "meaning"), rows))
    return "\n".join(parts)


def _flags(option: Any) -> str:
    if option.param_type_name == "argument":
        return f"`{option.name.upper()}`"
    return ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))


def _default(option: Any) -> str:
    given = option.default
    empty = given is None or given is False or given in ((), []) or callable(given)
    return "" if empty else f"`{given}`"


def scripts(_: str) -> str:
    rows = []
    for path in sorted((ROOT / "scripts").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        call = f"scripts/{path.stem}."  # parts of others have no call of their own
        if call in text:
            rows.append((f"`scripts/{path.name}`", text.split("\n\n")[0].replace("\n", " ")))
    return table(("script", "what it measures"), rows)


def exact(kind: str) -> str:
    rows = [(f"`{name}`", text) for name, text in sparse_patch.REASONS.items() if text is not None]
    if kind == "warned":
        return table(("reason", "what the warning says"), rows)
    return ", ".join(f"`{name}`" for name, text in sparse_patch.REASONS.items() if text is None)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a bar in a cell is escaped."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


FILLERS: dict[str, Callable[[str], str]] = {
    "readme": readme,
    "parameters": parameters,
    "methods": methods,
    "commands": commands,
    "scripts": scripts,
    "exact": exact,
}
