"""The command line and the bench script, on a tiny local model: nothing is downloaded."""

import contextlib
import dataclasses
import json

import pytest
import torch
import typer
from rich.text import Text
from sparse_patch_eval.ask import demo
from sparse_patch_eval.ask.demo import DemoRow, verdict
from sparse_patch_eval.ask.kl import kl_divergence
from sparse_patch_eval.ask.prefill import decode, prefill
from sparse_patch_eval.base import console, options
from sparse_patch_eval.base.machine import machine
from sparse_patch_eval.cli.app import app
from sparse_patch_eval.inputs.text import Prompt
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import sparse_patch


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


# --- options -------------------------------------------------------------------------------------


def test_lengths_are_read_in_tokens_or_k():
    assert options.parse_lengths("4k, 2048,2k") == [2048, 4096]
    for bad in ("", "2k,,4k", "0", "-1", "two", "1.5k"):
        with pytest.raises(ValueError, match="--lengths"):
            options.parse_lengths(bad)


# --- prefill -------------------------------------------------------------------------------------


def test_prefill_and_decode_equal_generate(folder):
    model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    ids = torch.randint(0, 256, (1, 50), generator=torch.Generator().manual_seed(0))
    start = prefill(model, ids)
    assert start.seconds > 0
    want = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 50:].tolist()
    assert decode(model, start, 6) == want


def test_kl_divergence_is_zero_for_equals_and_the_formula_otherwise():
    a, b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 2.0, 1.0])
    assert kl_divergence(a, a) == 0
    p, q = a.softmax(-1), b.softmax(-1)
    assert kl_divergence(a, b) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)


def test_the_machine_is_described():
    about = machine()
    assert about["torch"] == torch.__version__
    assert about["device"]
    json.dumps(about)


# --- commands ------------------------------------------------------------------------------------


def test_methods_lists_every_method_with_its_source_parameters_and_presets():
    out = " ".join(run("methods").output.split())
    for name in sparse_patch.list_methods():
        info = sparse_patch.describe(name)
        assert f"{name}: {info.summary}" in out
        assert info.source in out
        for parameter in info.parameters:
            assert f"{parameter.name}=" in out
        for preset in info.presets:
            assert f"preset={preset}" in out


@pytest.mark.parametrize("name", sparse_patch.list_methods())
def test_methods_shows_every_parameter_of_a_method(name):
    out = run("methods", name).output
    for one in sparse_patch.describe(name).parameters:
        assert one.name in out
    for preset in sparse_patch.describe(name).presets:
        assert f"preset={preset}" in out


def test_methods_names_what_it_does_not_know():
    done = run("methods", "flexprefil")
    assert done.exit_code == 2
    assert "did you mean 'flexprefill'" in done.output


def test_help_teaches():
    out = run("demo", "--help").output
    for word in ("--quick", "--model", "--method", "--lengths", "--seed", "passkey", "computed"):
        assert word in out


def test_demo_prints_a_table_and_writes_its_numbers(folder):
    done = run(
        *("demo", "--model", folder / "model", "--text", folder / "prose.txt"),
        *("--lengths", "1300,1500", "--method", "flexprefill:gamma=0.5,min_budget=1,block_size=64"),
        *("--output", folder / "out"),
    )
    assert done.exit_code == 0, done.output
    result = json.loads((folder / "out" / "demo.json").read_text())
    assert [row["tokens"] for row in result["rows"]] == [1300, 1500]
    for row in result["rows"]:
        assert 0 < row["density"] < 1
        assert 0 < row["recall"] <= 1
        assert row["kl"] >= 0
        assert row["speed_up"] == pytest.approx(row["dense_seconds"] / row["sparse_seconds"])
        assert row["exact_calls"] == {}
        assert row["computed"] == pytest.approx(row["density"])  # no call ran exact
        assert f"{row['computed']:.3f}" in done.output
        assert f"{row['speed_up']:.2f}x" in done.output
    assert result["machine"]["torch"] == torch.__version__


