"""Runs from disk, the comparison with dense, and its text: on runs made up with a known answer."""

import csv
import json
from math import exp

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sparse_patch_eval.base.rows import read_rows
from sparse_patch_eval.base.stats import bootstrap, bootstrap_groups
from sparse_patch_eval.cli.app import app
from sparse_patch_eval.report.chance import above_chance, chance
from sparse_patch_eval.report.comparison import comparison_table, speed_ups
from sparse_patch_eval.report.sections import sections
from sparse_patch_eval.report.text import markdown, write_samples, write_summary
from sparse_patch_eval.runs.reading import find_runs
from typer.testing import CliRunner

from tests.drawn import ANY
from tests.eval.run_builder import MACHINE, sample, write_comparison, write_run


def rows_of(root):
    return comparison_table(find_runs([root]))


def row_of(rows, method, task="sp_niah_single_1", length=4096):
    (found,) = [r for r in rows if (r.method, r.task, r.length) == (method, task, length)]
    return found


# --- reading -------------------------------------------------------------------------------------


def test_runs_are_found_in_folders_of_any_depth_and_once(tmp_path):
    dense = write_run(tmp_path / "smollm2" / "dense", samples=[sample()])
    write_run(tmp_path / "smollm2" / "hip", "hip", [sample()])
    runs = find_runs([tmp_path, dense, tmp_path / "smollm2"])
    assert [run.method for run in runs] == ["dense", "hip"]
    assert runs[0].samples[0].scores == {"string_match": 1.0}
    assert runs[0].finished
    assert runs[0].notes == ()


def test_paths_without_a_run_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run\.json"):
        find_runs([tmp_path])
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        find_runs([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"format": 2}, "run.json: format 2"),
        ({"params": None}, "run.json: params must be dict, not None"),
        ({"seed": True}, "run.json: seed must be int, not True"),
    ],
)
def test_a_run_json_that_is_wrong_is_named(tmp_path, about, message):
    write_run(tmp_path, samples=[sample()], **about)
    with pytest.raises(ValueError, match=message):
        find_runs([tmp_path])


def test_a_run_json_that_is_no_json_is_named(tmp_path):
    (write_run(tmp_path) / "run.json").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match=r"run\.json: is not JSON"):
        find_runs([tmp_path])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scores": {"rank": "high"}}, "line 2: score 'rank' must be a number, not 'high'"),
        ({"exact": {"short": "many"}}, r"line 2: exact\['short'\] must count calls"),
        ({"tokens": None}, "line 2: tokens must be int, not None"),
        ({"sparse_calls": "x"}, "line 2: sparse_calls must be int or null"),
        ({"sparse_calls": -1}, "line 2: sparse_calls must be 0 to inf"),
        ({"tokens": -1}, "line 2: tokens must be 0 to inf"),
        ({"tokens": 10**400}, "line 2: tokens must be int"),
        ({"length": 0}, "line 2: length must be 1 to inf"),
        ({"depth": 2.0}, "line 2: depth must be 0 to 1"),
        ({"density": -0.1}, "line 2: density must be 0 to 1"),
        ({"density": float("nan")}, "line 2: density must be 0 to 1"),
        ({"recall": float("inf")}, r"line 2: recall must be 0 to 1\.01"),
        ({"prefill_seconds": -1.0}, "line 2: prefill_seconds must be 0 to inf"),
        ({"prefill_seconds": float("nan")}, "line 2: prefill_seconds must be 0 to inf"),
        ({"scores": {"rank": 10**400}}, "line 2: score 'rank' must be a number"),
        ({"exact": {"short": -1}}, r"line 2: exact\['short'\] must count calls"),
        ({"answer": "\ud800"}, "line 2: half of a surrogate pair"),
    ],
)
def test_a_sample_that_is_wrong_is_named_with_its_line(tmp_path, fields, message):
    write_run(tmp_path, samples=[sample(0), sample(1, **fields)])
    with pytest.raises(ValueError, match=message):
        find_runs([tmp_path])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 10**5, "nested too deeply"),
        ("1" * 5000, "Exceeds the limit"),
        ('{"a": 1, "a": 2}', "the key 'a' appears twice"),
        ("[1]", "must be a JSON object"),
    ],
)
def test_a_line_that_is_no_sample_is_named(tmp_path, line, message):
    lines = write_run(tmp_path, samples=[sample(0)]) / "samples.jsonl"
    lines.write_text(lines.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"samples\.jsonl, line 2: {message}"):
        find_runs([tmp_path])
    with pytest.raises(ValueError, match=rf"samples\.jsonl, line 2: {message}"):
        read_rows(lines)


