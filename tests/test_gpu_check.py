"""scripts/gpu_check.sh: its dry run, and that it can fail."""

import json
import os
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the triton package is not installed")

import gpu_check
from gpu_checks import (
    estimators,
    inputs,
    methods,
    op_speed,
    parity,
    preflight,
    process,
    report,
)
from gpu_checks.device import Device
from gpu_checks.scale import FULL, TOY
from gpu_checks.stage import DeviceLost, Stage
from sparse_patch_eval.base.rows import read_rows
from sparse_patch_kernels import block_sparse_attention, dispatch

import sparse_patch
from tests import zoo
from tests.kernels.interpreted import require_interpreter
from tests.methods import examples

ROOT = Path(__file__).parents[1]
TARGETS = (
    "every kernel as the reference",
    "every method as on the CPU",
    "op within 1.15x of density x dense FlashAttention",
    "every estimator under 8 % of dense attention",
    "prefill with proxyattn above 2.4x of dense",
    "prefill with pbs above 2.75x of dense",
)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The results and the report of a dry run, in as much time as a slow machine may want."""
    folder = tmp_path_factory.mktemp("gpu_check")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            str(ROOT / "scripts/gpu_check.sh"),
            "--dry-run",
            "--minutes",
            "25",
            "--output",
            str(folder),
            "--name",
            "toy",
        ],
        env={**environment, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert sorted(path.name for path in folder.iterdir()) == ["gpu_toy.json", "gpu_toy.md"]
    return json.loads((folder / "gpu_toy.json").read_text()), (folder / "gpu_toy.md").read_text()


@pytest.mark.wide
def test_a_dry_run_does_every_item_of_every_stage(dry_run):
    results, text = dry_run
    rows = results["rows"]
    assert results["failures"] == []
    assert "## Failures\n\nNone." in text
    assert "Everything ran." in text
    kinds = Counter((row["stage"], row["kind"]) for row in rows)
    lengths, prefills, methods = len(TOY.lengths), len(TOY.prefills), len(TOY.methods)
    expected = {
        ("parity", "plan"): methods,
        ("methods", "method"): len(TOY.compared) * 2 * 2 * len(TOY.method_lengths),
        ("methods", "family"): len(TOY.families),
        ("op", "op"): lengths * len(TOY.densities),
        ("op", "configuration"): 1,
        ("selection", "estimator_time"): lengths * len(dispatch.KERNELS),
        ("selection", "plan_time"): lengths * methods,
        ("selection", "plain_time"): len(dispatch.KERNELS),
        ("prefill", "model"): 1,
        ("prefill", "prefill"): prefills * 6,
    }
    assert {key: kinds[key] for key in expected} == expected
    for stage in gpu_check.STAGES:
        assert kinds[stage, "begin"] == kinds[stage, "end"] > 0
    for kind in ("error", "skipped", "peer_missing"):
        assert not report.of_kind(rows, kind)


@pytest.mark.wide
def test_a_dry_run_compares_every_kernel_and_every_case(dry_run):
    rows = dry_run[0]["rows"]
    assert {row["what"] for row in report.of_kind(rows, "estimator")} == set(dispatch.KERNELS)
    for dtype in ("float32", "float16"):
        compared = [row for row in report.of_kind(rows, "estimator") if row["dtype"] == dtype]
        assert {row["what"] for row in compared} == set(dispatch.KERNELS)
    ops = report.of_kind(rows, "parity")
    exact = [row["what"] for row in ops if row["dtype"] == "float32"]
    assert exact == [case.name for case in parity.cases(TOY)]
    assert len({row["what"] for row in ops if row["dtype"] == "float16"}) > 2


@pytest.mark.wide
def test_a_dry_run_reports_every_target_as_measured(dry_run):
    results, text = dry_run
    names = [target["name"] for target in results["targets"]]
    assert len(names) == len(TARGETS)
    for name, start in zip(names, TARGETS, strict=True):
        assert name.startswith(start)
    assert report.UNKNOWN not in [target["verdict"] for target in results["targets"]]
    assert [target["verdict"] for target in results["targets"][:2]] == [report.PASS] * 2
    # No table is empty.
    assert "|\n\n" in text
    assert not [
        part for part in text.split("\n\n") if part.startswith("|") and part.count("\n") < 2
    ]


def test_all_kernels_can_be_compared():
    assert set(estimators.SPECS) == set(dispatch.KERNELS)


@pytest.fixture
def stage(tmp_path):
    return Stage("parity", tmp_path / "rows", time.time() + 1000, Device(False), TOY, quiet=True)


def rows_of(stage, work):
    """What a stage writes of an item, and the failures in it."""
    stage.run("item", work)
    rows = read_rows(stage._path)
    compared = [row for row in rows if "ok" in row]
    assert compared
    return compared, report.failures(rows)


def with_nan(x):
    x = x.clone()
    x.view(-1)[-1] = float("nan")
    return x


def spoiled(result, spoil):
    return (spoil(result[0]), *result[1:]) if isinstance(result, tuple) else spoil(result)


def nearly(x):
    """One number off by a little."""
    x = x.clone()
    x[0, -1, 0] += 2e-3 * x.abs()[x.isfinite()].max()
    return x


def nearly_line(x):
    return nearly(x[..., None])[..., 0]


def one_too_few(result):
    """The last list lacks its last entry."""
    index, count = result
    count = count.clone()
    count[-1, -1] -= 1
    return index, count


WRONG = {
    "pool_mean": lambda result: spoiled(result, nearly),
    "probe_lines": lambda result: (result[0], nearly_line(result[1])),
    "key_scores": lambda result: spoiled(result, nearly_line),
    "token_scores": lambda result: spoiled(result, nearly),
    "antidiagonal_scores": lambda result: spoiled(result, nearly),
    "compact": one_too_few,
    "search_leaves": one_too_few,
}


@pytest.mark.parametrize("name", WRONG)
def test_an_estimator_that_is_wrong_fails(stage, monkeypatch, name):
    module = require_interpreter(dispatch.KERNELS[name][0].removeprefix("sparse_patch_kernels."))
    right = getattr(module, name)
    monkeypatch.setitem(
        estimators.SPECS, name, replace(estimators.SPECS[name], calls=lambda make: iter(()))
    )
    wrongs = [WRONG[name]]
    if name not in ("compact", "search_leaves"):
        wrongs.append(lambda result: spoiled(result, with_nan))
    for wrong in wrongs:
        monkeypatch.setattr(
            module, name, lambda *args, wrong=wrong, **more: wrong(right(*args, **more))
        )
        (row,) = estimators._compare(stage, name, torch.float32)
        assert not row["ok"]
        assert row["of_allowed"] > 1
    _, failures = rows_of(stage, lambda: [row])
    assert [failure["what"] for failure in failures] == [name]


WRONG_OPS = {
    "output": lambda out, lse, calls: (out + 0.01, lse),
    "unwritten number": lambda out, lse, calls: (with_nan(out), lse),
    "lse": lambda out, lse, calls: (out, lse + 0.01),
    "unwritten lse": lambda out, lse, calls: (out, with_nan(lse)),
    "blind row": lambda out, lse, calls: (out, lse.index_fill(1, torch.tensor(47), -torch.inf)),
    "another at every call": lambda out, lse, calls: (out * (1 + calls * 1e-7), lse),
}


@pytest.mark.parametrize("wrong", [None, *WRONG_OPS])
def test_an_op_that_is_wrong_fails(stage, monkeypatch, wrong):
    calls = []

    def attend(stage, case, q, k, v, plan, scale, more):
        calls.append(case)
        out, lse = block_sparse_attention(
            q, k, v, plan, scale=scale, backend="reference", return_lse=True, **more
        )
        return WRONG_OPS[wrong](out, lse, len(calls)) if wrong else (out, lse)

    monkeypatch.setattr(parity, "_attend", attend)
    case = replace(parity.cases(TOY)[0], q_len=48, kv_len=48, kind="sink+window")
    (row,), failures = rows_of(stage, lambda: parity._compare(stage, case, torch.float32, [0]))
    assert row["ok"] is (wrong is None)
    assert [failure["what"] for failure in failures] == ["blocks"] * (wrong is not None)


STRIDED = {"block_size": 16, "gamma": 0.6, "stride": 4}
PLANS = 2 * len(TOY.method_lengths)  # in two dtypes


def verdicts_of_plans(stage):
    require_interpreter("triton.forward")
    return [row["ok"] for row in methods._compare_plans(stage, "strided", "short blocks", STRIDED)]


def test_a_method_s_plans_are_compared(stage):
    assert verdicts_of_plans(stage) == [True] * PLANS


def test_an_op_that_is_wrong_on_a_method_s_plan_fails(stage, monkeypatch):
    def wrong(*tensors, **more):
        return block_sparse_attention(*tensors, **more) + 0.01

    monkeypatch.setattr(methods, "block_sparse_attention", wrong)
    assert verdicts_of_plans(stage) == [False] * PLANS


def test_a_plan_that_is_not_the_cpu_s_fails(stage, monkeypatch):
    kind, calls = type(sparse_patch.get_method("strided")), []

    def plan(self, q, k, right=kind.plan, **more):
        calls.append(k)
        return right(self, q, k if len(calls) % 2 else -k, **more)

    monkeypatch.setattr(kind, "plan", plan)
    assert verdicts_of_plans(stage) == [False] * PLANS


def test_a_method_that_is_wrong_in_a_model_is_named(stage, monkeypatch):
    require_interpreter("triton.forward")
    (row,) = methods._compare_models(stage, "llama", ["strided", "dense"])
    assert row["ok"]
    assert row["methods"] == 2
    monkeypatch.setitem(examples.KEEP_ALL, "strided", STRIDED)
    (row,) = methods._compare_models(stage, "llama", ["strided", "dense"])
    assert row["wrong"] == ["strided"]
    assert not row["ok"]


def test_a_family_that_transformers_lacks_is_skipped(stage, monkeypatch):
    monkeypatch.setitem(zoo.FAMILIES, "later", zoo._family("MuchLater"))
    stage.run("models", lambda: methods._compare_models(stage, "later", ["dense"]))
    rows = read_rows(stage._path)
    assert [row["kind"] for row in rows] == ["begin", "skipped", "end"]
    assert "MuchLaterConfig" in rows[1]["reason"]


def test_the_op_s_samples_tell_a_wrong_key():
    device = Device(False)
    plan = inputs.plan_of_density(device, 2, 96, 16, 0.5)
    q, k, v = (device.randn(heads, 96, 16, seed=heads + i) for i, heads in enumerate((2, 1, 1)))
    out = block_sparse_attention(q, k, v, plan, backend="reference")
    error, share = inputs.sampled_error(q, k, v, plan, out)
    assert 0 <= error < 1e-5
    assert share <= 1
    moved = v.clone()
    moved[0, 0] += 1  # block 0 is in every row
    wrong = block_sparse_attention(q, k, moved, plan, backend="reference")
    assert inputs.sampled_error(q, k, v, plan, wrong)[1] > 1
    assert inputs.sampled_error(q, k, v, plan, with_nan(out))[1] == float("inf")


def test_flex_attention_is_given_the_blocks_of_the_plan(monkeypatch):
    """Compiled, it goes by lists alone, which a dry run does not use."""
    device = Device(False)
    given = []

    def flex(q, k, v, block_mask, enable_gqa):
        given.append(block_mask)
        return q

    plan = inputs.plan_of_density(device, 2, 96, 16, 0.5)
    q = torch.zeros(2, 96, 16)
    monkeypatch.setattr(device, "on_gpu", True)
    op_speed._flex(device, flex, q, q, q, plan)()
    (mask,) = given
    blocks = torch.stack([plan.block_mask(h, b)[-1, ::16] for h in range(2) for b in range(6)])
    assert torch.equal(mask.to_dense()[0].bool(), blocks.view(2, 6, 6))
    # All but the diagonal are seen whole, and that by the mask alone.
    assert torch.equal(mask.kv_num_blocks, torch.ones(1, 2, 6, dtype=torch.int32))
    assert mask.kv_indices[0, :, :, 0].tolist() == [list(range(6))] * 2
    assert mask.full_kv_num_blocks[0].tolist() == (plan.runs[0].count - 1).tolist()
    assert plan.runs[0].count[0].tolist() == [1, 1, 2, 2, 2, 3]


ITEMS = """
    import os, signal, sys, time
    from pathlib import Path
    from gpu_checks import stage
    from gpu_checks.device import Device
    from gpu_checks.scale import TOY

    def works():
        yield {"kind": "result"}

    def fails():
        raise ValueError("no luck")

    def dies():
        os.kill(os.getpid(), signal.SIGSEGV)

    def hangs():
        time.sleep(100)

    stage.LONGEST = 0.3
    one = stage.Stage("toy", Path(sys.argv[1]), time.time() + 60, Device(False), TOY, quiet=True)
    for number, work in enumerate([works, fails, dies, works, hangs, works]):
        one.run(f"{number} {work.__name__}", work)
