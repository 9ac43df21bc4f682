"""The op's benchmark at toy size: what it times, its targets, and going on where it stopped."""

import json

import pytest
import torch
import typer
from bench import calls
from sparse_patch_kernels import BlockPlan

TOY = {
    "lengths": "256",
    "densities": "0.25,0.5",
    "dims": "16",
    "groupings": "GQA",
    "dtypes": "float32",
    "blocks": "32",
    "threads": "1",
    "rounds": 2,
    "flex": False,
}


@pytest.fixture
def bench(script, monkeypatch):
    monkeypatch.setattr(calls, "LEAST_SECONDS", 0.0)
    threads = torch.get_num_threads()
    yield script("bench_kernels")
    torch.set_num_threads(threads)


def rows(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_every_plan_is_timed_in_every_round_and_once(bench, tmp_path):
    bench.main(output=tmp_path, **TOY)
    found = rows(tmp_path)
    assert [row["round"] for row in found] == [0, 1]
    for row in found:
        assert set(row["seconds"]) == {"matmul", bench.SDPA, "ours 0.25", "ours 0.5"}
        assert 0.2 < row["density"]["0.25"] < row["density"]["0.5"] < 0.6
    # Another round or density is timed anew, what is there is not.
    bench.main(output=tmp_path, **{**TOY, "rounds": 3})
    bench.main(output=tmp_path, **{**TOY, "densities": "0.25"})
    assert [row["round"] for row in rows(tmp_path)] == [0, 1, 2]
    bench.main(output=tmp_path, **{**TOY, "densities": "0.3", "rounds": 1})
    assert [list(row["density"]) for row in rows(tmp_path)] == [["0.25", "0.5"]] * 3 + [["0.3"]]
    assert "| 256 | GQA | 16 | float32 | 32 | 1 | random |" in (tmp_path / "table.md").read_text()


def test_plans_of_a_model_are_timed(bench, folder, tmp_path):
    bench.main(
        output=tmp_path,
        real=["flexprefill:gamma=0.5,min_budget=1,block_size=64"],
        model=str(folder / "model"),
        real_length="640",
        layers="0,1",
        **TOY,
    )
    names = {row["plans"] for row in rows(tmp_path)}
    assert names == {"random", *(f"{folder / 'model'}, layer {n}" for n in (0, 1))}


@pytest.mark.parametrize(
    ("option", "message"), [("dtypes", "int8: choose of float32"), ("groupings", "MQA")]
)
def test_bad_options_are_named_first(bench, tmp_path, option, message, capsys):
    value = {"dtypes": "int8", "groupings": "MQA"}[option]
    with pytest.raises(typer.Exit):
        bench.main(output=tmp_path, **{**TOY, option: value})
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_flexattention_gets_the_same_blocks(bench):
    torch.manual_seed(0)
    mask = torch.rand(3, 5, 5) < 0.5
    mask |= torch.eye(5, dtype=torch.bool)
    plan = BlockPlan.from_block_mask(mask, block_q=16, block_k=16)
    given = bench.block_mask(plan, 3)
    row, key = torch.arange(80)[:, None], torch.arange(80)
    dense = given.to_dense()[0].bool().repeat_interleave(16, 1).repeat_interleave(16, 2)
    assert torch.equal(dense & given.mask_mod(0, 0, row, key), plan.to_dense_mask())


def test_other_plans_have_no_block_mask(bench):
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    assert bench.block_mask(BlockPlan(64, 64, 16, window=20), 1) is None
    narrow = BlockPlan.from_block_mask(mask.repeat(1, 1, 2), block_q=16, block_k=8)
    assert bench.block_mask(narrow, 1) is None
    without_own = mask.tril(-1)
    without_own[:, 0, 0] = True
    plan = BlockPlan.from_block_mask(without_own, block_q=16, block_k=16)
    assert bench.block_mask(plan, 1) is None


def test_missed_targets_are_marked_and_counted(bench):
    def row(dtype, ours, flex):
        return {
            **{"tokens": 1024, "grouping": "MHA", "dim": 64, "dtype": dtype, "block": 64},
            **{"threads": 1, "plans": "random", "round": 0, "operations": 1e9},
            "seconds": {"matmul": 0.1, "SDPA": 10.0, "ours a": ours, "FlexAttention a": flex},
            "density": {"a": 0.1},
            "machine": {"device": "x", "cpu_capability": "y", "torch": "z", "git": "g"},
        }

    # In float32 8.5x over SDPA is asked for, and no less than FlexAttention.
    fast, slow = bench.cells([row("float32", 1.1, 1.2)]), bench.cells([row("float32", 1.2, 1.1)])
    assert [cell.missed for cell in fast + slow] == [(), ("speed-up", "FlexAttention")]
    # In bfloat16 12x, and twice FlexAttention.
    (cell,) = bench.cells([row("bfloat16", 0.8, 1.5)])
    assert cell.missed == ("FlexAttention",)
    table = bench.report([row("float32", 1.2, 1.3)])
    assert "1 of 1 cells up to 25 % density miss: speed-up." in table
    assert "0 of 1 cells up to 25 % density miss: FlexAttention." in table
