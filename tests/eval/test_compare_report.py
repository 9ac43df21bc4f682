"""Tables of a comparison: paired, ranked at equal density only."""

import pytest
from bench.prefills import DENSE
from study.report import KL, Entry, Group, draw, groups, markdown

MACHINE = {
    "git": "abc1234", "device": "CPU", "cpu_capability": "AVX2", "threads": 1, "torch": "2",
    "transformers": "5",
}  # fmt: skip


def row(method, prompt, **values):
    keys = (1, 8)[prompt % 2]
    base = {"kl": 0.0, "nll": 2.0 + prompt, "needle_nll": 0.5, "margin": 1.0, "right": True}
    base |= {"density": 1.0, "recall": 1.0, "error": 0.0, "keys": keys, "prompt": prompt}
    return {**base, "method": method, "machine": MACHINE, "model": "m", "dtype": "d", **values}


def rows(prompts=6, dense_margin=1.0):
    made = []
    for prompt in range(prompts):
        made += [
            row(DENSE, prompt, margin=dense_margin),
            row("good:x=1", prompt, density=0.25, kl=0.01 + 0.001 * prompt, nll=2.1 + prompt,
                margin=0.9, recall=0.9, error=0.1, right=False),
            row("poor:x=2", prompt, density=0.26, kl=0.02 + 0.001 * prompt, nll=2.2 + prompt,
                margin=0.4, recall=0.8, error=0.2),
            row("greedy:x=3", prompt, density=0.4, kl=0.001, nll=2 + prompt),
            row("fixed", prompt, density=0.9, kl=0.002),
        ]  # fmt: skip
    return made


ENTRIES = [
    Entry(0.25, "good", "good:x=1", True),
    Entry(0.25, "poor", "poor:x=2", True),
    Entry(0.25, "greedy", "greedy:x=3", True),
    Entry(0.25, "fixed", "fixed", False),
]


def line(table, start):
    (found,) = [one for one in table.split("\n| method")[1].splitlines() if start in one]
    return found


def test_the_table_has_means_intervals_and_ranks():
    table = markdown(ENTRIES, rows(), seed=0, about="about.")
    assert "## At density 0.25, 6 prompts" in table
    assert "| good:x=1 | 0.250 | 0.0125 [" in line(table, "good:x=1")
    assert "(1)" in line(table, "good:x=1")
    assert "| 0.1 [0.1, 0.1] (1) |" in line(table, "good:x=1")  # NLL: paired, whatever the prompt
    assert "| 0.2 [0.2, 0.2] (2) |" in line(table, "poor:x=2")
    assert "-0.1 [-0.1, -0.1] (1) | 0.1 [0.1, 0.1] (1)" in line(table, "good:x=1")
    assert table.endswith("about.\n")


def test_a_method_that_keeps_more_than_the_target_is_not_ranked():
    table = markdown(ENTRIES, rows(), seed=0, about="")
    assert "(-)" in line(table, "greedy:x=3")
    assert "best is good:x=1; told apart from all" in table
    assert "best is greedy" not in table


def test_a_method_without_a_knob_has_a_section_of_its_own():
    table = markdown(ENTRIES, rows(), seed=0, about="")
    at_target, own = table.split("## At its own density")
    assert "fixed" not in at_target
    assert "| fixed | 0.900 | 0.002 [0.002, 0.002] (-) |" in own


def test_only_prompts_that_all_were_measured_on_count():
    some = [r for r in rows() if not (r["method"] == "poor:x=2" and r["prompt"] > 3)]
    (group, _) = groups(ENTRIES, some)
    assert group.prompts == [0, 1, 2, 3]
    assert group.values("good:x=1", KL) == pytest.approx([0.01, 0.011, 0.012, 0.013])
    assert Group(["good:x=1"], some, 0.25).prompts == [0, 1, 2, 3, 4, 5]


def test_needles_are_counted_by_number_of_keys():
    table = markdown(ENTRIES, rows(), seed=0, about="")
    needles = table.split("| method | needle NLL")[1]
    assert "margin, 1 key | greedy, 1 key | margin, 8 keys | greedy, 8 keys" in needles
    assert "| dense SDPA | 0 | 0 | 1.000 | 3/3 | 1.000 | 3/3 |" in needles
    assert "| 0.900 | 0/3 | 0.900 | 0/3 |" in needles


def test_needles_that_dense_cannot_do_are_said_to_say_nothing():
    assert "not measurable" not in markdown(ENTRIES, rows(), seed=0, about="")
    table = markdown(ENTRIES, rows(dense_margin=-0.1), seed=0, about="")
    assert "Prompts with 8 keys: not measurable with this model" in table
    assert "first in 0 of 3 prompts" in table


def test_plots_show_every_method_at_its_density():
    class Axes:
        def __init__(self):
            self.lines = {}

        def plot(self, x, y, *, label, **_):
            self.lines[label] = (x, y)

        def axhline(self, y, **_):
            self.lines[DENSE] = y

        def __getattr__(self, _):
            return lambda *_, **__: None

    axes = Axes()
    draw(axes, ENTRIES, rows(), "margin")
    assert axes.lines[DENSE] == 1
    assert axes.lines["good"][0] == pytest.approx((0.25,))
    assert axes.lines["good"][1] == pytest.approx((0.9,))
    assert set(axes.lines) == {DENSE, "good", "poor", "greedy", "fixed"}
