"""What was done reaches the log, the metrics, and a report."""

import torch

from sparse_patch import Report
from sparse_patch.layer import Run
from sparse_patch.serving import report
from sparse_patch.serving.account import REPORT, Account
from sparse_patch.serving.settings import Settings

SHAPE = {"type": "llama", "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 32}


def account(**more):
    settings = Settings.read({"method": "dense", "layers": [0, 2]})
    return Account(settings, settings.choose(SHAPE, 1), **more)


def test_a_line_is_written_now_and_then_and_says_what_is_new():
    lines, now = [], [100.0]
    of = account(log=lines.append, clock=lambda: now[0])
    of.tick()
    assert lines == []
    of.state(0).record(Run(density=torch.tensor(0.25)))
    of.state(2).record(Run(reason="short"))
    now[0] += of.interval / 2
    of.tick()
    assert lines == []
    now[0] += of.interval
    of.tick()
    assert lines[0].endswith("1 sparse calls, density 0.250; 1 exact (short 1)")
    of.state(0).record(Run(reason="decode"))
    now[0] += 2 * of.interval
    of.tick()
    assert lines[1].endswith("0 sparse calls; 1 exact (decode 1)")
    now[0] += 2 * of.interval
    of.tick()
    assert len(lines) == 2


def test_layers_that_were_not_asked_for_have_no_state():
    of = account()
    assert of.state(1) is None
    assert of.state(2) is of.state(2)


def test_a_report_is_that_of_the_workers():
    of = account()
    of.state(2).record(Run(density=0.5))
    of.state(0).record(Run(reason="short"))

    class LLM:
        def collective_rpc(self, name):
            assert name == REPORT
            return [of.report().to_dict()]

    (got,) = report(LLM())
    assert isinstance(got, Report)
    assert [layer.layer for layer in got.layers] == [0, 2]
    assert (got.sparse_calls, got.density, got.exact) == (1, 0.5, {"short": 1})
