"""Every command says what is missing or wrong before it works, in a line with what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sparse_patch_eval.base.early import check_backend, check_device, check_output, require
from sparse_patch_eval.cli import demo
from sparse_patch_eval.cli.app import app
from sparse_patch_eval.inputs import models
from sparse_patch_eval.runs import wanted
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
WORKING = ("demo", "inspect", "eval", "tune")  # the commands that load a model


@pytest.fixture
def refused(monkeypatch, folder, tmp_path):
    """Runs a command that must end before it loads a model, and leave nothing; what it says."""

    def worked(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", worked)
    monkeypatch.setattr(demo, "load_for_lengths", worked)
    monkeypatch.setattr("sparse_patch_eval.lm_eval_model.model.SparsePatchLM", worked)
    # lm-eval looks for its own tasks, in seconds; ours are enough here.
    make = wanted._manager
    monkeypatch.setattr(wanted, "_manager", lambda *a, **k: make(*a, **{**k, "defaults": False}))
    tasks = f"perplexity_{folder / 'walks.txt'}"
    text = {"eval": ("--tasks", tasks, "--lengths", "2k", "--limit", 2)}

    def run(command, *arguments):
        own = text.get(command, ("--text", folder / "prose.txt"))
        words = [command, "--model", folder / "model", *own, *arguments]
        if command == "report":
            words = [command, *arguments]
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 2, done.output
        assert "Traceback" not in done.output
        assert list(tmp_path.iterdir()) == []
        said = done.output.strip()
        assert "\n" not in said, "one line"
        return said

    return run


@pytest.mark.parametrize("command", [*WORKING, "report"])
def test_an_output_folder_that_cannot_be(refused, command):
    said = refused(command, *(["."] if command == "report" else []), "--output", "/proc/x")
    assert said.startswith("error: --output /proc/x cannot be written (/proc: ")
    assert said.endswith("; name another folder")


@pytest.mark.parametrize("command", WORKING)
def test_an_output_folder_that_is_a_file(refused, command, folder):
    said = refused(command, "--output", folder / "prose.txt")
    assert "prose.txt cannot be written" in said
    assert "Not a directory" in said


@NO_GPU
@pytest.mark.parametrize("command", WORKING)
def test_a_device_that_is_not_there(refused, command):
    said = refused(command, "--device", "cuda")
    assert "error: --device 'cuda' is not to be had here" in said
    assert said.endswith("; try cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "meta"])
def test_a_device_that_is_none(device):
    with pytest.raises(ValueError, match=rf"--device '{device}' .*try cpu"):
        check_device(device)
    check_device("cpu")


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("inspect", "matplotlib", "eval"),
        ("inspect", "jinja2", "eval"),
        ("eval", "lm_eval", "eval"),
        ("report", "matplotlib", "eval"),
        ("report", "scipy", "eval"),
    ],
)
def test_a_package_that_is_missing(refused, monkeypatch, command, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    said = refused(command, *(["."] if command == "report" else []))
    assert package.replace("_", "-") in said.replace("_", "-")
    assert f'pip install "sparse-patch[{extra}]"' in said


def test_what_is_missing_is_named_altogether():
    require("this", "torch", "json", extra="eval")
    with pytest.raises(ImportError, match=r'^this needs nosuch and nor this: pip .*\[demo\]"$'):
        require("this", "torch", "nosuch", "nor this", extra="demo")


def test_a_backend_that_cannot_run(refused, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "--backend nosuch: backend='nosuch': choose one of" in refused(
        "eval", "--backend", "nosuch"
    )
    assert "backend='triton' needs tensors on a GPU" in refused("eval", "--backend", "triton")
    check_backend("auto", "nowhere")
    check_backend("cpu", "cpu")


@pytest.mark.parametrize("command", ["demo", "inspect", "tune"])
def test_a_text_that_is_not_there(refused, command):
    assert "nothing.txt" in refused(command, "--text", "nothing.txt")


def test_a_prompt_that_is_not_there(refused):
    assert "--prompt" in refused("inspect", "--prompt", "nothing.txt")


@pytest.mark.parametrize("name", ["runs", "a/b/runs", "."])
def test_a_check_of_a_folder_leaves_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    check_output(Path(name))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="Permission denied"):
        check_output(tmp_path / "runs")


@pytest.mark.parametrize("command", ["tune", "eval", "demo", "inspect"])
def test_a_prompt_that_cannot_be_made_leaves_no_folder(folder, tmp_path, command):
    """Found out with the tokenizer, so after the model is loaded."""
    (tmp_path / "short.txt").write_text("A few words. " * 3)
    text = {"eval": ("--tasks", f"perplexity_{tmp_path / 'short.txt'}")}
    length = "--length" if command in ("tune", "inspect") else "--lengths"
    words = [
        *(command, "--model", folder / "model", length, "2k", "--output", tmp_path / "out"),
        *text.get(command, ("--text", tmp_path / "short.txt")),
    ]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 2
    assert "short" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_the_command_of_a_bare_wheel_says_what_to_install(package):
    code = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['sparse-patch', 'demo']\n"
        "from sparse_patch_eval.cli.__main__ import main; main()"
    )
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "eval"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"sparse-patch: the command line needs {package}: "
        'pip install "sparse-patch[demo]"\n'
    )  # fmt: skip
