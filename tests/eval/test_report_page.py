"""The HTML page: nothing from a run can act in it, nothing is loaded, and a browser shows it."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from sparse_patch_eval.report.comparison import comparison_table
from sparse_patch_eval.report.figures import cells, figures, front
from sparse_patch_eval.report.heatmaps import depth_name, grid
from sparse_patch_eval.report.page import command, page
from sparse_patch_eval.report.plots import shorten
from sparse_patch_eval.report.sections import sections
from sparse_patch_eval.report.text import markdown
from sparse_patch_eval.runs.reading import find_runs

from tests.eval.run_builder import MACHINE, sample, write_comparison, write_run

EVIL = "</pre><script>document.title='owned'</script><img src=x onerror=alert(1)>&\"'"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def page_of(root, **options):
    runs = find_runs([root])
    found = sections(runs)
    rows = comparison_table(runs)
    by_setting = {(s.model, s.settings): s for s in (row.section for row in rows)}
    return page([by_setting[s.model, s.settings] for s in found], rows, **options)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    root = write_comparison(tmp_path_factory.mktemp("runs"), samples=6, lengths=(2048, 4096))
    rows = comparison_table(find_runs([root]))
    return rows[0].section, rows


@pytest.fixture(scope="module")
def drawn(comparison):
    section, rows = comparison
    return figures(section, rows)


@pytest.fixture(scope="module")
def text(comparison):
    section, rows = comparison
    return page([section], rows)


# --- safe and whole ------------------------------------------------------------------------------


def test_text_from_runs_is_shown_not_run(tmp_path):
    right = sample(target=EVIL, answer="right", task=EVIL, prompt_hash=EVIL)
    write_run(tmp_path / "dense", samples=[right], model=EVIL)
    wrong = {**right, "answer": EVIL, "exact": {EVIL: 3}, "density": None}
    write_run(tmp_path / "evil", EVIL, [wrong], model=EVIL, params={EVIL: EVIL})
    got = page_of(tmp_path)
    assert got.count("<script") == 1  # ours
    assert "<img" not in got
    assert html.escape(EVIL, quote=False)[:30] in got
    for svg in re.findall(r"<svg.*?</svg>", got, re.DOTALL):
        ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))


def written_by(name):
    """Two runs, `name` in every text that a run has."""
    right = sample(
        task=name, benchmark=name, prompt_hash=name, doc_id=name, target=name, answer="right",
        scores={name: 1.0, f"{name}2": 0.5}, exact={name: 3}, density=None,
        machine={**MACHINE, "device": name, "git": name},
    )  # fmt: skip
    about = {"model": name, "dtype": name, "device": name, "params": {name: name}}
    directions = {name: True, f"{name}2": True}
    more = {"patch": {name: name}, "directions": directions, **about}
    return lambda root: (
        write_run(root / "dense", samples=[right], **more),
        write_run(root / "other", name, [{**right, "answer": name}], **more),
    )


class Elements(HTMLParser):
    """Names of elements, with the names of their attributes and what of these can act."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        acting = [(k, v) for k, v in attributes if k in ("src", "href", "id", "style")]
        self.found.append((tag, [k for k, _ in attributes], acting))