def test_demo_shows_the_recommended_method_and_another_and_says_what_came_of_it(folder):
    done = run(
        *("demo", "--model", folder / "model", "--text", folder / "prose.txt"),
        *("--lengths", "1200,1300", "--output", folder / "both"),
    )
    assert done.exit_code == 0, done.output
    result = json.loads((folder / "both" / "demo.json").read_text())
    methods = [sparse_patch.RECOMMENDED, "flexprefill:gamma=0.9"]
    assert [(row["tokens"], row["method"]) for row in result["rows"]] == [
        (tokens, method) for tokens in (1200, 1300) for method in methods
    ]
    assert list(result["methods"]) == methods
    out = done.stdout
    assert out.count(" dense ") >= 2
    lines = [line.rstrip() for line in out.splitlines() if line.strip()]
    (verdict,) = [line for line in lines if line.endswith("% of attention computed")]
    row = result["rows"][2]
    assert verdict.startswith("1,300 tokens: ")
    assert verdict.endswith(f"{row['computed']:.0%} of attention computed")
    assert lines[-1].startswith("next, what was kept and lost, head by head: ")
    assert lines[-1].endswith(f"sparse-patch inspect --length 1300 --model {folder / 'model'}")


@pytest.mark.parametrize(
    ("gain", "same", "computed", "said"),
    [
        (1.72, True, 0.2, "8,192 tokens: 1.7 times faster, same answer, 20% of attention computed"),
        (1.01, False, 1.0, "8,192 tokens: no faster (1.01x), another answer, 100% of attention"),
    ],
)
def test_the_verdict_is_about_the_longest_prompt_of_the_first_method(gain, same, computed, said):
    other = DemoRow(2048, "a", 1, 1, 9, None, None, 0, "", "", True, "", True, True, {}, 0.5)
    row = dataclasses.replace(
        other, tokens=8192, speed_up=gain, same_answer=same, computed=computed
    )
    slow = dataclasses.replace(row, method="b", speed_up=0.5)
    assert verdict([other, slow, row, slow]).startswith(said)


def test_the_warm_up_runs_every_method_sparse(folder, monkeypatch):
    """Compilation belongs before the first timed prefill."""
    seen = []
    original = demo.prefill

    def spy(model, ids):
        out = original(model, ids)
        with contextlib.suppress(ValueError):  # not patched: dense
            seen.append(sparse_patch.report(model).sparse_calls)
        return out

    monkeypatch.setattr(demo, "prefill", spy)
    model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    prompt = Prompt(torch.randint(0, 256, (1, 1200)), "1")
    methods = [sparse_patch.RECOMMENDED, "flexprefill:gamma=0.9"]
    demo.warm_up(model, {name: {"method": name} for name in methods}, prompt)
    assert seen == [2, 2]


def test_demo_with_a_method_that_keeps_everything_answers_the_same(folder):
    done = run(
        *("demo", "--model", folder / "model", "--text", folder / "prose.txt"),
        *("--lengths", "1200", "--method", "dense", "--output", folder / "same"),
    )
    assert done.exit_code == 0, done.output
    (row,) = json.loads((folder / "same" / "demo.json").read_text())["rows"]
    assert row["same_answer"]
    assert row["density"] == 1
    assert row["recall"] == pytest.approx(1)
    assert row["kl"] < 1e-6


def test_demo_says_when_all_calls_ran_exact(folder):
    done = run(
        *("demo", "--model", folder / "model", "--text", folder / "prose.txt"),
        *("--lengths", "600", "--method", "flexprefill"),
    )
    assert "600 tokens, flexprefill: all calls ran exact {'short': 2}" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "flexprefil"], "did you mean 'flexprefill'"),
        (["--lengths", "two"], "--lengths"),
        (["--model", "./no/such/folder"], "no model folder"),
        (["--dtype", "float99"], "float99"),
        (["--text", "nothing.txt"], "nothing.txt"),
        (["--lengths", "20"], "too short"),
    ],
)
def test_bad_options_end_with_a_message_and_code_2(folder, arguments, message):
    base = ["demo", "--model", folder / "model", "--text", folder / "prose.txt"]
    done = run(*base, "--lengths", "1200", *arguments)
    assert done.exit_code == 2
    assert message in done.output.replace("\n", "")
    assert "Traceback" not in done.output


