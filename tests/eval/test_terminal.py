"""What commands print, at any width: whole numbers, no line wider than the terminal."""

import re
import sys

import pytest
from sparse_patch_eval.ask.expected import keeps_everything
from sparse_patch_eval.cli.app import app
from sparse_patch_eval.lm_eval_model import __main__ as lm_eval_main
from transformers import LlamaConfig
from typer.testing import CliRunner

from sparse_patch import get_method, list_methods

NARROW = "a_shape:sink=16,window=128"


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory):
    """Words of an evaluation, and what it printed: all others find its answers."""
    output = tmp_path_factory.mktemp("runs")
    words = [
        "eval", "--model", folder / "model", "--method", NARROW, "--lengths", "2k", "--limit", "2",
        "--tasks", f"perplexity_{folder / 'walks.txt'}", "--output", output,
    ]  # fmt: skip
    words = list(map(str, words))
    return words, CliRunner().invoke(app, words, env={"COLUMNS": "80"})


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_of_an_evaluation_fits(evaluated, monkeypatch, width):
    words, _ = evaluated
    monkeypatch.setattr("sparse_patch_eval.cli.eval.console.width", width)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= width
    (dense,) = re.findall(r"^ dense .*$", done.stdout, re.M)
    assert re.fullmatch(r" dense +2 +\d+\.\d{3} +- +1\.000 +- +- +- *", dense)
    assert re.search(r"\[[+-]\d\.\d{3}, [+-]\d\.\d{3}\]", done.stdout)
    assert "…" not in done.stdout
    assert ": nll" in done.stdout


def test_what_will_run_exact_is_said_before_the_run(evaluated, tmp_path):
    words, done = evaluated
    assert "runs exact" not in done.output
    words = [*words[:-1], str(tmp_path)]
    short = CliRunner().invoke(app, [*words, "--min-length", "4000"], env={"COLUMNS": "200"})
    assert short.exit_code == 0, short.output
    assert "at 2,048 tokens every method runs exact, below --min-length 4000" in short.output
    wide = "flexprefill:min_budget=4096"
    method = CliRunner().invoke(app, [*words, "--method", wide], env={"COLUMNS": "200"})
    said = " ".join(method.output.split())
    assert f"at 2,048 tokens {wide} runs exact, because it keeps everything" in said
    assert f"{NARROW} runs exact" not in said


def test_a_method_that_chooses_is_not_said_to_keep_everything():
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2)
    for name in list_methods():
        sparse = get_method(name).__class__.examples.get("sparse")
        if sparse:
            assert not keeps_everything(get_method(name, **sparse), 1024, config), name
    assert keeps_everything(get_method("flexprefill", min_budget=2048), 2000, config)
    assert not keeps_everything(get_method("flexprefill", min_budget=2048), 10**6, config)
    assert not keeps_everything(get_method("pbs", tau=(0.9, 0.9, 0.9)), 1024, config)


def test_the_tasks_are_listed_without_lm_eval(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("sparse_patch_eval.runs")]:
        monkeypatch.delitem(sys.modules, name)
    for package in ("lm_eval", "datasets", "scipy", "jinja2"):
        monkeypatch.setitem(sys.modules, package, None)
    done = CliRunner().invoke(app, ["tasks"])
    assert done.exit_code == 0, done.output
    assert "passkey" in done.output
    assert "longbench" in done.output


@pytest.mark.parametrize("words", [[], ["--help"], ["run", "-h"]])
def test_the_help_of_lm_eval_names_our_model(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["sparse-patch-lm-eval", *words])
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: print("usage: lm-eval"))
    lm_eval_main.main()
    said = capsys.readouterr().out
    assert "--model sparse_patch" in said
    assert "pretrained=smollm2,method=strided:preset=fine" in said
    assert said.rstrip().endswith("usage: lm-eval")