HOSTILE = [
    EVIL,
    "</script><script>alert(1)</script><!--",
    "--></title></style></svg><svg onload=alert(1)>",
    "\" onmouseover=alert(1) x='",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{$",
    "javascript:alert(1)",
    "\x00\x1b]0;owned\x07\u202e",
    "![a](http://x/y.png) | b\n\n# c",
]
SVG = {"svg", "g", "path", "use", "defs", "text", "clippath", "rect"}


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
@pytest.mark.parametrize("hostile", HOSTILE)
def test_whatever_a_run_says_the_page_has_the_elements_of_a_plain_one(tmp_path, hostile):
    for folder, name in (("plain", "word"), ("hostile", hostile)):
        written_by(name)(tmp_path / folder)
    plain, got = page_of(tmp_path / "plain"), page_of(tmp_path / "hostile")
    there, usual = ([x for x in Elements(p).found if x[0] not in SVG] for p in (got, plain))
    assert there == usual
    there, usual = (
        {name for tag, names, _ in Elements(p).found if tag in SVG for name in names}
        for p in (got, plain)
    )
    assert there == usual
    table = markdown(comparison_table(find_runs([tmp_path / "hostile"])))
    usual = markdown(comparison_table(find_runs([tmp_path / "plain"])))
    assert len(table.split("\n")) == len(usual.split("\n"))
    assert not re.search(r"<[a-z!/]|(?<!\\)\]\((?!\\)|[\x00-\x09\x0b-\x1f]", table)
    rows = re.findall(r"(?m)^\|.*\|$", re.sub(r"\\.", "", table))
    assert {row.count("|") for row in rows} == {
        row.count("|") for row in re.findall(r"(?m)^\|.*\|$", usual)
    }


def test_the_page_loads_nothing_and_allows_only_its_own_script(text):
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert html.unescape(policy).startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in html.unescape(policy)
    assert not re.search(r"""(src|href)=["'](?!#)""", text)
    assert not re.search(r"@import|url\((?!#)", text)


def test_ids_are_unique_and_every_reference_has_one(text):
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
    assert used
    assert set(used) <= set(ids)


def test_the_page_names_methods_machine_versions_and_the_command(text, comparison):
    section, _ = comparison
    plain = html.unescape(text)
    assert "gamma='0.8', min_budget='512'" in plain
    assert "Test CPU, 2 cores, AVX2, 2 threads, Linux; python 3.11.2, torch 2.9.0" in plain
    assert "git abc1234" in plain
    line = command(section)
    assert line in plain
    for part in ("--model smollm2", "--method dense", "--tasks ruler,perplexity",
                 "--method flexprefill:gamma=0.8,min_budget=512", "--lengths 2048,4096",
                 "--limit 6", "--seed 0", "--dtype float32", "--device cpu"):  # fmt: skip
        assert part in line


def test_the_command_quotes_what_a_shell_would_read(tmp_path):
    settings = {"model": "a model; rm", "dtype": "f; rm", "device": "$(rm)"}
    settings |= {"patch": {"min_length; rm": 3, "min_length": 1024}, "chat_template": True}
    write_run(tmp_path, "pbs:tau=(0.9,0.8)", [sample()], **settings)
    line = command(sections(find_runs([tmp_path]))[0])
    assert "--model 'a model; rm'" in line
    assert "--dtype 'f; rm'" in line
    assert "--device '$(rm)'" in line
    assert "'--min-length; rm' 3" in line
    assert "--method 'pbs:tau=(0.9,0.8)'" in line
    assert "--chat-template" in line
    assert line.endswith("--min-length 1024")


def test_what_ran_exact_or_cannot_be_measured_is_said_at_the_top(text):
    top = html.unescape(text[: text.index("Overview")])
    assert "mostly exact: no call ran sparse (short): sp_niah_single_1 at 2,048" in top
    assert "sp_vt: string_match at 2,048, 4,096" in top


def test_differing_answers_come_first_where_the_score_changed(tmp_path):
    write_run(tmp_path / "dense", samples=[sample(n, answer=f"d{n}") for n in range(4)])
    lines = [sample(n, answer=f"m{n}") for n in range(3)] + [sample(3, answer="d3")]
    lines[2]["scores"] = {"string_match": 0.0}
    write_run(tmp_path / "hip", "hip", lines)
    got = page_of(tmp_path, answers=2)
    assert "3 of 4 answers differ, 1 change the primary score" in got
    assert got.index(">m2<") < got.index(">m0<")
    assert ">m1<" not in got
    assert "sp_niah_single_1-4096-2" in got


def test_each_model_has_a_section_and_one_without_dense_says_so(tmp_path):
    for model in ("one", "two"):
        write_run(tmp_path / model / "hip", "hip", [sample()], model=model)
    write_run(tmp_path / "one" / "dense", samples=[sample()], model="one")
    got = page_of(tmp_path)
    assert got.count("<h2") == 2
    assert got.count("No dense run of this setting is here") == 1
    assert "No dense run" in got[got.index('<h2 id="model-2">') :]


# --- figures -------------------------------------------------------------------------------------


def test_the_front_holds_what_no_other_beats():
    points = [(0.5, 0.9), (0.2, 0.7), (0.3, 0.6), (0.2, 0.8), (0.9, 0.9)]
    assert front(points, higher_is_better=True) == [3, 0]
    assert front([(0.5, 0.1), (0.2, 0.3), (0.4, 0.4)], higher_is_better=False) == [1, 0]


def test_every_kind_of_figure_is_drawn_and_only_of_scores_that_say_something(drawn):
    found = {figure.title: figure for figure in drawn}
    assert list(found) == [
        "Score against density", "Difference to dense", "Score against length", "Speed-up",
        "Needle heat maps: sp_niah_single_1", "Needle heat maps: sp_niah_multikey_1",
    ]  # fmt: skip
    words = [panel.words for figure in found.values() for panel in figure.panels]
    assert "string_match against density, ruler average, 4,096 tokens" in words
    assert not [w for w in words if "string_match" in w and "sp_vt" in w]
    assert "answer_nll against length, sp_vt" in words
    assert len(found["Needle heat maps: sp_niah_single_1"].panels) == 6


def test_panels_of_a_score_stand_together_in_order_of_length(comparison):
    _, rows = comparison
    got = [(group[0].benchmark, name, group[0].length) for name, group in cells(rows)]
    assert got[:4] == [
        ("ruler", "string_match", 2048), ("ruler", "string_match", 4096),
        ("ruler", "rank", 2048), ("ruler", "rank", 4096),
    ]  # fmt: skip


def test_letters_and_axes_take_the_colour_of_the_page(drawn):
    svg = drawn[0].panels[0].svg
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert ">ruler average, 2,048 tokens</text>" in svg


def test_a_heat_map_is_the_mean_of_its_cells(tmp_path):
    lines = [sample(n, depth=d, scores={"string_match": s}) for n, (d, s) in
             enumerate([(0.0, 1.0), (0.0, 0.0), (0.5, 1.0), (None, 0.0)])]  # fmt: skip
    write_run(tmp_path, samples=lines)
    (run,) = find_runs([tmp_path])
    assert grid(run.samples, "string_match", [0.0, 0.5]) == {("0%", 4096): 0.5, ("50%", 4096): 1.0}
    many = [n / 39 for n in range(40)]
    assert depth_name(many[-1], many) == "90-100%"
    assert len({depth_name(depth, many) for depth in many}) == 10


def test_long_names_keep_their_ends():
    assert shorten("flexprefill:gamma=0.95,tau=0.1", 11) == "flexp…u=0.1"
    assert shorten("short", 11) == "short"


# --- in a browser --------------------------------------------------------------------------------

_PROBE_FIRST = """<script>
window.probe = {errors: []};
addEventListener("error", (event) => probe.errors.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => probe.errors.push(event.violatedDirective));
</script>"""
_PROBE_LAST = """<script>
addEventListener("load", () => {
  const sizes = [...document.querySelectorAll("svg")].map((s) => s.getBoundingClientRect());
  const table = document.querySelector("table"), buttons = table.querySelectorAll("th button");
  const column = [...buttons].findIndex((b) => b.textContent.startsWith("string_match"));
  const sorts = () => [...table.tBodies[0].rows].map((r) => Number(r.cells[column].dataset.sort));
  buttons[column].click(); const up = sorts();
  buttons[column].click(); const down = sorts();
  const select = document.querySelector(".filters select");
  select.selectedIndex = 1; select.dispatchEvent(new Event("change"));
  const shown = [...table.tBodies[0].rows].filter((row) => !row.hidden).length;
  Object.assign(probe, {
    figures: sizes.length, empty: sizes.filter((s) => !(s.width > 0 && s.height > 0)).length,
    wide: sizes.filter((s) => s.right > innerWidth + 0.5).length,
    scroll: document.documentElement.scrollWidth, inner: innerWidth, up, down, shown,
    room: document.documentElement.clientWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    paper: getComputedStyle(document.body).backgroundColor,
  });
  parent.postMessage(JSON.stringify(probe), "*");
});
</script>"""
# Chromium's windows are never narrower than 500 pixels; a frame is what it is told to be.
_FRAME = """<!doctype html><meta name="color-scheme" content="light dark">
<script>addEventListener("message", (e) => document.documentElement.dataset.probe = e.data);
</script><iframe src="page.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>"""


def dump(file, tmp_path, *, dark=False):
    """The DOM after loading, as Chromium prints it."""
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=2000,950", f"--blink-settings=preferredColorScheme={int(not dark)}",
            "--dump-dom", file.as_uri(),
        ],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    return done.stdout


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")


