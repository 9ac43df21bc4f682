"""The benchmark of min_length="auto" at toy size: what it times, marks, and leaves as it was."""

import json

import pytest
import torch

import sparse_patch

METHOD = "flexprefill:gamma=0.5,min_budget=1"


@pytest.fixture
def bench(script, monkeypatch):
    module = script("bench_never_slower")
    monkeypatch.setattr(module, "WARM_UP_TOKENS", 300)
    return module


@pytest.fixture
def options(folder, tmp_path):
    return {
        "output": tmp_path,
        "model": str(folder / "model"),
        "method": [METHOD],
        "lengths": "400",
        "dtypes": "float32",
        "repeats": 2,
        "prompts": 2,
        "text": str(folder / "walks.txt"),
        "seed": 0,
    }


@pytest.fixture(autouse=True)
def costs(monkeypatch):
    """Costs need no measuring here."""
    rate = sparse_patch.costs.Rate(1e-5, 0, 1e-12)
    model = sparse_patch.costs.CostModel(rate, rate, rate)
    for module in (sparse_patch.patching, sparse_patch.budget):
        monkeypatch.setattr(module, "of_this_machine", lambda dtype: model)


def rows(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_every_prefill_is_a_row_and_every_kind_a_cell(bench, options):
    out = options["output"]
    bench.main(**options)
    found = rows(out)
    places = [(row["kind"], row["round"], row["nth"], row["method"]) for row in found]
    assert len(places) == len(set(places)) == 2 * 2 * 2 * 2
    for row in found:
        assert row["seconds"] > 0
        calls = row["sparse"] + sum(row["exact"].values())
        assert calls == (0 if row["method"] == bench.DENSE else 2)  # its layers, of one prefill
    table = (out / "table.md").read_text()
    assert table.count(f"| {METHOD} |") == 4
    assert "of 4 cells are below 0.97x." in table

    # A run that was stopped does the rounds that are not complete, no other.
    lines = (out / "runs.jsonl").read_text().splitlines()
    (out / "runs.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    bench.main(**options)
    again = rows(out)[15:]
    assert [(row["kind"], row["round"]) for row in again] == [(bench.UNIFORM, 1)] * 4


def test_uniform_attention_is_uniform_and_undone(bench, tiny):
    model, _ = tiny
    ids = torch.randint(0, 256, (1, 50))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    twins = bench.variants(model, {})
    model.set_attn_implementation("eager")
    with torch.no_grad(), bench.uniform_attention(model):
        weights = twins[bench.DENSE].model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    seen = torch.ones(50, 50).tril()
    for one in weights:
        torch.testing.assert_close(one[0], (seen / seen.sum(-1, keepdim=True)).expand_as(one[0]))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_without_query_projections_there_is_no_uniform_attention(bench):
    with pytest.raises(ValueError, match="no layers called q_proj"):
        with bench.uniform_attention(torch.nn.Linear(2, 2)):
            pass


def test_patched_twins_share_weights_and_nothing_else(bench, tiny):
    model, _ = tiny
    method = sparse_patch.get_method("flexprefill")
    found = bench.variants(model, {"a": method, "b": method})
    assert list(found) == [bench.DENSE, "a", "b"]
    for variant in (found["a"], found["b"]):
        assert variant.model is not model
        for mine, weight in zip(variant.model.parameters(), model.parameters(), strict=True):
            assert mine is weight
    with pytest.raises(ValueError, match="not patched"):
        sparse_patch.report(model)


def test_slower_cells_are_marked(bench):
    def row(method, seconds, nth=0, **more):
        place = {"length": 2048, "kind": bench.TEXT, "round": more.pop("round", 0), "nth": nth}
        more = {"sparse": 1, "exact": {"did not pay before": 3}, "density": 0.5, **more}
        return {**place, "method": method, "seconds": seconds, **more}

    both = [row(bench.DENSE, 9.0), row("m", 10.0), row(bench.DENSE, 9.8, 1), row("m", 10.0, 1)]
    first, later = bench.cells(both, [2048], ["m"])
    assert [cell.missed for cell in (first, later)] == [("slower",), ()]
    assert [cell.place["later"] for cell in (first, later)] == [False, True]
    assert [cell.ratio.median for cell in (first, later)] == pytest.approx([0.9, 0.98])
    assert first.facts["exact"] == 0.75
    table = bench.report([first, later])
    assert "| 0.90x (0.90-0.90) | 0.50 | 75% (did not pay before 3) | slower |" in table
    assert "1 of 2 cells are below 0.97x." in table
    # Medians over rounds; what has no dense beside it is left out.
    more = [row(bench.DENSE, 12.0, round=1), row("m", 10.0, round=1), row("m", 1.0, round=2)]
    first = bench.cells(both + more, [2048], ["m"])[0]
    assert first.ratio.median == pytest.approx((0.9 + 1.2) / 2)
