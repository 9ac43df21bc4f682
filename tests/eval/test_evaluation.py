"""The loop over samples and methods: what is asked, what is kept, what goes on where."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sparse_patch_eval.runs import evaluation
from sparse_patch_eval.runs.evaluation import Setup, evaluate
from sparse_patch_eval.runs.folder import RunFolder, run_config, summary
from sparse_patch_eval.runs.text_unit import SCORED, TextUnit
from sparse_patch_eval.runs.unit import How, Question, Scored

from sparse_patch import get_method

A_SHAPE = "a_shape:sink=4,window=64"


class Lab:
    """Stands in for the lm-eval model: one process and a tiny model."""

    rank, world_size, is_writer, max_length = 0, 1, True, 4096

    def __init__(self, tiny):
        self.model, self.tokenizer = tiny

    def share(self, rows):
        return rows


class Counted:
    """A unit that knows how often it was asked, and may be killed."""

    benchmark, task, length = "made up", "counted", 128

    def __init__(self, count, killed_after=None, salt=""):
        self.asked, self.count, self.killed_after, self.salt = [], count, killed_after, salt

    def questions(self):
        return [Question(n, f"hash {n}{self.salt}", n, depth=n / 10) for n in range(self.count)]

    def ask(self, sample, how):
        if len(self.asked) == self.killed_after:
            raise KeyboardInterrupt
        self.asked.append((sample.doc_id, type(how.method).__name__))
        about = {
            "tokens": 9,
            "truncated": 0,
            "density": 0.5,
            "sparse_calls": 2,
            "recall": None,
            "exact": {},
        }
        return {
            **about,
            "prefill_seconds": 1.0,
            "said": sample.doc_id,
            "recalled": how.measure_recall,
        }

    def score(self, answered):
        rows = {
            n: {"scores": {"half": row["said"] / 2}, "answer": str(row["said"]), "target": "t"}
            for n, row in answered.items()
        }
        return Scored(rows, {"half": True})


@pytest.fixture
def lab(tiny):
    return Lab(tiny)


def _run(lab, output, unit, methods=(A_SHAPE,), **settings):
    setup = Setup("model", tuple(methods), {"min_length": 0}, **settings)
    return evaluate(setup, output, lab, lambda lm: [unit])


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_method_and_dense_get_every_sample_once(lab, tmp_path):
    unit = Counted(3)
    folders = _run(lab, tmp_path, unit)
    assert sorted(unit.asked) == [(n, who) for n in range(3) for who in ("AShape", "NoneType")]
    assert [json.loads((f / "run.json").read_text())["method"] for f in folders] == [
        "dense",
        A_SHAPE,
    ]
    for folder in folders:
        samples = _lines(folder / "samples.jsonl")
        assert [(row["doc_id"], row["scores"]["half"]) for row in samples] == [
            (0, 0),
            (1, 0.5),
            (2, 1),
        ]
        assert [row["depth"] for row in samples] == [0, 0.1, 0.2]
        results = json.loads((folder / "results.json").read_text())
        assert results["tasks"][0]["scores"] == {"half": 0.5}
        assert results["tasks"][0]["n"] == 3
        assert results["higher_is_better"] == {"half": True}


def test_methods_take_turns_in_going_first(lab, tmp_path):
    unit = Counted(4)
    _run(lab, tmp_path, unit)
    firsts = [unit.asked[2 * n][1] for n in range(4)]
    assert set(firsts) == {"AShape", "NoneType"}


def test_a_killed_run_goes_on_at_the_next_sample(lab, tmp_path):
    killed = Counted(4, killed_after=5)
    with pytest.raises(KeyboardInterrupt):
        _run(lab, tmp_path, killed)
    again = Counted(4)
    folders = _run(lab, tmp_path, again)
    assert len(again.asked) == 3
    assert not set(again.asked) & set(killed.asked)
    assert all(len(_lines(folder / "samples.jsonl")) == 4 for folder in folders)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", "{", "is not JSON"),
        ("run.json", "[]", "must be a JSON object"),
        ("results.json", "", "is not JSON"),
        ("results.json", "{}", "must be a JSON object, with higher_is_better, with lm_eval"),
        ("responses.0.jsonl", "[1]\n", "line 1: must be a JSON object"),
        ("responses.0.jsonl", '{"task": "counted"}\n', "has no valid length, doc_id, prompt_hash"),
        (
            "samples.jsonl",
            '{"task": [], "length": 1, "doc_id": 1, "prompt_hash": ""}\n',
            "valid task",
        ),
        ("samples.jsonl", "[" * 10**5 + "\n", "line 1: nested too deeply"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(lab, tmp_path, name, text, message):
    folder = _run(lab, tmp_path, Counted(2))[1]
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        _run(lab, tmp_path, Counted(2))


def test_a_run_whose_answers_hold_line_separators_goes_on(lab, tmp_path):
    class Separated(Counted):
        def score(self, answered):
            found = super().score(answered)
            return Scored(
                {n: {**row, "answer": "a\u2028b\x85"} for n, row in found.rows.items()}, {}
            )

    _run(lab, tmp_path, Separated(2))
    for folder in _run(lab, tmp_path, Separated(3)):
        text = (folder / "samples.jsonl").read_text(encoding="utf-8")
        found = [json.loads(line)["answer"] for line in text.split("\n")[:-1]]
        assert found == ["a\u2028b\x85"] * 3


@pytest.mark.parametrize(
    "name", ["../../up", "/etc/x", "..", "C:\\x", "a\0b", "-rf ~", "", "x" * 999]
)
def test_a_run_lies_below_its_output_whatever_it_is_called(tmp_path, name):
    folder = RunFolder(tmp_path / "out", run_config(name, name, None)).path
    assert folder.resolve().relative_to((tmp_path / "out").resolve()).parts[1:]
    assert len(folder.relative_to(tmp_path / "out").parts) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_half_a_line_from_a_kill_is_asked_again(lab, tmp_path):
    folders = _run(lab, tmp_path, Counted(2))
    log = folders[1] / "responses.0.jsonl"
    log.write_text(log.read_text()[:-20])
    again = Counted(2)
    _run(lab, tmp_path, again)
    assert again.asked == [(1, "AShape")]


def test_a_finished_run_is_left_alone_and_a_longer_one_asks_what_is_new(lab, tmp_path):
    _run(lab, tmp_path, Counted(2))
    same, longer = Counted(2), Counted(3)
    _run(lab, tmp_path, same)
    assert same.asked == []
    folders = _run(lab, tmp_path, longer)
    assert sorted(longer.asked) == [(2, "AShape"), (2, "NoneType")]
    assert len(_lines(folders[0] / "samples.jsonl")) == 3


def test_a_new_method_does_not_ask_dense_again(lab, tmp_path):
    _run(lab, tmp_path, Counted(2))
    unit = Counted(2)
    _run(lab, tmp_path, unit, methods=["a_shape:sink=4,window=32"])
    assert sorted(unit.asked) == [(0, "AShape"), (1, "AShape")]


def test_spelling_is_not_another_run_but_a_value_is(lab, tmp_path):
    first = _run(lab, tmp_path, Counted(1))
    respelled, other = Counted(1), Counted(1)
    assert _run(lab, tmp_path, respelled, methods=["a_shape:window=64,sink=4"]) == first
    assert respelled.asked == []
    assert _run(lab, tmp_path, other, methods=["a_shape:window=65,sink=4"])[1] != first[1]
    assert len(other.asked) == 1


def test_another_seed_dtype_or_patch_option_is_another_run(tmp_path):
    method = get_method("a_shape", sink=4, window=64)

    def place(**settings):
        config = run_config("m", A_SHAPE, method, **{"seed": 0, "dtype": "float32", **settings})
        return RunFolder(tmp_path, config).path

    places = [place(), place(seed=1), place(dtype="bfloat16"), place(patch={"min_length": 0})]
    assert len(set(places)) == 4
    assert places[3].parent == places[0].parent, "one model, so that dense lies beside them"
    assert place() == places[0]


def test_answers_to_another_prompt_do_not_count(lab, tmp_path):
    _run(lab, tmp_path, Counted(2))
    changed = Counted(2, salt="!")
    folders = _run(lab, tmp_path, changed)
    assert len(changed.asked) == 4
    assert len(_lines(folders[0] / "samples.jsonl")) == 2, (
        "the new prompt takes the old one's place"
    )


def test_samples_made_in_another_way_do_not_mix(lab, tmp_path):
    _run(lab, tmp_path, Counted(3))
    folders = _run(lab, tmp_path, Counted(2, salt="!"))
    rows = _lines(folders[0] / "samples.jsonl")
    assert [row["prompt_hash"] for row in rows] == ["hash 0!", "hash 1!"]


def test_a_kill_while_scoring_leaves_the_last_whole_files(lab, tmp_path, monkeypatch):
    folders = _run(lab, tmp_path, Counted(2))
    before = (folders[0] / "samples.jsonl").read_text()

    def killed(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            _run(lab, tmp_path, Counted(3))
    assert (folders[0] / "samples.jsonl").read_text() == before
    _run(lab, tmp_path, Counted(3))
    assert len(_lines(folders[0] / "samples.jsonl")) == 3


def test_recall_is_measured_on_the_first_samples_only(lab, tmp_path):
    folders = _run(lab, tmp_path, Counted(3), recall_samples=2)
    log = {row["doc_id"]: row["recalled"] for row in _lines(folders[1] / "responses.0.jsonl")}
    assert log == {0: True, 1: True, 2: False}


def test_a_wrong_method_is_an_error_before_anything_is_asked(lab, tmp_path):
    unit = Counted(1)
    with pytest.raises(ValueError, match="nosuch"):
        _run(lab, tmp_path, unit, methods=[A_SHAPE, "nosuch"])
    assert unit.asked == []
    assert not list(tmp_path.iterdir())


def test_processes_share_the_samples_and_the_writer_has_all(tiny, tmp_path):
    asked = []
    for process in (1, 0):  # the writer last: by then the other one has answered
        lab = Lab(tiny)
        lab.rank, lab.world_size, lab.is_writer = process, 2, process == 0
        lab.share = (lambda rows: rows) if process == 0 else (lambda rows: None)
        unit = Counted(5)
        folders = _run(lab, tmp_path, unit)
        asked += [n for n, who in unit.asked if who == "AShape"]
    assert sorted(asked) == list(range(5))
    assert len(_lines(folders[1] / "samples.jsonl")) == 5


def test_scores_of_another_task_stay(lab, tmp_path):
    _run(lab, tmp_path, Counted(2))
    other = Counted(1)
    other.task = "other"
    folders = _run(lab, tmp_path, other)
    rows = _lines(folders[0] / "samples.jsonl")
    assert [(row["task"], row["doc_id"]) for row in rows] == [
        ("counted", 0),
        ("counted", 1),
        ("other", 0),
    ]


def test_means_leave_out_what_is_not_known():
    row = {
        "benchmark": "b",
        "task": "t",
        "length": None,
        "density": 0.5,
        "sparse_calls": 1,
        "exact": {"short": 3},
        "prefill_seconds": 1.0,
    }
    rows = [
        {**row, "recall": None, "scores": {"a": 1.0}},
        {**row, "recall": 0.5, "scores": {"a": 0.0, "b": 3.0}},
    ]
    (found,) = summary(rows)
    assert found["scores"] == {"a": 0.5, "b": 3.0}
    assert found["recall"] == 0.5
    assert found["density"] == (0.5 + 3) / 4
    assert found["exact"] == {"short": 6}


# Perplexity


class Oracle:
    """A model that is sure of the next token: the right one, or the one after it."""

    device = torch.device("cpu")

    def __init__(self, tokens, wrong=False):
        self.next = torch.tensor([*tokens[1:], 0])
        if wrong:
            self.next = (self.next + 1) % 256

    def __call__(self, input_ids, use_cache, logits_to_keep):
        logits = torch.full((1, input_ids.shape[1], 256), -30.0)
        logits[0].scatter_(1, self.next[:, None], 30.0)
        return SimpleNamespace(logits=logits[:, -logits_to_keep:], past_key_values=None)


@pytest.fixture
def text_unit(lab, folder):
    return TextUnit(str(folder / "walks.txt"), 2 * SCORED, lm=lab, limit=3, seed=0)


def test_a_model_that_knows_the_text_has_perplexity_one(lab, text_unit):
    sample = text_unit.questions()[0]
    lab.model = Oracle(sample.content)
    assert text_unit.ask(sample, How(None, {}))["scores"]["nll"] == pytest.approx(0, abs=1e-6)


def test_a_model_that_is_surely_wrong_has_a_large_nll(lab, text_unit):
    sample = text_unit.questions()[1]
    lab.model = Oracle(sample.content, wrong=True)
    assert text_unit.ask(sample, How(None, {}))["scores"]["nll"] == pytest.approx(60)


def test_dense_has_no_kl_to_itself_and_a_method_has(text_unit):
    sample = text_unit.questions()[0]
    dense = text_unit.ask(sample, How(None, {}))
    sparse = text_unit.ask(sample, How(get_method("a_shape", sink=1, window=2), {"min_length": 0}))
    assert dense["scores"]["kl"] == 0
    assert sparse["scores"]["kl"] > 1e-4
    assert sparse["density"] < 1
    assert sparse["tokens"] == 2 * SCORED


def test_kl_is_the_same_when_dense_was_answered_by_an_earlier_run(lab, folder, text_unit):
    how = How(get_method("a_shape", sink=1, window=2), {"min_length": 0})
    sample = text_unit.questions()[0]
    text_unit.ask(sample, How(None, {}))
    fresh = TextUnit(str(folder / "walks.txt"), 2 * SCORED, lm=lab, limit=3, seed=0)
    assert fresh.ask(sample, how)["scores"] == text_unit.ask(sample, how)["scores"]


def test_windows_stay_the_same_when_more_are_asked_for_and_share_nothing(lab, folder, text_unit):
    more = TextUnit(str(folder / "walks.txt"), 2 * SCORED, lm=lab, limit=5, seed=0)
    hashes = [sample.prompt_hash for sample in more.questions()]
    assert [sample.prompt_hash for sample in text_unit.questions()] == hashes[:3]
    assert len(set(hashes)) == 5


def test_without_a_limit_a_text_gives_all_its_windows(lab, folder):
    unit = TextUnit(str(folder / "walks.txt"), 2 * SCORED, lm=lab, limit=None, seed=0)
    assert len(unit.questions()) > 5


def test_a_text_too_short_for_the_samples_says_how_many_it_has(lab, folder):
    with pytest.raises(ValueError, match=r"--limit \d+ or less"):
        TextUnit(str(folder / "walks.txt"), 2 * SCORED, lm=lab, limit=5000, seed=0)
    with pytest.raises(ValueError, match="at least"):
        TextUnit(str(folder / "walks.txt"), SCORED, lm=lab, limit=1, seed=0)


def test_the_warm_up_reaches_every_method(lab, tmp_path, monkeypatch):
    warmed = []
    monkeypatch.setattr(
        evaluation,
        "answer",
        lambda model, tokenizer, ids, *, method, patch_options: warmed.append(method),
    )
    _run(lab, tmp_path, Counted(1))
    assert [type(method).__name__ for method in warmed] == ["NoneType", "AShape"]