@needs_chromium
@pytest.mark.parametrize(
    ("width", "dark"), [(360, False), (360, True), (1920, False), (1920, True)]
)
def test_a_browser_shows_all_figures_without_errors_or_sideways_scrolling(
    text, tmp_path, width, dark
):
    # The probe's own scripts are not in the page's policy: here it goes, below it is tested.
    probed = re.sub(r"<meta http-equiv[^>]*>", _PROBE_FIRST, text)
    file = tmp_path / "page.html"
    file.write_text(probed.replace("</body>", _PROBE_LAST + "</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(_FRAME.replace("WIDTH", str(width)))
    dom = dump(frame, tmp_path, dark=dark)
    (found,) = re.findall(r'data-probe="([^"]*)"', dom)
    probe = json.loads(html.unescape(found))
    assert probe["errors"] == []
    assert probe["figures"] > 20
    assert probe["empty"] == 0
    assert probe["wide"] == 0
    assert probe["inner"] == width
    assert probe["scroll"] <= probe["room"] <= probe["inner"]
    assert probe["dark"] == dark
    assert probe["paper"] == ("rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)")
    assert probe["up"] == sorted(probe["up"])
    assert probe["down"] == sorted(probe["up"], reverse=True)
    assert 0 < probe["shown"] < len(probe["up"])


@needs_chromium
def test_the_policy_lets_the_pages_script_run_and_no_other(text, tmp_path):
    file = tmp_path / "page.html"
    intruder = "<script>document.documentElement.dataset.intruder = 'yes'</script>"
    file.write_text(text.replace("</body>", intruder + "</body>"))
    root = re.findall(r"<html[^>]*>", dump(file, tmp_path))[0]
    assert 'class="js"' in root
    assert "intruder" not in root