@pytest.mark.parametrize("name", ["run.json", "results.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is not JSON"), ("[" * 10**5, "nested too deeply"), ('{"a": 1, "a": 1}', "twice")],
)
def test_a_file_of_a_run_that_is_no_plain_json_is_named(tmp_path, name, text, message):
    (write_run(tmp_path, samples=[sample()]) / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        find_runs([tmp_path])


CUT = st.tuples(st.integers(0, 400), st.integers(0, 3))


@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_sample_is_read_left_out_or_refused_by_name(tmp_path, data):
    """Whatever a line is, the sample before it comes out as it is."""
    found = sample(1, depth=0.5, recall=0.9, sparse_calls=3, exact={"short": 2})
    if data.draw(st.booleans()):
        found[data.draw(st.sampled_from(sorted(found)))] = data.draw(ANY)
        text = json.dumps(found)
    else:
        text, at = json.dumps(found), data.draw(st.integers(0, 400))
        text = (
            text[:at] + data.draw(st.text(max_size=2)) + text[at + data.draw(st.integers(0, 3)) :]
        )
    lines = write_run(tmp_path, samples=[sample(0)]) / "samples.jsonl"
    lines.write_text(lines.read_text() + text + "\n", encoding="utf-8", errors="replace")
    try:
        (run,) = find_runs([tmp_path])
    except ValueError as error:
        assert str(lines) in str(error)  # noqa: PT017 - most drawn files raise, some load
        return
    assert run.samples[0].doc_id == 0
    assert len(run.samples) + len(run.notes) >= 2
    markdown(comparison_table([run]))


def test_a_sample_that_lacks_a_field_is_named(tmp_path):
    line = {key: value for key, value in sample().items() if key != "prompt_hash"}
    write_run(tmp_path, samples=[line])
    with pytest.raises(ValueError, match="line 1: lacks prompt_hash"):
        find_runs([tmp_path])


def test_half_a_last_line_is_left_out_with_a_note(tmp_path):
    lines = write_run(tmp_path, samples=[sample(0), sample(1)], finished=False) / "samples.jsonl"
    lines.write_text(lines.read_text()[:-40])
    (run,) = find_runs([tmp_path])
    assert [one.doc_id for one in run.samples] == [0]
    assert not run.finished
    assert run.notes == (
        "unfinished: no results.json yet",
        "samples.jsonl, line 2: cut short, left out",
    )


def test_a_file_without_one_line_of_json_is_an_error(tmp_path):
    (write_run(tmp_path) / "samples.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="no line of it is JSON"):
        find_runs([tmp_path])


def test_of_a_sample_that_is_there_twice_the_last_counts(tmp_path):
    write_run(tmp_path, samples=[sample(0, answer="old"), sample(1), sample(0, answer="new")])
    (run,) = find_runs([tmp_path])
    assert [one.answer for one in run.samples] == ["new", " 1234567"]
    assert run.notes == ("1 samples appear more than once; the last of each counts",)


def test_separators_inside_an_answer_end_no_line(tmp_path):
    one = sample(answer="a\u2028b\x85c")
    file = write_run(tmp_path) / "samples.jsonl"
    file.write_text(json.dumps(one, ensure_ascii=False) + "\n", encoding="utf-8")
    assert find_runs([tmp_path])[0].samples[0].answer == "a\u2028b\x85c"


def test_scores_that_are_not_numbers_are_said_so_and_not_dropped(tmp_path):
    scores = [{"answer_nll": 1.0}, {"answer_nll": float("nan")}]
    write_run(tmp_path, samples=[sample(n, scores=one) for n, one in enumerate(scores)])
    (run,) = find_runs([tmp_path])
    assert "1 scores are NaN" in run.notes[0]
    (row,) = comparison_table([run])
    assert row.primary.mean != row.primary.mean


# --- sections and labels -------------------------------------------------------------------------


def test_models_are_kept_apart(tmp_path):
    for model in ("one", "two"):
        write_run(tmp_path / model / "dense", samples=[sample()], model=model)
    write_run(tmp_path / "one" / "hip", "hip", [sample(scores={"string_match": 0.0})], model="one")
    write_run(tmp_path / "two" / "bf16", "hip", [sample()], model="two", dtype="bfloat16")
    found = sections(find_runs([tmp_path]))
    assert [(s.model, s.dtype, list(s.runs)) for s in found] == [
        ("one", "float32", ["dense", "hip"]),
        ("two", "bfloat16", ["hip"]),
        ("two", "float32", ["dense"]),
    ]
    rows = rows_of(tmp_path)
    gaps = {(r.section.model, r.method): r.primary.difference for r in rows}
    assert gaps["one", "hip"].mean == -1
    assert gaps["two", "hip"] is None  # dense ran in another dtype


def test_like_methods_are_told_apart_by_what_differs(tmp_path):
    for length in (0, 2048):
        write_run(tmp_path / str(length), "hip", [sample()], patch={"min_length": length, "x": 1})
    (section,) = sections(find_runs([tmp_path]))
    assert list(section.runs) == ["hip [min_length=0]", "hip [min_length=2048]"]


def test_like_runs_are_told_apart_by_their_folders(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, "hip", [sample()])
    (section,) = sections(find_runs([tmp_path]))
    assert list(section.runs) == [f"hip [{tmp_path.resolve() / name}]" for name in ("a", "b")]


# --- statistics ----------------------------------------------------------------------------------


def test_differences_are_paired_by_sample_and_bootstrapped(tmp_path):
    right = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    sparse = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]

    def lines(values):
        return [sample(n, scores={"string_match": v}) for n, v in enumerate(values)]

    write_run(tmp_path / "dense", samples=lines(right))
    write_run(tmp_path / "hip", "hip", lines(sparse)[::-1])  # another order, the same samples
    row = row_of(rows_of(tmp_path), "hip")
    want = bootstrap([b - a for a, b in zip(right, sparse, strict=True)][::-1])
    assert row.primary.difference == want
    assert row.primary.mean == pytest.approx(0.5)
    assert want.mean == pytest.approx(-1 / 6)
    assert (row.n, row.paired) == (6, 6)


@pytest.mark.parametrize(("n", "clear"), [(9, False), (10, True)])
def test_a_difference_on_a_few_pairs_is_not_called_one(tmp_path, n, clear):
    write_run(tmp_path / "dense", samples=[sample(k) for k in range(n)])
    wrong = {"string_match": 0.0}
    write_run(tmp_path / "hip", "hip", [sample(k, scores=wrong) for k in range(n)])
    row = row_of(rows_of(tmp_path), "hip")
    assert row.primary.is_clear == clear
    assert row.flags == (() if clear else ("only 9 pairs: intervals too narrow",))


def test_only_samples_with_the_same_prompt_are_paired(tmp_path):
    write_run(tmp_path / "dense", samples=[sample(n) for n in range(5)])
    hip = [sample(n, scores={"string_match": 0.0}) for n in range(4)]
    hip[3]["prompt_hash"] = "other"
    write_run(tmp_path / "hip", "hip", hip)
    row = row_of(rows_of(tmp_path), "hip")
    assert (row.n, row.paired, row.primary.difference.n) == (4, 3, 3)
    assert "3 of 4 samples paired with dense" in row.flags


def test_without_dense_there_are_no_differences_and_it_is_said(tmp_path):
    write_run(tmp_path / "hip", "hip", [sample()])
    rows = rows_of(tmp_path)
    assert rows[0].primary.difference is None
    assert rows[0].primary.measurable is None
    assert rows[0].speed_up is None
    assert "No dense run of this setting is here" in markdown(rows)


def test_the_dense_run_beside_a_run_is_its_partner(tmp_path):
    for place, seconds in (("a", 8.0), ("b", 4.0)):
        write_run(tmp_path / place / "dense", samples=[sample(prefill_seconds=seconds)])
        write_run(tmp_path / place / "hip", f"hip:x={place}", [sample(prefill_seconds=2.0)])
    rows = rows_of(tmp_path)
    assert row_of(rows, "hip:x=a").speed_up == 4
    assert row_of(rows, "hip:x=b").speed_up == 2


def test_speed_up_is_the_median_of_paired_ratios_on_one_machine(tmp_path):
    dense, sparse = (1.0, 10.0, 4.0, 100.0), (0.5, 10.0, 1.0, 1.0)
    other = {**MACHINE, "device": "another"}
    write_run(
        tmp_path / "dense", samples=[sample(n, prefill_seconds=t) for n, t in enumerate(dense)]
    )
    lines = [sample(n, prefill_seconds=t) for n, t in enumerate(sparse)]
    lines[3]["machine"] = other  # its ratio of 100 must not count
    write_run(tmp_path / "hip", "hip", lines)
    rows = rows_of(tmp_path)
    assert row_of(rows, "hip").speed_up == 2
    assert speed_ups(rows[0].section) == {("hip", 4096): 2}
    assert row_of(rows, "dense").speed_up is None


def test_the_average_weighs_tasks_alike_and_leaves_out_what_cannot_be_measured(tmp_path):
    def lines(scores):
        return [
            sample(n, task=task, scores={"string_match": value})
            for task, values in scores.items()
            for n, value in enumerate(values)
        ]

    dense = {"a": [1.0] * 20, "b": [1.0] * 5, "c": [0.0] * 20}
    hip = {"a": [0.0] * 20, "b": [1.0] * 5, "c": [0.0] * 20}
    write_run(tmp_path / "dense", samples=lines(dense))
    write_run(tmp_path / "hip", "hip", lines(hip))
    write_run(tmp_path / "part", "half:x=1", lines({"a": [1.0] * 20}))
    rows = rows_of(tmp_path)
    row = row_of(rows, "hip", "average")
    assert row.primary.mean == pytest.approx(0.5)
    assert row.primary.difference.mean == pytest.approx(-0.5)
    assert row.primary.tasks == (2, 3)
    assert row_of(rows, "hip", "c").primary.measurable is False
    # A method that lacks tasks has no average: it would be one of other tasks.
    assert not [r for r in rows if r.is_average and r.method == "half:x=1"]


def test_averages_draw_within_each_task():
    """One task without spread and one of two values: half of the interval that can be counted."""
    got = bootstrap_groups([[0.5] * 7, [0.0, 1.0]])
    assert (got.mean, got.low, got.high, got.n) == (0.5, 0.25, 0.75, 9)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_groups([[1.0], []])


def test_near_chance_is_decided_by_the_exact_interval():
    def low(right, n):  # where P(X >= right) is 2.5 %, by bisection: not the formula of the code
        a, b = 0.0, 1.0
        for _ in range(60):
            p = (a + b) / 2
            a, b = (a, p) if binom.sf(right - 1, n, p) > 0.025 else (p, b)
        return a

    for level in (0.0, 1 / 8):
        for right in range(21):
            values = [1.0] * right + [0.0] * (20 - right)
            want = right > 0 and low(right, 20) > level + 0.05
            assert above_chance(values, level) == want, (level, right)
    assert above_chance([0.25] * 20, 0.0)  # right in part: bootstrap
    assert not above_chance([0.25] + [0.0] * 19, 0.0)


def test_chance_is_known_for_matches_ranks_and_choices_only():
    assert chance("sp_vt", "string_match") == 0
    assert chance("sp_vt", "rank") == 1 / 8
    assert chance("longbench2_govt_single", "acc") == 0.25
    assert chance("sp_vt", "answer_nll") is None


def test_a_task_beyond_the_model_is_marked_and_no_difference_is_shown(tmp_path):
    scores = {"string_match": 0.0, "answer_nll": 3.0}
    write_run(tmp_path / "dense", samples=[sample(n, scores=scores) for n in range(20)])
    worse = {"string_match": 0.0, "answer_nll": 4.0}
    write_run(tmp_path / "hip", "hip", [sample(n, scores=worse) for n in range(20)])
    (line,) = [line for line in markdown(rows_of(tmp_path)).splitlines() if "| hip |" in line]
    assert "string_match: 0.000, not measurable with this model |" in line
    assert "4.000 (+1.000 [+1.000, +1.000])" in line  # what has no chance level still counts


def test_perplexity_is_the_exponential_of_the_mean_and_kl_needs_no_dense_value(tmp_path):
    def lines(values):
        return [
            sample(n, task="sp_perplexity", benchmark="perplexity", scores=scores)
            for n, scores in enumerate(values)
        ]

    write_run(tmp_path / "dense", samples=lines([{"nll": 2.0}, {"nll": 3.0}]))
    sparse = [{"nll": 2.5, "kl": 0.25}, {"nll": 3.5, "kl": 0.5}]
    write_run(tmp_path / "hip", "hip", lines(sparse))
    row = row_of(rows_of(tmp_path), "hip", "sp_perplexity")
    assert row.scores["perplexity"].mean == pytest.approx(exp(3.0))
    assert row.scores["kl"].difference.mean == pytest.approx(0.375)
    assert row.scores["nll"].difference.mean == pytest.approx(0.5)
    assert not any(score.higher_is_better for score in row.scores.values())


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"density": None, "exact": {"short": 30}}, "mostly exact: no call ran sparse (short)"),
        (
            {"density": 0.2, "exact": {"softcap": 20, "decode": 99}, "sparse_calls": 10},
            "mostly exact: 67% of the attention calls ran dense (softcap)",
        ),
    ],
)
def test_a_method_that_ran_mostly_exact_is_flagged(tmp_path, fields, flag):
    write_run(tmp_path / "dense", samples=[sample()])
    write_run(tmp_path / "hip", "hip", [sample(**fields)])
    row = row_of(rows_of(tmp_path), "hip")
    assert flag in row.flags
    assert row.is_mostly_exact
    assert flag in markdown(rows_of(tmp_path))