"""


def test_an_item_that_dies_or_hangs_leaves_the_others_alone(tmp_path):
    rows_at, log = tmp_path / "rows", tmp_path / "log"
    items = process.Process([sys.executable, "-c", textwrap.dedent(ITEMS), str(rows_at)], log)
    path = os.pathsep.join([str(ROOT / "scripts"), *sys.path])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        process.watch([items], time.time() + 100, lambda: None)
    assert items.error() is None
    assert items.starts == 3
    rows = read_rows(rows_at)
    assert [row["item"] for row in report.of_kind(rows, "result")] == [
        "0 works",
        "3 works",
        "5 works",
    ]
    failures = {row["item"]: row["error"] for row in report.failures(rows)}
    assert failures.keys() == {"1 fails", "2 dies", "4 hangs"}
    assert "no luck" in failures["1 fails"]
    assert "died" in failures["2 dies"]
    assert "in hangs" in log.read_text()  # the traceback of where it hung


def test_processes_end_with_their_deadline_or_after_a_few_starts(tmp_path):
    def shell(command):
        return process.Process(["sh", "-c", command], tmp_path / f"{command}.log")

    good, bad, slow = shell("true"), shell("echo why >&2; exit 7"), shell("sleep 100")
    start = time.time()
    process.watch([good, bad, slow], start + 2, lambda: None)
    assert time.time() - start < 20
    assert good.error() is None
    assert good.starts == slow.starts == 1
    assert bad.starts == 1 + process.RESTARTS
    assert "code 7" in bad.error()
    assert "why" in bad.error()
    assert "out of time" in slow.error()


def test_no_item_runs_after_the_device_is_lost_or_the_time_is_up(stage, monkeypatch):
    def fails():
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(stage.device, "synchronize", fails)
    with pytest.raises(DeviceLost, match="an illegal memory access"):
        stage.run("first", fails)
    late = Stage("parity", stage._path, time.time() + 3, Device(False), TOY, quiet=True)
    late.run("second", fails)
    rows = read_rows(stage._path)
    assert [(row["kind"], row["item"]) for row in rows] == [
        ("begin", "first"),
        ("error", "first"),
        ("end", "first"),
        ("begin", "second"),
        ("skipped", "second"),
        ("end", "second"),
    ]


def test_what_does_not_fit_the_memory_is_skipped(stage):
    def too_much():
        yield {"kind": "result"}
        raise torch.OutOfMemoryError("tried to allocate 90 GiB")

    stage.run("long", too_much)
    rows = read_rows(stage._path)
    assert [row["kind"] for row in rows] == ["begin", "result", "skipped", "end"]
    assert "90 GiB" in rows[2]["reason"]
    assert not report.failures(rows)


NOTHING_RUN = {
    "command": "gpu_check", "commit": None, "started": "today", "seconds": 1.0, "dry_run": False,
    "gpu": {"name": "a GPU"}, "machine": {}, "rows": [], "stages": [], "failures": [],
}  # fmt: skip


def good_rows():
    """Rows of a GPU that reaches every target."""
    prefill = {"stage": "prefill", "kind": "prefill", "tokens": 131072, "density": 0.1}
    prefill["speed_up"] = 1.5  # over what SDPA chooses, for information
    op = {"stage": "op", "kind": "op", "density": 0.1}
    cost = {"stage": "selection", "kind": "estimator_time", "what": "compact"}
    return [
        {"stage": "parity 1/2", "kind": "parity", "what": "blocks", "ok": True},
        {**op, "tokens": 32768, "of_ideal": 1.1},
        {**op, "tokens": 131072, "of_ideal": 1.15},
        {**op, "tokens": 8192, "of_ideal": 3.0},  # too short to count
        {**cost, "tokens": 32768, "of_dense": 0.079},
        {**cost, "tokens": 8192, "of_dense": 0.3},
        {**prefill, "method": "proxyattn", "speed_up_over_flash": 2.5},
        {**prefill, "method": "pbs", "speed_up_over_flash": 2.8},
        {"stage": "methods 2/2", "kind": "family", "what": "llama", "ok": True},
    ]


def verdicts(rows):
    return [target.verdict for target in report.targets(rows, FULL)]


def test_targets_that_are_reached_pass_and_others_are_not_measured():
    assert verdicts(good_rows()) == [report.PASS] * 6
    assert verdicts([]) == [report.UNKNOWN] * 6


@pytest.mark.parametrize(
    ("row", "changes", "missed"),
    [
        (0, {"ok": False}, 0),
        (0, {"kind": "error", "error": "it died"}, 0),
        (1, {"of_ideal": 1.16}, 2),
        (2, {"of_ideal": 1.16}, 2),
        (4, {"of_dense": 0.08}, 3),
        (6, {"speed_up_over_flash": 2.4}, 4),
        (7, {"speed_up_over_flash": 2.7}, 5),
        (8, {"ok": False}, 1),
        (8, {"kind": "error", "error": "it died"}, 1),
    ],
)
def test_a_missed_target_is_marked_as_missed(row, changes, missed):
    rows = good_rows()
    rows.append({**rows[row], **changes})
    if "speed_up_over_flash" in changes:  # the best of several lengths counts
        assert verdicts(rows) == [report.PASS] * 6
        rows[row] = rows.pop()
    targets = report.targets(rows, FULL)
    expected = [report.MISS if i == missed else report.PASS for i in range(6)]
    assert [target.verdict for target in targets] == expected
    text = report.markdown({**NOTHING_RUN, "targets": [asdict(target) for target in targets]})
    for target in targets:
        assert f"| {target.name} | {target.verdict} |" in text


@pytest.mark.parametrize(("target", "stage"), list(enumerate(["parity 2/2", "methods"])))
def test_a_comparison_that_did_not_run_is_no_pass(target, stage):
    skipped = {"stage": stage, "kind": "skipped", "item": "blocks", "reason": "no time"}
    assert verdicts([*good_rows(), skipped])[target] == report.MISS


def said_to_be_missing(capsys, *arguments):
    assert gpu_check.main([*arguments]) == 2
    return capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(preflight, "PACKAGES", {"torch": "99.1", "not-there": "1.0"})
    for arguments in ([], ["--dry-run"]):
        said = said_to_be_missing(capsys, *arguments)
        assert "torch>=99.1: pip install" in said
        assert "not-there>=1.0: pip install" in said
    monkeypatch.setattr(preflight, "PYTHON", (99, 1))
    assert "Python 99.1 or later" in said_to_be_missing(capsys)


def test_a_missing_gpu_or_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(preflight, "PACKAGES", {"torch": "1.0"})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET=1 is set" in said_to_be_missing(capsys)
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "a torch with CUDA or ROCm" in said_to_be_missing(capsys)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "a GPU that torch" in said_to_be_missing(capsys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None)
    assert "a C compiler" in said_to_be_missing(capsys)
