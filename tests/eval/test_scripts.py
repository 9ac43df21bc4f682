"""The measuring scripts on a tiny model: what they write, and going on where they stopped."""

import json

import pytest
import typer

SPARSE = "flexprefill:gamma=0.5,min_budget=1"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def cut(path):
    """As a kill in the middle of a line leaves it."""
    text = path.read_text()
    path.write_text(text[: text.rstrip().rindex("\n") + 40])


def counted(monkeypatch, module, name):
    calls = []
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append(a) or original(*a, **k))
    return calls


@pytest.fixture(scope="module")
def common(folder):
    return {
        "model": str(folder / "model"),
        "dtype": "float32",
        "device": "cpu",
        "seed": 0,
    }


@pytest.fixture
def recall_options(folder, common, tmp_path):
    return {
        **common,
        "output": tmp_path / "recall",
        "text": str(folder / "walks.txt"),
        "length": "1100",
        "method": [SPARSE, "a_shape:window=64,sink=8", "a_shape"],
        "layers": "0,1",
        "prompts": 2,
        "rows": 512,
    }


def test_recall_table_measures_every_method_layer_and_prompt(script, recall_options, monkeypatch):
    module = script("recall_table")
    out = recall_options["output"]
    module.main(**recall_options)
    rows = lines(out / "rows.jsonl")
    plain = [row for row in rows if row["method"] != module.ORACLE]
    assert len(plain) == 3 * 2 * 2
    assert len(rows) == len(plain) + 2
    for row in plain:
        assert row["machine"]["torch"]
        assert len(row["recall"]) == 4
        assert row["plan_seconds"] >= 0
        if row["method"] == "a_shape":  # 1100 tokens lie within its window
            assert (row["exact"], row["density"], row["oracle_density"]) == (True, 1, 1)
            assert row["recall"] == [1.0] * 4
        else:
            assert 0 < row["density"] < 1
            assert 0 < min(row["recall"]) < 1
        if row["method"] == SPARSE:
            assert row["oracle_density"] <= row["judged_density"] + 1e-9
    table = (out / "table.md").read_text()
    assert table.count("\n| ") == 1 + 3  # the rule below the headings
    assert "| a_shape | " in table
    assert "| 1.000 | 1.0000 | 1.000 | 100% | 1.000 | 1.00 |" in table
    assert (out / "recall.png").read_bytes().startswith(b"\x89PNG")

    cut(out / "rows.jsonl")
    prefills = counted(monkeypatch, module, "capture")
    measured = counted(monkeypatch, module, "_measure")
    module.main(**recall_options)
    assert (len(prefills), len(measured)) == (1, 0)  # the oracle's line was the one cut
    module.main(**{**recall_options, "method": [SPARSE, "a_shape:window=32,sink=8"]})
    assert (len(prefills), len(measured)) == (3, 4)
    assert (out / "table.md").read_text().count("\n| ") == 1 + 2


def test_recall_table_runs_all_methods_and_presets_by_default(script):
    module = script("recall_table")
    specs = module.default_specs()
    assert "flexprefill" in specs
    assert "proxyattn:preset=paper" in specs
    assert "dense" not in specs
    assert all(module.get_method(spec) for spec in specs)


@pytest.fixture
def compare_options(folder, common, tmp_path):
    return {
        **common,
        "output": tmp_path / "compare",
        "length": "1100",
        "targets": "0.4,0.6",
        "method": ["a_shape", "proxyattn:block_size=64,min_budget=64", "dense"],
        "prompts": 2,
        "texts": str(folder / "walks.txt"),
        "tuning_prompts": 1,
        "tuning_texts": str(folder / "walks.txt"),
        "scored": 40,
        "layers": "1",
        "rows": 128,
    }


def test_compare_tunes_measures_and_goes_on(script, compare_options, monkeypatch):
    module = script("compare_methods")
    out = compare_options["output"]
    module.main(**compare_options)
    tuned = lines(out / "tuned.jsonl")
    assert [(row["method"], row["target"]) for row in tuned] == [
        (spec, target) for spec in compare_options["method"] for target in (0.4, 0.6)
    ]
    for row in tuned[:4]:
        assert row["has_knob"]
        assert row["reached"] == (abs(row["density"] / row["target"] - 1) <= 0.01)
    assert tuned[0]["reached"]
    assert not tuned[4]["has_knob"]
    rows = lines(out / "rows.jsonl")
    specs = {row["spec"] for row in tuned}
    assert len(specs) == 5
    assert len(rows) == 2 * (1 + 5)  # dense as a method runs once more than as the baseline
    for row in rows:
        assert row["kl"] >= -1e-6
        assert row["density"] <= 1
    table = (out / "table.md").read_text()
    assert "## At density 0.4, 2 prompts" in table
    assert "## At its own density, 2 prompts" in table
    for name in ("kl.png", "margin.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")

    cut(out / "rows.jsonl")
    captured = counted(monkeypatch, module, "capture_layers")
    baselines = counted(monkeypatch, module, "dense_baseline")
    compared = counted(monkeypatch, module, "compare")
    module.main(**compare_options)
    assert (len(captured), len(baselines), len(compared)) == (0, 1, 1)
    assert (out / "table.md").read_text() == table
    module.main(**{**compare_options, "prompts": 3, "targets": "0.4"})
    assert (len(captured), len(baselines), len(compared)) == (0, 2, 1 + 3)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("recall_table", {"method": ["flexprefil"]}, "did you mean 'flexprefill'"),
        ("recall_table", {"length": "2k,4k"}, "give one length"),
        ("recall_table", {"layers": "9"}, "this model has layers 0 to 1"),
        ("recall_table", {"layers": "a"}, "must be indices"),
        ("recall_table", {"length": "900000"}, "longer text"),
        ("compare_methods", {"targets": "0.2,2"}, "between 0 and 1"),
        ("compare_methods", {"targets": "x"}, "give numbers"),
        ("compare_methods", {"prompts": 99}, "has room for"),
        ("compare_methods", {"texts": " ,"}, "--texts: name at least one"),
        ("compare_methods", {"tuning_texts": "./a\\,b"}, "--tuning-texts: ./a,b cannot be read"),
        ("compare_methods", {"scored": 900}, "too short"),
        ("compare_methods", {"model": "./no/such"}, "no model folder"),
        ("compare_methods", {"method": ["a_shape:window"]}, "must be key=value"),
    ],
)
def test_bad_options_end_before_any_work(
    script, recall_options, compare_options, capsys, name, change, message
):
    options = {
        "recall_table": recall_options,
        "compare_methods": compare_options,
    }[name]
    with pytest.raises(typer.Exit) as error:
        script(name).main(**{**options, **change})
    assert error.value.exit_code == 2
    assert message in capsys.readouterr().err.replace("\n", "")
    assert not options["output"].exists()