def test_a_method_that_ran_mostly_sparse_is_not_flagged_and_its_exact_calls_are_dense(tmp_path):
    write_run(tmp_path / "dense", samples=[sample()])
    fields = {"density": 0.25, "exact": {"layer kept dense": 10, "decode": 99}, "sparse_calls": 30}
    write_run(tmp_path / "hip", "hip", [sample(truncated=1, **fields)])
    row = row_of(rows_of(tmp_path), "hip")
    assert row.exact_share == 0.25
    assert row.density == pytest.approx((30 * 0.25 + 10) / 40)
    assert row.flags == ("only 1 pairs: intervals too narrow", "1 of 1 prompts truncated")


# --- text ----------------------------------------------------------------------------------------


def test_markdown_takes_any_name_as_text(tmp_path):
    evil = "hip:x=<script>|[a](javascript:b)`"
    write_run(tmp_path, evil, [sample()], model="a<b>\nc")
    text = markdown(rows_of(tmp_path))
    assert "<script" not in text
    assert "](" not in text
    assert r"hip:x=&lt;script>\|" in text
    assert "## a&lt;b> c (float32" in text


def test_csv_files_hold_every_score_unformatted(tmp_path):
    write_comparison(tmp_path / "runs", samples=2, lengths=(2048,))
    runs = find_runs([tmp_path / "runs"])
    rows = comparison_table(runs)
    write_summary(tmp_path / "summary.csv", rows)
    write_samples(tmp_path / "samples.csv", sections(runs))
    with (tmp_path / "summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    assert len(summary) == sum(len(row.scores) for row in rows)
    for line, row in zip(summary[:3], [rows[0]] * 3, strict=True):
        assert float(line["mean"]) == row.scores[line["score"]].mean
        assert (line["method"], line["task"], line["length"]) == (row.method, row.task, "2048")
    assert [line["primary"] for line in summary[:3]] == ["True", "False", "False"]
    with (tmp_path / "samples.csv").open() as file:
        samples = list(csv.DictReader(file))
    assert len(samples) == sum(len(s.scores) for run in runs for s in run.samples)
    first = runs[0].samples[0]
    assert float(samples[0]["value"]) == first.scores["string_match"]
    assert samples[0]["prompt_hash"] == first.prompt_hash


# --- command -------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_report_writes_the_same_four_files_every_time(tmp_path):
    write_run(tmp_path / "runs" / "dense", samples=[sample(0, depth=0.0), sample(1, depth=1.0)])
    write_run(tmp_path / "runs" / "hip", "hip", [sample(n, density=0.5) for n in range(2)])
    for name in ("one", "two"):
        done = run("report", tmp_path / "runs", "--output", tmp_path / name)
        assert done.exit_code == 0, done.output
    names = {"report.html", "report.md", "summary.csv", "samples.csv"}
    assert {file.name for file in (tmp_path / "one").iterdir()} == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_report_says_what_it_left_out_and_what_is_wrong(tmp_path):
    write_run(tmp_path / "hip", "hip", [sample(0)], finished=False)
    done = run("report", tmp_path / "hip", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "unfinished: no results.json yet" in done.output
    empty = run("report", write_run(tmp_path / "empty"), "--output", tmp_path / "none")
    assert empty.exit_code == 2
    assert "none with a finished sample yet" in empty.output
    missing = run("report", tmp_path / "nowhere")
    assert missing.exit_code == 2
    assert "nowhere is not a folder" in missing.output.replace("\n", "")
    assert not (tmp_path / "none").exists()
