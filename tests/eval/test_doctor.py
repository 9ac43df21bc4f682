"""`sparse-patch doctor`: it finds what is wrong, says why, and its exit status says whether."""

import json

import pytest
import torch
from sparse_patch_eval.ask import doctor, self_test
from sparse_patch_eval.cli.app import app
from sparse_patch_kernels.cpu import building, native
from typer.testing import CliRunner

import sparse_patch


@pytest.fixture(autouse=True)
def asked_anew():
    doctor.why_no_cpu_kernel.cache_clear()
    yield
    doctor.why_no_cpu_kernel.cache_clear()


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_the_version():
    done = run("--version")
    assert (done.exit_code, done.stdout) == (0, f"sparse-patch {sparse_patch.__version__}\n")


def test_a_sound_installation_holds_and_its_facts_are_json():
    done = run("doctor", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ok"]
    assert {check["name"] for check in found["self-test"]} >= {
        "cpu: op in float32", "cpu: op in bfloat16", "cpu: op in float16", "cpu: patched model",
    }  # fmt: skip
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["sparse-patch"].startswith(sparse_patch.__version__)
    if native.compiled():
        assert native.products() in found["backend"]["cpu"]
    (cache, *_) = found["caches"]
    assert cache == str(building.cache_folder())


def test_the_text_has_the_same_facts(monkeypatch):
    monkeypatch.setenv("SPARSE_PATCH_COMPILE", "0")
    monkeypatch.setattr(self_test, "_patched", lambda device: (True, "was asked"))
    monkeypatch.setenv("SPARSE_PATCH_CACHE", "/nowhere/at all")
    done = run("doctor")
    assert done.exit_code == 0, done.output
    assert "cpu: cpu, in PyTorch and slower: SPARSE_PATCH_COMPILE=0 asks for it" in done.stdout
    assert "SPARSE_PATCH_COMPILE: 0" in done.stdout
    assert "/nowhere/at all: not there yet" in done.stdout
    assert "  ok  cpu: patched model: was asked" in done.stdout
    assert done.stdout.rstrip().endswith("checks hold")


def test_an_op_that_is_wrong_fails_the_self_test(monkeypatch):
    right = self_test.block_sparse_attention

    def wrong(q, k, v, plan, *, backend):
        out = right(q, k, v, plan, backend=backend)
        return out if backend == "reference" else out * 1.01

    monkeypatch.setattr(self_test, "block_sparse_attention", wrong)
    done = run("doctor", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert not found["ok"]
    held = {check["name"]: check["ok"] for check in found["self-test"]}
    assert not held["cpu: op in float32"]
    assert held["cpu: patched model"]


def test_what_a_check_raises_is_its_finding(monkeypatch):
    def broken(*_, **__):
        raise OSError("libgomp.so.1: cannot open")

    monkeypatch.setattr(self_test.sparse_patch, "patch", broken)
    done = run("doctor")
    assert done.exit_code == 1
    assert "FAILS  cpu: patched model: OSError: libgomp.so.1: cannot open" in done.stdout
    assert "1 of 4 checks fail: paste all of the above into a bug report" in done.output


def test_a_patch_that_changes_the_answer_is_found(monkeypatch):
    monkeypatch.setattr(self_test, "_difference", lambda a, b: 0.5)
    (check,) = [one for one in self_test.self_test(["cpu"]) if "patched" in one.name]
    assert not check.ok
    assert "not so: keeping everything changes logits by 5.0e-01" in check.found


def test_a_machine_without_a_compiler_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_PATCH_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.about_this_machine()["compiler"] == {"C++": "none found"}
    assert "no c++, g++, clang++ on PATH. Install a C++ compiler" in doctor.why_no_cpu_kernel()


def test_a_gpu_without_triton_runs_exact_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("sparse_patch_kernels.triton_installed", lambda: False)
    assert doctor.devices() == ["cpu", "cuda:0"]
    said = doctor._backend("cuda:0")
    assert said.startswith("none, all calls run exact: ")
    assert "pip install 'sparse-patch[triton]'" in said
