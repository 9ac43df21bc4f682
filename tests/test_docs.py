"""The documentation says what is true: examples run, messages exist, every method has a page."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import sparse_patch_kernels
import torch

import sparse_patch
from sparse_patch import block_scorer, profiles, registry, serving, spelling, strict_json
from tests.zoo import tiny_model

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
README = ROOT / "README.md"
HOLE = "…"

# A block, and the comment on the line before it, if there is one.
BLOCK = re.compile(r"^(?:<!-- (?P<why>[^\n]*) -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S)
# One or more lines with a message each, and what follows from them.
ENTRY = re.compile(r"^(`{1,2})(?P<message>[^`].*?)\1\n(?=`|:   )", re.M)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def samples(page):
    """The blocks of a page that are to run, each with its place: page and first line."""
    text = page.read_text()
    for block in BLOCK.finditer(text):
        if block["why"] is None:
            yield page, 1 + text.count("\n", 0, block.start("code")), block["code"]
        else:
            assert block["why"].startswith("not run: "), f"{page}: say why in {block['why']!r}"


SAMPLES = [sample for page in [README, *PAGES] for sample in samples(page)]


@pytest.fixture
def methods_as_they_were(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


@pytest.mark.parametrize(
    ("page", "line", "code"), SAMPLES, ids=[f"{name_of(page)}:{line}" for page, line, _ in SAMPLES]
)
@pytest.mark.usefixtures("methods_as_they_were")
def test_a_sample_runs_as_it_is_written(page, line, code, tmp_path, monkeypatch):
    """Each by itself; it finds `model`, a tiny Llama, and `input_ids` for it."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    input_ids = torch.randint(3, 128, (1, 300), generator=torch.Generator().manual_seed(0))
    # A module's name: dataclasses look their module up.
    names = {"__name__": __name__, "model": model, "input_ids": input_ids}
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
    sparse_patch.unpatch(model)


@pytest.mark.parametrize("page", [README, *PAGES], ids=name_of)
def test_python_blocks_compile(page):
    for block in BLOCK.finditer(page.read_text()):
        compile(block["code"], str(page), "exec")


def test_blocks_are_found():
    assert {page for page, *_ in SAMPLES} >= {README, *(DOCS / "methods").glob("*.md")}
    for page in PAGES:
        text = page.read_text()
        assert len(BLOCK.findall(text)) == text.count("```python"), page


# --- links ---------------------------------------------------------------------------------------

LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(?:#([^)\s]+))?\)")


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("*.md")), *PAGES], ids=name_of)
def test_links_lead_to_files_of_the_repository(page):
    """As on GitHub; the site's are checked when it is built."""
    for target, heading in LINK.findall(page.read_text()):
        file = page.parent / target
        assert file.is_file(), target
        if heading and "::: " not in file.read_text():  # headings that come from the code
            assert heading in headings_of(file), f"{target}#{heading}"


def headings_of(page):
    """What links to headings say after `#`; commands become headings of the site only."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    names = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    if "<!-- commands -->" in page.read_text():
        names |= {f"sparse-patch-{command}" for command in ("eval", "inspect", "tune")}
    return names


def test_the_readme_is_the_first_page_of_the_site():
    assert (DOCS / "index.md").read_text() == "<!-- readme -->\n"


# --- the API -------------------------------------------------------------------------------------


def test_the_api_page_has_every_public_name():
    shown = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.M)
    modules = [block_scorer, profiles, serving, spelling, strict_json]
    parts = [sparse_patch, sparse_patch_kernels, *modules]
    public = {name for part in parts for name in part.__all__} - {"__version__", "BACKENDS"}
    assert {name.rpartition(".")[2] for name in shown} == public
    assert len(shown) == len(set(shown))


# --- methods -------------------------------------------------------------------------------------


def test_every_page_of_a_method_has_one():
    """The site makes the page of a method that has none."""
    pages = {page.stem for page in (DOCS / "methods").glob("*.md")} - {"index"}
    assert pages <= set(sparse_patch.list_methods())


@pytest.mark.usefixtures("methods_as_they_were")
def test_the_skeleton_of_a_method_is_one():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"^ {7}@register.*?(?=^ {0,6}\S)", text, re.M | re.S)
    names = {"__name__": __name__, "dataclass": dataclass, "ClassVar": ClassVar}
    exec(textwrap.dedent(code), names | vars(sparse_patch))
    info = sparse_patch.describe("my_method")
    for params in (*info.examples.values(), info.knob.params(0.5)):
        method = sparse_patch.get_method("my_method", **params)
        method.plan(torch.zeros(2, 9, 4), torch.zeros(1, 9, 4), scale=1.0, q_offset=0)


@pytest.mark.parametrize("page", sorted((DOCS / "methods").glob("[!i]*.md")), ids=name_of)
def test_a_method_page_says_what_is_asked_for(page):
    text = page.read_text()
    headings = ["What it keeps", "Formula", "Source", "Parameters", "When to use it"]
    for heading in (*headings, "Known failures and traps"):
        assert f"\n## {heading}\n" in text, heading
    assert f"<!-- parameters: {page.stem} -->" in text
    for arxiv in re.findall(r"arXiv:[\d.]+\d", sparse_patch.describe(page.stem).source):
        assert arxiv in text, arxiv


# --- messages ------------------------------------------------------------------------------------


def messages_in_sources():
    """Every text in the code, values as holes."""
    found = set()
    for folder in ("sparse_patch", "kernels", "eval"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else HOLE
                             for part in node.values]  # fmt: skip
                    found.add("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def is_quoted_from(quote, message):
    """Is a quote the beginning of a message, its holes being values and signs between them?"""
    words = [re.escape(part) for part in quote.split(HOLE)]
    value = rf"(?:[^\w{HOLE}]*{HOLE})+[^\w{HOLE}]*?"
    return re.match(value.join(words), message) is not None


def test_every_message_in_troubleshooting_is_one_of_ours():
    quotes = [entry["message"].strip() for entry in ENTRY.finditer(troubleshooting())]
    assert len(quotes) > 60
    assert all(len(re.findall(r"\w+", quote)) >= 2 for quote in quotes)
    sources = messages_in_sources()
    sources |= {f"sparse_patch: {message}" for message in sources}  # as say_once puts it
    unknown = [q for q in quotes if not any(is_quoted_from(q, message) for message in sources)]
    assert unknown == []


def test_every_answer_in_troubleshooting_has_a_message():
    text = troubleshooting()
    last = [entry for entry in ENTRY.finditer(text) if text.startswith(":   ", entry.end())]
    assert len(last) == len(re.findall(r"^:   ", text, re.M)) > 0


def troubleshooting():
    return (DOCS / "troubleshooting.md").read_text()


def test_a_quote_must_have_the_words_of_a_message():
    assert is_quoted_from("no … here", "no … here; look elsewhere")
    assert not is_quoted_from("no … there", "no … here")
    assert not is_quoted_from("none here", "no … here")


# --- the site ------------------------------------------------------------------------------------

LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preload|preconnect|icon))[^>]*\bhref=[\"']?(?:https?:)?//"
)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason='the site needs pip install -e ".[docs]"',
)
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "eval"))
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text()
        assert not LOADED.search(text), page
        assert "<!-- parameters" not in text
    every = (tmp_path / "site/methods/index.html").read_text()
    for name in sparse_patch.list_methods():
        assert every.count(f'href="{name}.html"') > 1  # in the navigation, and in the table
        page = (tmp_path / "site/methods" / f"{name}.html").read_text()
        for one in sparse_patch.describe(name).parameters:
            assert f"<code>{one.name}</code>" in page
