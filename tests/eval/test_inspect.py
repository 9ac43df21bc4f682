"""`sparse-patch inspect`: files that say what was found, and a page that is safe to open."""

import base64
import html
import io
import json
import re
from dataclasses import replace

import pytest
import torch
from matplotlib.image import imread
from sparse_patch_eval.cli.app import app
from sparse_patch_eval.report import inspect_page
from typer.testing import CliRunner

import sparse_patch
from tests.eval.test_report_page import _FRAME, HOSTILE, Elements, dump, needs_chromium

METHOD = "flexprefill:gamma=0.5,min_budget=1,block_size=64"


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(folder):
    """The folder that a run wrote, of a prompt that tries to act in the page, and what it said."""
    prompt = folder / "prompt.txt"
    prompt.write_text("<b onclick=alert(1)>" * 40 + "<i>" * 100)
    out = folder / "inspected"
    done = run(
        "--model", folder / "model", "--prompt", prompt, "--method", METHOD, "--rows", "64",
        "--resolution", "16", "--output", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return out, done.output


@pytest.fixture(scope="module")
def page(made):
    return (made[0] / "inspect.html").read_text(encoding="utf-8")


def test_the_numbers_are_in_a_file_and_in_a_table(made):
    out, said = made
    found = json.loads((out / "inspect.json").read_text())
    assert found["method"].startswith("FlexPrefill(")
    assert found["prompt"].endswith("prompt.txt")
    assert found["machine"]["torch"] == torch.__version__
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    for layer in found["layers"]:
        assert len(layer["heads"]) == 4
        assert all(0 < head["recall"] <= 1.0001 for head in layer["heads"])
        assert f"{layer['recall']:.3f}" in said
    assert 0 < found["density"] < 1
    assert "next token" in said
    assert "wrote" in said


def test_a_map_is_red_where_attention_is_lost_and_blue_where_it_is_kept():
    mass = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    lost = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    kept = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    picture = imread(io.BytesIO(inspect_page.png(mass, lost, kept)))
    assert picture.shape == (3, 3, 4)
    red, _, blue = picture[1, 0, :3]
    assert red > blue + 0.4
    red, _, blue = picture[1, 1, :3]
    assert blue > red + 0.4
    assert picture[2, 0, :3] == pytest.approx(inspect_page._SHOWN, abs=0.01)
    assert picture[2, 1, :3] == pytest.approx((1, 1, 1))
    assert picture[..., 3].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_the_page_has_a_map_for_every_head_and_nothing_from_outside(page):
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 2 * 4
    assert imread(io.BytesIO(base64.b64decode(images[0]))).shape == (16, 16, 4)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "default-src 'none'" in html.unescape(page)


def test_what_the_prompt_says_is_shown_not_run(page):
    body = page[page.index("<body>") :]
    assert "<i>" not in body
    assert "<b " not in body
    assert "&lt;" in body


@pytest.mark.parametrize("hostile", HOSTILE)
def test_whatever_is_said_of_a_prompt_the_page_has_the_elements_of_a_plain_one(tiny, hostile):
    ids = torch.arange(300)[None] % 256
    method = sparse_patch.get_method("a_shape", sink=4, window=64)
    found = sparse_patch.inspect(tiny[0], ids, method, rows=16, resolution=4)

    def elements(word):
        layers = (*found.layers[:1], replace(found.layers[1], exact=word))
        changed = replace(found, method=word, layers=layers)
        text = inspect_page.page(changed, {word: word}, lambda _: word, (word, word))
        return Elements(text).found

    assert elements(hostile) == elements("word")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "flexprefil"], "flexprefil"),
        (["--layers", "7"], "7"),
        (["--prompt", "/nowhere/prompt.txt"], "/nowhere/prompt.txt"),
        (["--length", "many"], "many"),
        (["--length", "8k"], "8,192 tokens"),
    ],
)
def test_bad_options_end_with_a_message_and_code_2(folder, arguments, message):
    done = run("--model", folder / "model", "--text", folder / "prose.txt", *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


_LOOK = """<script>
addEventListener("load", () => {
  const root = document.documentElement, maps = document.querySelectorAll(".map");
  const images = [...document.querySelectorAll(".map img")];
  maps[2].click();
  const dialog = document.getElementById("zoom");
  document.querySelector('[data-scale="2"]').click();
  document.querySelector('[data-step="1"]').click();
  const label = document.getElementById("zoom-label").textContent;
  parent.postMessage(JSON.stringify({
    maps: maps.length,
    drawn: images.filter((image) => image.complete && image.naturalWidth > 0).length,
    open: dialog.open,
    label: label,
    width: document.getElementById("zoom-image").style.width,
    inside: dialog.getBoundingClientRect().width <= root.clientWidth,
    scroll: root.scrollWidth, room: root.clientWidth,
  }), "*");
});
</script>"""


@needs_chromium
@pytest.mark.parametrize("width", [360, 1920])
def test_a_browser_shows_the_maps_and_enlarges_them(page, tmp_path, width):
    # The probe is not in the page's policy: here that goes; the policy is tested below.
    probed = re.sub(r"<meta http-equiv[^>]*>", "", page)
    (tmp_path / "page.html").write_text(probed.replace("</body>", _LOOK + "</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(_FRAME.replace("WIDTH", str(width)))
    (found,) = re.findall(r'data-probe="([^"]*)"', dump(frame, tmp_path, dark=False))
    probe = json.loads(html.unescape(found))
    assert (probe["maps"], probe["drawn"]) == (8, 8)
    assert probe["open"]
    assert probe["inside"]
    assert probe["label"].startswith("layer 0, head 3")
    assert probe["width"] == "200%"
    assert probe["scroll"] <= probe["room"]


@needs_chromium
def test_the_policy_lets_the_pages_script_run(page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page)
    assert 'class="js"' in re.findall(r"<html[^>]*>", dump(file, tmp_path))[0]