def test_a_terminal_shows_what_would_act_in_it():
    assert console.visible("a\x1b[31mb\u202ec\r\x9b\ud800") == r"a\x1b[31mb\u202ec\r\x9b\ud800"
    assert console.visible("line\n\ttab, caf\xe9 \u2603 \U0001f642") == (
        "line\n\ttab, caf\xe9 \u2603 \U0001f642"
    )
    assert Text.from_markup(console.plain("[red]x[/] [/b]")).plain == "[red]x[/] [/b]"


@pytest.mark.parametrize(
    "word", ["[/red]", "[bold]x", "[link=http://x]y[/link]", "\x1b]0;owned\x07"]
)
def test_an_error_says_what_was_typed_and_no_more(word):
    for arguments in (("methods", word), ("inspect", "--method", word)):
        done = run(*arguments)
        assert done.exit_code == 2
        assert console.visible(word) in "".join(done.output.split("\n")).replace("\\\\", "\\")
        assert "\x1b]" not in done.output


# --- scripts/bench_prefill.py --------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(script):
    return script("bench_prefill")


def test_bench_measures_in_rounds_and_goes_on_where_it_stopped(folder, bench, monkeypatch):
    out = folder / "bench"
    options = {
        "output": out,
        "model": str(folder / "model"),
        "text": str(folder / "prose.txt"),
        "method": ["flexprefill:gamma=0.5,min_budget=1,block_size=64", "a_shape:window=256"],
        "lengths": "1100,1200",
        "repeats": 2,
        "dtype": "float32",
        "device": "cpu",
        "seed": 0,
        "recall": 64,
    }
    bench.main(**options)
    rows = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 3
    seen = [(r["method"], r["length"]) for r in rows if r.get("recall") is not None]
    assert sorted(seen) == [(m, n) for m in sorted(options["method"]) for n in (1100, 1200)]
    assert all(0 < r["recall"] < 1 for r in rows if "recall" in r)
    assert [r["method"] for r in rows[:3]] != [r["method"] for r in rows[3:6]]  # order rotates
    assert {row["machine"]["torch"] for row in rows} == {torch.__version__}
    assert all(row["density"] is None for row in rows if row["method"] == bench.DENSE)
    table = (out / "table.md").read_text()
    assert table.count("\n| 1,") == 2 * 3
    assert (out / "speedup.png").read_bytes().startswith(b"\x89PNG")

    lines = (out / "runs.jsonl").read_text().splitlines()
    (out / "runs.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])
    prefills = []
    original = bench.with_peak
    monkeypatch.setattr(bench, "with_peak", lambda *a: prefills.append(a) or original(*a))
    bench.main(**options)
    assert len(prefills) == 3 + 3  # a warm-up each, and the one round that was cut short


FAKE_ENGINE = """
class CommonParams:
    class Any: pass
    model, cpuparams, cpuparams_batch = Any(), Any(), Any()

class Server:
    def __init__(self, params):
        assert params.model.path == "some.gguf" and params.n_ctx > 1200
        print("engines print what they like")

    def handle_completions(self, wish):
        if len(wish["prompt"]) == 1200:
            raise SystemExit("out of slots")
        if len(wish["prompt"]) == 1150:
            return {"error": {"n_ctx": 1150, "message": "exceeds the context"}}
        if len(wish["prompt"]) == 1160:
            return {"error": {"n_ctx": 500, "message": "exceeds the context"}}
        return {"choices": [{"text": str(len(wish["prompt"]))}]}
"""


@pytest.fixture
def engine(tmp_path, monkeypatch, bench):
    """A package `xllamacpp` that answers with the length of the prompt, and dies at 1,200."""
    (tmp_path / "xllamacpp.py").write_text(FAKE_ENGINE)
    about = tmp_path / "xllamacpp-7.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: xllamacpp\nVersion: 7\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(bench, "gguf_of", lambda model: contextlib.nullcontext("some.gguf"))


def test_bench_times_other_engines_on_the_same_prompts(folder, bench, engine, capsys, tmp_path):
    options = {
        "output": tmp_path / "out",
        "model": str(folder / "model"),
        "text": str(folder / "prose.txt"),
        "method": ["a_shape:window=256"],
        "repeats": 1,
        "peer": ["llama.cpp"],
    }
    bench.main(**options, lengths="1100")
    rows = [json.loads(line) for line in (tmp_path / "out/runs.jsonl").read_text().splitlines()]
    (other,) = [row for row in rows if row["method"] == "llama.cpp"]
    assert (other["token"], other["version"], other["calls"]) == ("1100", "7", None)
    assert other["seconds"] > 0
    dense = next(row for row in rows if row["method"] == bench.DENSE)
    assert dense["peak"] is None or dense["peak"] > 2**20
    bench.main(**options, lengths="1100,1200", peer_longest="1100")
    table = (tmp_path / "out/table.md").read_text()
    assert "| 1,100 | llama.cpp |" in table
    assert "| 1,200 | a_shape" in table
    assert "| 1,200 | llama.cpp |" not in table
    bench.main(**options, lengths="1150")  # fills the context: the first token is left out
    assert '"token": "1149"' in (tmp_path / "out/runs.jsonl").read_text()
    for length in ("1160", "1200"):
        with pytest.raises(typer.Exit):
            bench.main(**options, lengths=length)
    said = " ".join(capsys.readouterr().err.split())
    assert "--peer llama.cpp ended by itself" in said
    assert "exceeds the context" in said
    assert "out of slots" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peer": ["vllm"]}, "--peer vllm: choose of openvino, openvino:trishape"),
        ({"peer": ["openvino"]}, "other engines load .gguf files, or smollm2"),
        ({"peer": ["openvino"], "device": "cuda"}, "--peer with --device cuda"),
    ],
)
def test_bench_refuses_engines_that_cannot_run(folder, bench, capsys, tmp_path, changes, message):
    with pytest.raises(typer.Exit):
        bench.main(tmp_path, model=str(folder / "model"), text=str(folder / "prose.txt"), **changes)
    assert message in " ".join(capsys.readouterr().err.split())


