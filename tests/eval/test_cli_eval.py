"""`sparse-patch eval`, from the command line to the files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from sparse_patch_eval.cli.app import app
from sparse_patch_eval.runs import wanted
from transformers import AutoTokenizer
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
A_SHAPE = "a_shape:sink=16,window=128"
CONFIGS = sorted((ROOT / "scripts" / "eval").glob("*.yaml"))


@pytest.fixture(scope="module")
def run():
    runner = CliRunner()

    def invoke(*words, fails=False):
        result = runner.invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
        assert (result.exit_code == 2) == fails, result.output
        if not fails:
            assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    return invoke


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    """The tiny model, with what lm-eval expects of a tokenizer: a last token, a chat template."""
    path = tmp_path_factory.mktemp("cli") / "model"
    shutil.copytree(folder / "model", path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.eos_token = tokenizer.pad_token = "~"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


def _words(folder, model, output):
    """A small evaluation, without what a test changes."""
    tasks = f"sp_passkey,perplexity_{folder / 'walks.txt'}"
    return [
        "eval", "--model", model, "--method", A_SHAPE, "--tasks", tasks,
        "--lengths", "2k", "--limit", "2", "--output", output,
    ]  # fmt: skip


@pytest.fixture
def words(folder, model, tmp_path):
    return _words(folder, model, tmp_path / "runs")


def _runs(folder):
    found = {}
    for path in folder.rglob("run.json"):
        about = json.loads(path.read_text())
        samples = (path.parent / "samples.jsonl").read_text().splitlines()
        found[about["method"]] = (about, [json.loads(line) for line in samples])
    return found


def test_methods_are_measured_against_dense(run, words, tmp_path):
    output = run(*words)
    runs = _runs(tmp_path / "runs")
    assert set(runs) == {"dense", A_SHAPE}
    for method, (about, samples) in runs.items():
        assert [row["task"].split("_/")[0] for row in samples] == ["sp_passkey"] * 2 + [
            "perplexity"
        ] * 2
        assert all(1900 < row["tokens"] <= 2048 for row in samples)
        passkey, text = samples[0], samples[2]
        assert list(passkey["scores"]) == ["string_match", "rank", "answer_nll"]
        assert list(text["scores"]) == ["nll", "kl"]
        assert passkey["machine"]["torch"]
        if method == "dense":
            assert about["params"] == {}
            assert text["scores"]["kl"] == 0
        else:
            assert about["params"]["window"] == 128
            assert 0 < text["density"] < 1
            assert text["scores"]["kl"] > 0
            assert 0 < passkey["recall"] < 1
    assert "passkey" in output
    assert (tmp_path / "runs" / "table.md").read_text().count("| perplexity_") == 2
    assert "already answered" in run(*words)


def test_other_arguments_of_a_task_are_another_run(run, words, tmp_path):
    """Their prompts have the same names, and must not lie among each other."""
    words = [*words, "--tasks", "sp_niah_grid", "--limit", 1]
    haystack = [
        "--task-arg",
        f"haystack={words[words.index('--tasks') + 1].split('perplexity_')[1]}",
    ]
    run(*words, *haystack, "--task-arg", "depths=2")
    run(*words, *haystack, "--task-arg", "depths=2", "--task-arg", "wording=question")
    counts = [len(path.read_text().splitlines()) for path in tmp_path.rglob("samples.jsonl")]
    assert counts == [2] * 4


def test_a_yaml_file_gives_the_options_and_flags_win(run, words, tmp_path, monkeypatch):
    """Its paths are from the current folder, as those of flags are."""
    monkeypatch.chdir(tmp_path)
    options = {"method": [A_SHAPE], "lengths": ["2k"], "limit": 1, "tasks": ["sp_passkey"]}
    options |= {"model": "a-model-that-is-not-there", "output": "yaml"}
    (tmp_path / "configs").mkdir()
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(options))
    (tmp_path / "configs/eval.yaml").write_text(yaml.safe_dump(options))
    run("eval", "--config", "configs/eval.yaml", "--limit", 3, "--model", words[2])
    runs = _runs(tmp_path / "yaml")
    assert {len(samples) for _, samples in runs.values()} == {3}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump({**options, "metod": "x"}))
    assert "metod" in run("eval", "--config", tmp_path / "eval.yaml", fails=True)


@pytest.mark.parametrize(
    ("option", "value", "path"),
    [
        ("output", "../runs", "../runs"),
        ("output", "a/../../runs", "a/../../runs"),
        ("output", "/tmp/runs", "/tmp/runs"),
        ("output", "~/runs", "~/runs"),
        ("output", "C:\\runs", "C:\\runs"),
        ("model", "../model", "../model"),
        ("data_dir", "..", ".."),
        ("data-dir", "a\\..\\b", "a\\..\\b"),
        ("tasks", ["sp_passkey", "perplexity_/etc/passwd"], "/etc/passwd"),
        ("tasks", "sp_passkey, perplexity_../x", "../x"),
        ("task_arg", ["depths=2", "haystack=../x"], "../x"),
        ("model_arg", "peft=/x", "/x"),
        ("method", ["pbs", "xattention:thresholds=../t.json"], "../t.json"),
        ("model_arg", ["trust_remote_code=True"], "trust_remote_code"),
        ("model-arg", "trust_remote_code=1", "trust_remote_code"),
    ],
)
def test_a_yaml_file_cannot_say_what_leads_out_of_the_folder(run, tmp_path, option, value, path):
    file = tmp_path / "eval.yaml"
    file.write_text(yaml.safe_dump({"model": "none", "tasks": ["sp_passkey"], option: value}))
    said = run("eval", "--config", file, fails=True)
    assert repr(path)[1:-1] in said.replace(" │ │ ", "")
    assert "on the command line" in " ".join(said.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch owned']", "a: b: c", "[1, 2]", "\x00"]
)
def test_a_yaml_file_is_data(run, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval.yaml").write_text(text)
    assert "eval.yaml" in run("eval", "--config", "eval.yaml", fails=True)
    assert [path.name for path in tmp_path.iterdir()] == ["eval.yaml"]


@pytest.fixture(scope="module")
def tasks_of_lm_eval():
    """Lm-eval looks for its own tasks once: that takes it seconds."""
    make, found = wanted._manager, {}

    def once(*args, defaults, **more):
        if not defaults:
            return make(*args, defaults=False, **more)
        if not found:
            found["all"] = make(*args, defaults=True, **more)
        return found["all"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wanted, "_manager", once)
        yield


@pytest.mark.usefixtures("tasks_of_lm_eval")
def test_a_task_is_a_name_and_not_a_file_that_runs_code(run, words, tmp_path):
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nf = None")
    (tmp_path / "task.yaml").write_text("task: t\ncustom_dataset: !function code.f\n")
    words[words.index("--tasks") + 1] = str(tmp_path / "task.yaml")
    assert "--tasks: unknown task" in run(*words, fails=True)
    assert not (tmp_path / "owned").exists()


@pytest.fixture
def own_code(model, tmp_path):
    """A model whose folder brings code that leaves a trace, and that trace."""
    trace, path = tmp_path / "owned", tmp_path / "evil"
    shutil.copytree(model, path)
    (path / "own.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig): model_type = 'own'\n"
        "class M(LlamaForCausalLM): config_class = C\n"
    )
    config = json.loads((path / "config.json").read_text())
    code = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    (path / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": code}))
    return path, trace


@pytest.mark.parametrize("more", [[], ["--model-arg", "trust_remote_code=false"]])
def test_code_of_a_model_is_run_only_where_a_flag_says_so(run, words, own_code, more):
    words[2], trace = own_code
    said = run(*words, *more, fails=True)
    assert "has Python code of its own, which is not run" in said
    assert "--model-arg trust_remote_code=True" in said
    assert not trace.exists()
    for other in ("demo", "inspect"):
        assert "which is not run" in run(other, "--model", own_code[0], fails=True)
    assert not trace.exists()


def test_a_flag_lets_code_of_a_model_run(own_code, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(own_code[0].parent / "modules"))
    from sparse_patch_eval.lm_eval_model.model import SparsePatchLM

    with pytest.raises(ValueError, match="trust_remote_code='yes' must be True or False"):
        SparsePatchLM(str(own_code[0]), trust_remote_code="yes")
    assert not own_code[1].exists()
    SparsePatchLM(str(own_code[0]), device="cpu", trust_remote_code=True)
    assert own_code[1].exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--method", "nosuch"], "nosuch"),
        (["--method", "a_shape:windw=3"], "windw"),
        (["--tasks", "nosuch"], "sparse-patch tasks"),
        (["--tasks", ""], "--tasks"),
        (["--lengths", ""], "--lengths"),
        (["--lengths", "8k"], "takes 4096 tokens"),
        (["--lengths", "64"], "64"),
        (["--tasks", "babilong", "--lengths", "3k"], "babilong"),
        (["--model-arg", "oops"], "--model-arg"),
        (["--backend", "nosuch"], "nosuch"),
        (["--tasks", "longbench2", "--data-dir", "/nowhere"], "/nowhere"),
    ],
)
@pytest.mark.usefixtures("tasks_of_lm_eval")
def test_wrong_options_are_errors_before_anything_is_prefilled(
    run, words, tmp_path, changes, message
):
    assert message in run(*words, *changes, fails=True)
    assert not list(tmp_path.rglob("responses*"))


def test_the_tasks_are_listed(run):
    listed = run("tasks")
    for name in ("ruler", "niah", "passkey", "kv_retrieval", "perplexity", "longbench", "babilong"):
        assert f" {name} " in listed


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_committed_configurations_run(run, config, folder, model, tmp_path):
    """All their methods and tasks, on a tiny random model: the code path of the real one."""
    asked = yaml.safe_load(config.read_text())
    tasks = [one for one in asked["tasks"] if one != "ruler"]  # its 13 tasks would take minutes
    text = f"perplexity_{folder / 'walks.txt'}"
    tasks = [text if one.startswith("perplexity") else one for one in tasks]
    run(
        "eval", "--config", config, "--model", model, "--device", "cpu", "--dtype", "float32",
        "--tasks", ",".join(tasks),
        "--task-arg", f"haystack={folder / 'walks.txt'}", "--task-arg", "depths=2",
        "--lengths", "2k", "--limit", 1, "--output", tmp_path / "runs",
    )  # fmt: skip
    runs = _runs(tmp_path / "runs")
    assert set(runs) == {"dense", *asked["method"]}
    for about, samples in runs.values():
        assert about["chat_template"] == asked.get("chat_template", False)
        assert len({row["task"] for row in samples}) >= 2


def _assert_same(found, expected):
    assert set(found) == set(expected)
    for method, (_, samples) in expected.items():
        others = {(row["task"], row["doc_id"]): row for row in found[method][1]}
        assert len(others) == len(samples) == len(found[method][1]) == 6, "each sample once"
        for row in samples:
            other = others[row["task"], row["doc_id"]]
            assert other["prompt_hash"] == row["prompt_hash"]
            assert other["scores"] == pytest.approx(row["scores"], abs=1e-4)
            assert other["answer"] == row["answer"]


@pytest.fixture(scope="module")
def of_one_process(run, folder, model, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    run(*_words(folder, model, output), "--limit", 3)
    return _runs(output)


@pytest.fixture(scope="module")
def of_two_processes(folder, model, tmp_path_factory):
    """Folders of what two processes write: each with a model, and with one that they hold together.

    One launch of torchrun for both, since most of a launch is imports.
    """
    outputs = [tmp_path_factory.mktemp(name) for name in ("shared", "together")]
    more = ([], ["--model-arg", "tp_plan=auto"])
    commands = [
        [*map(str, _words(folder, model, output)), *options, "--limit", "3"]
        for output, options in zip(outputs, more, strict=True)
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "eval")),
    }
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, "-m", "tests.eval.cli_worker", json.dumps(commands)]
    subprocess.run(command, check=True, env=environment, timeout=240, capture_output=True)
    return outputs


@pytest.mark.wide
def test_two_processes_share_the_samples(of_two_processes, of_one_process):
    folder, _ = of_two_processes
    _assert_same(_runs(folder), of_one_process)
    logs = list(folder.rglob("responses.1.jsonl"))
    assert logs
    assert all(path.read_text().splitlines() for path in logs)


@pytest.mark.wide
def test_two_processes_hold_one_model_together(of_two_processes, of_one_process):
    _, folder = of_two_processes
    _assert_same(_runs(folder), of_one_process)
    assert not list(folder.rglob("responses.1.jsonl")), "one of them writes"
