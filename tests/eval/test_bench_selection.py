"""The benchmark of what choosing costs, at toy size: what it times, its targets, going on."""

import json

import pytest
import torch
from bench import calls

TOY = {
    "lengths": "768",
    "shapes": "2/1/16",
    "dtypes": "float32",
    "threads": "1",
    "methods": "flashprefill,moba,proxyattn",
    "rounds": 2,
}


@pytest.fixture
def bench(script, monkeypatch):
    monkeypatch.setattr(calls, "LEAST_SECONDS", 0.0)
    threads = torch.get_num_threads()
    yield script("bench_selection")
    torch.set_num_threads(threads)


def rows(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_every_method_that_chooses_is_timed_in_every_round_and_once(bench, tmp_path):
    bench.main(output=tmp_path, **TOY)
    found = rows(tmp_path)
    assert [row["round"] for row in found] == [0, 1]
    for row in found:
        # ProxyAttn keeps at least 512 tokens even at the smaller budget, and MoBA all it can.
        assert set(row["density"]) == {"flashprefill", "proxyattn"}
        assert row["options"] == {
            "flashprefill": {},
            "moba": {"chunk_size": 128},
            "proxyattn": {"min_budget": 512},
        }
        names = [f"{what} {name}" for what in ("plan", "density") for name in row["density"]]
        assert set(row["seconds"]) == {bench.SDPA, *names}
        assert all(seconds > 0 for seconds in row["seconds"].values())
    # What is there is not timed again; another method is.
    bench.main(output=tmp_path, **{**TOY, "rounds": 3})
    bench.main(output=tmp_path, **{**TOY, "methods": "moba"})
    bench.main(output=tmp_path, **{**TOY, "methods": "hip", "rounds": 1})
    found = rows(tmp_path)
    assert [row["round"] for row in found] == [0, 1, 2, 0]
    assert list(found[3]["options"]) == ["hip"]


def test_layers_of_a_model_are_timed(bench, folder, tmp_path):
    model = str(folder / "model")
    bench.main(output=tmp_path, **TOY, layers="0,1", model=model, real_length="640")
    names = {row["inputs"] for row in rows(tmp_path)}
    assert names == {"made", f"{model}, layer 0", f"{model}, layer 1"}


def test_missed_targets_are_marked_and_counted(bench):
    def row(tokens, plan, method="hip"):
        return {
            **{"tokens": tokens, "heads": 4, "kv_heads": 2, "dim": 64, "dtype": "float32"},
            **{"threads": 1, "inputs": "made", "round": 0, "options": {method: {}}},
            "seconds": {"SDPA": 100.0, f"plan {method}": plan, f"density {method}": 1.0},
            "density": {method: 0.1},
            "machine": {"device": "x", "cpu_capability": "y", "torch": "z", "git": "g"},
        }

    # 10 % from 8k on, 5 % from 32k on, nothing below; counting the density is part of it.
    missed = {
        (tokens, plan): bench.cells([row(tokens, plan)])[0].missed
        for tokens, plan in [(4096, 50.0), (8192, 8.9), (8192, 9.1), (32768, 3.9), (32768, 4.1)]
    }
    assert [len(found) for found in missed.values()] == [0, 0, 1, 0, 1]
    # HiP takes at most six times as long at 32k as at 8k.
    slow, fast = ([row(8192, 0.1), row(32768, plan)] for plan in (5.7, 5.5))
    assert [cell.missed for cell in bench.cells(slow)] == [(), ("share", "growth")]
    assert [cell.missed for cell in bench.cells(fast)] == [(), ("share",)]
    others = [row(8192, 0.1, "psa"), row(32768, 2.0, "psa")]
    assert [cell.missed for cell in bench.cells(others)] == [(), ()]
    assert "1 of 2 cells from 8k on miss their share." in bench.report(slow)
