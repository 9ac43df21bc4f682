"""Several processes: each sample once, the same numbers as one process, one result. On the CPU."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sparse_patch_eval.lm_eval_model.model import SparsePatchLM

from tests.eval.lm_models import PAIRS, SPARSE, TASKS, instances, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROOT = Path(__file__).parents[2]
SECONDS = 180  # until a process counts as stuck; the tests take a tenth


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more):
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "eval"))
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "PYTHONPATH": paths, **more}


def run(command, env):
    """Run a command, which must end well."""
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(tempfile.TemporaryFile("w+"))
        process = subprocess.Popen(
            [sys.executable, *command],
            env=env, cwd=ROOT, start_new_session=True, stdout=output, stderr=output,
        )  # fmt: skip
        stack.callback(end, process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS)
        output.seek(0)
        assert process.poll() == 0, output.read()[-6000:]


def end(process):
    """End a process and its children, if they still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("scale") / "tiny"))


@pytest.fixture(scope="module")
def alone(model):
    """One process: lm-eval's samples and results."""
    from tests.eval.lm_worker import evaluate

    return evaluate(SparsePatchLM(model, **SPARSE))


@pytest.fixture(scope="module")
def launched(model, tmp_path_factory):
    """The folder of what two processes of `accelerate launch` wrote down.

    One launch for all, since most of a launch is imports: each process does what `lm_worker` says,
    and then runs lm-eval's command line.
    """
    out = tmp_path_factory.mktemp("launched")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", str(free_port()), "-m", "tests.eval.lm_worker", model]
    arguments = [f"pretrained={model}", f"method={SPARSE['method']}"]
    arguments += [f"{key}={SPARSE[key]}" for key in ("min_length", "min_queries")]
    command = ["run", "--model", "sparse_patch", "--model_args", ",".join(arguments)]
    command += ["--tasks", "sp_choice,sp_write,sp_perplexity", "--include_path", str(TASKS)]
    command += ["--output_path", str(out), "--log_samples"]
    no_file = environment(ACCELERATE_CONFIG_FILE=str(out / "none.yaml"))
    run([*launch, str(out), *command], no_file)
    return out


@pytest.fixture(scope="module")
def workers(launched):
    return [json.loads((launched / f"{rank}.json").read_text()) for rank in (0, 1)]


def assert_same_run(found, alone):
    """The same results, and every sample once."""
    for task, rows in alone["samples"].items():
        assert sorted(number for number, _ in found["samples"][task]) == [0, 1, 2, 3, 4]
        for (_, ours), (_, wanted) in zip(sorted(found["samples"][task]), rows, strict=True):
            if task == "sp_write":
                assert ours == wanted
            else:
                assert numbers(ours) == pytest.approx(numbers(wanted), abs=1e-3)
        for metric, value in alone["results"][task].items():
            if isinstance(value, float):
                assert found["results"][task][metric] == pytest.approx(value, rel=1e-4)


def numbers(answers):
    """Scores in one flat list: pairs for choices, single ones for rolling likelihoods.

    lm-eval writes them as text.
    """
    flat = []
    for one in answers:
        flat.extend(numbers(one) if isinstance(one, (list, tuple)) else [one])
    return [float({"True": 1, "False": 0}.get(one, one)) for one in flat]


def test_tensor_parallel_processes_say_what_one_process_says(model, workers):
    lm = SparsePatchLM(model, **SPARSE)
    wanted = lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    asked = [(context, {"max_gen_toks": 6}) for context, _ in PAIRS[:-1:5]]
    texts = lm.generate_until(instances("generate_until", asked), disable_tqdm=True)
    for worker in workers:
        found = worker["tensor"]
        assert [greedy for _, greedy in found["scores"]] == [greedy for _, greedy in wanted]
        ours = [number for number, _ in found["scores"]]
        assert ours == pytest.approx([number for number, _ in wanted], abs=1e-4)
        assert found["texts"] == texts
        assert found["heads"] == [[2, 1]], "4 query and 2 KV heads, over two processes"


def test_one_tensor_parallel_process_writes_for_all(workers, alone):
    first, second = (worker["tensor"] for worker in workers)
    assert (first["writer"], second["writer"]) == (True, False)
    assert (first["shared"], second["shared"]) == (["row"], None)
    assert second["run"] is None
    assert_same_run(first["run"], alone)
    assert first["run"]["info"]["processes"] == 2
    assert first["run"]["info"]["density"] < 1


def test_what_is_about_all_heads_is_refused_when_heads_are_split(workers):
    for worker in workers:
        names = ("gamma", "heads", "n_proxy")
        for text, name in zip(worker["tensor"]["refused"], names, strict=True):
            assert f"{name} refers to all heads" in text


def test_every_node_takes_its_share_of_the_data(workers, alone):
    first, second = (worker["data"] for worker in workers)
    assert [first["rank"], second["rank"]] == [0, 1]
    assert first["world"] == second["world"] == 2
    assert first["gathered"] == second["gathered"] == [0, 1]
    assert (first["writer"], second["writer"]) == (True, False)
    assert (first["shared"], second["shared"]) == (["row of 0", "row of 1"], None)
    assert second["run"] is None
    assert_same_run(first["run"], alone)


def test_statistics_of_all_processes_come_together(workers, alone):
    """5 documents over 2 processes: lm-eval repeats the last of one, to keep them in step.

    Repeated choices are scored from a prefill they have already.
    """
    info = workers[0]["data"]["run"]["info"]
    assert info["processes"] == 2
    assert alone["info"]["prefill"]["calls"] == 3 * 3 * 5  # layers, tasks, documents
    assert info["prefill"]["calls"] == 3 * (5 + 6 + 6)
    assert info["density"] == pytest.approx(alone["info"]["density"], abs=0.1)
    assert info["prefill"]["layers"][2]["calls"] == info["prefill"]["calls"] / 3


def test_lm_evals_command_line_shares_the_samples_out(launched, alone):
    (results,) = launched.rglob("results_*.json")
    found = json.loads(results.read_text())
    samples = {}
    for task in alone["samples"]:
        (file,) = launched.rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        samples[task] = [(row["doc_id"], row["filtered_resps"]) for row in rows]
    assert_same_run({"results": found["results"], "samples": samples}, alone)
    assert found["config"]["sparse_patch"]["processes"] == 2