def test_bench_ratios_are_paired_by_round(bench):
    def row(method, seed, seconds):
        calls = None if method == bench.DENSE else {"sparse": 3, "exact": {"short": 1}}
        return {
            "length": 8, "seed": seed, "method": method, "seconds": seconds,
            "density": None if calls is None else 0.25, "calls": calls,
        }  # fmt: skip

    rows = [row(bench.DENSE, s, t) for s, t in enumerate((1.0, 10.0, 4.0))]
    rows += [row("m", s, t) for s, t in enumerate((0.5, 10.0, 1.0))]
    dense, cell = bench.cells(rows, 8, [bench.DENSE, "m"], "float32")
    assert (dense.ratio.median, dense.seconds) == (1.0, 4.0)
    assert (cell.ratio.median, cell.ratio.low, cell.ratio.high) == (2.0, 1.0, 4.0)
    assert (cell.facts["density"], cell.facts["exact"]) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("tokens", "dtype", "seconds", "recall", "missed"),
    [
        (2048, "float32", 9.7, None, ""),
        (2048, "float32", 10.4, None, "0.97x"),
        (8192, "bfloat16", 5.0, 0.95, ""),
        (8192, "bfloat16", 5.1, 0.95, "2x"),
        (8192, "bfloat16", 5.1, 0.94, ""),  # the target is for those that keep enough
        (8192, "bfloat16", 6.0, None, "best peer"),
        (8192, "float32", 8.0, 0.96, "1.5x, best peer"),
        (16384, "bfloat16", 3.0, None, "3.5x"),
        (16384, "float32", 9.0, None, ""),
    ],
)
def test_bench_says_which_targets_a_method_misses(bench, tokens, dtype, seconds, recall, missed):
    def row(method, seconds, **more):
        return {"length": tokens, "seed": 0, "method": method, "seconds": seconds,
                "density": None, "calls": None, **more}  # fmt: skip

    peers = ["openvino", "llama.cpp"]
    rows = [row(bench.DENSE, 10.0), row("m", seconds, recall=recall)]
    rows += [row(name, t) for name, t in zip(peers, (6.0, 7.0), strict=True)]
    cells = bench.cells(rows, tokens, [bench.DENSE, "m", *peers], dtype)
    found = {cell.name: ", ".join(cell.missed) for cell in cells}
    assert found == {bench.DENSE: "", "m": missed, **dict.fromkeys(peers, "")}
