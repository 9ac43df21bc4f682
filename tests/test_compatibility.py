"""A sample of the families that `scripts/compatibility.py` runs through, and the script itself."""

import dataclasses
import json
import sys
from pathlib import Path

import compatibility
import pytest
from compat import run, table
from compat.compare import NOT_BUILT, REFUSED, RIGHT, WRONG, check
from transformers import AttentionInterface, LlamaConfig

# Sizes are given by the fields of a config, which are these of a dataclass from some version on.
pytestmark = pytest.mark.skipif(
    not dataclasses.is_dataclass(LlamaConfig), reason="this Transformers is too old"
)

# Family -> how many of its attention layers there are, and of these sparse.
SAMPLE = {
    "llama": (4, 4),
    "gemma3_text": (4, 2),  # slides
    "llama4_text": (4, 4),  # chunks, each a sequence
    "gpt_oss": (4, 2),  # sinks, and slides
    "deepseek_v3": (4, 4),  # latent attention
    "qwen3_vl": (4, 4),  # a vision tower, and positions of three axes
    "qwen3_next": (2, 2),  # with linear attention
    "jamba": (2, 2),  # with Mamba
    "lfm2": (2, 2),  # with convolutions
    "falcon_h1": (4, 4),  # attention and Mamba in one layer
}


@pytest.mark.parametrize(("family", "layers"), SAMPLE.items(), ids=SAMPLE)
def test_right(family, layers):
    row = check(family)
    assert (row["status"], row["wrong"], row["own"]) == (RIGHT, [], {})
    assert (row["patched"], row["sparse"]) == layers
    assert sum(row["exact"].values()) == layers[0] - layers[1]
    assert min(row["matters"].values()) > 0.1
    assert max(row["errors"].values()) <= 5e-5
    names = {"padded batch", "long prompt", "second turn", "generated", "row alone, a_shape"}
    assert names <= set(row["errors"])


def test_zamba2_is_right():
    """Its attention is shared by layers, and has an index of none."""
    row = check("zamba2")
    assert (row["status"], row["wrong"], row["patched"], row["sparse"]) == (RIGHT, [], 2, 2)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("falcon", "does not look its attention up"),
        ("mamba", "found no causal self-attention"),
        ("deepseek_v32", "selects keys itself"),
        ("minimax_m3_vl_text", "selects keys itself"),
    ],
)
def test_refused(family, why):
    row = check(family)
    assert (row["status"], row["wrong"]) == (REFUSED, [])
    assert why in row["reason"]
    assert table.refusal(row["reason"]) != row["reason"]


def test_a_family_that_cannot_be_built_says_why():
    row = check("gemma4_assistant")
    assert row["status"] == NOT_BUILT
    assert "hidden_size_per_layer_input must be 0" in row["reason"]


def test_what_an_encoder_does_itself_is_no_fault():
    row = check("roberta")
    assert row["status"] == RIGHT
    assert "unpatched, too" in row["own"]["row alone"]


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        ("gemma2", {"softcap": None}),
        ("gpt_oss", {"s_aux": None}),
        ("granite", {"scaling": 0.3}),
        ("llama", {"is_causal": False}),
    ],
)
def test_a_fault_is_noticed(family, fault, monkeypatch):
    functions = AttentionInterface._global_mapping
    attend = functions["sparse_patch"]

    def faulty(*tensors, **arguments):
        return attend(*tensors, **{**arguments, **fault})

    monkeypatch.setitem(functions, "sparse_patch", faulty)
    row = check(family)
    assert row["status"] == WRONG
    assert any("differs by" in text for text in row["wrong"])
    assert row["errors"]["long prompt"] > 0.05


# --- the script ----------------------------------------------------------------------------------

DIES = [sys.executable, "-c", "import sys; sys.exit('no more')"]


def test_a_process_that_dies_is_a_row(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    run.run(["llama", "mamba"], path, DIES)
    rows = run.open_rows(path).rows
    assert [(row["family"], row["status"]) for row in rows] == [("llama", WRONG), ("mamba", WRONG)]
    assert rows[0]["wrong"] == ["its process: ended with code 1: no more"]
    assert "llama: WRONG: its process: ended" in capsys.readouterr().out
    run.run(["llama", "mamba"], path, ["there is no such program"])  # all have a row
    run.forget(path, ["llama"])
    assert [row["family"] for row in run.open_rows(path).rows] == ["mamba"]


def test_the_script_runs_one_family_and_writes_no_page(tmp_path, capfd):
    arguments = ["--families", "mamba", "--output", str(tmp_path), "--page", str(tmp_path / "x")]
    assert compatibility.main(arguments) == 0
    assert "mamba: refused: MambaForCausalLM: found no causal" in capfd.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["compatibility.jsonl"]


def test_an_unknown_family_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        compatibility.main(["--families", "llama,lama"])
    assert ended.value.code == 2
    assert "has no lama" in capsys.readouterr().err


def test_rows_become_a_file_and_tables(tmp_path):
    sparse = {"patched": 4, "layers": 8, "sparse": 2, "exact": {"mask": 2}, "own": {"x": "a|b"}}
    sparse |= {"wide": {"sparse": 4, "exact": {}}, "wrong": []}
    rows = [
        {"family": "b", "status": RIGHT, **sparse},
        {"family": "a", "status": REFUSED, "reason": "A is an encoder-decoder; only decoders"},
        {"family": "c", "status": WRONG, "wrong": ["a: raises <x>", "b: differs", "c: raises <x>"]},
        {"family": "d", "status": NOT_BUILT, "reason": "no"},
    ]
    about = {"torch": "2", "transformers": "5", "machine": {"git": "abc"}}
    page, file = tmp_path / "page.md", tmp_path / "file.json"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    for _ in range(2):
        compatibility.write([row | about for row in rows], file, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "Transformers 5, torch 2, on a CPU, commit abc: 4 families" in text
    assert "| `b` | 4 of 8 layers | 2 | 2 a mask of its own kind | 4 sparse | x: a\\|b |" in text
    assert "| `a` | an encoder-decoder |" in text
    assert "| `c` | a, c: raises &lt;x>; b: differs |" in text
    made = json.loads(file.read_text())
    assert [row["family"] for row in made["families"]] == ["a", "b", "c", "d"]
    assert made["commits"] == ["abc"]
    with pytest.raises(ValueError, match="two lines"):
        table.page("no markers", made)


def test_the_page_is_made_of_the_rows():
    root = Path(__file__).parents[1]
    made = json.loads((root / "results" / "compatibility.json").read_text())
    page = (root / "docs" / "compatibility.md").read_text()
    assert table.page(page, made) == page
    assert len(made["families"]) > 200
