"""Documents are the same everywhere, fit their length, and refuse what cannot be."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("wonderwords")

from sparse_patch_eval.tasks.documents import documents, from_metadata
from sparse_patch_eval.tasks.problem import Growth, Problem, TooShort, fit, one_replaced
from sparse_patch_eval.tasks.table import GENERATORS

from tests.eval.task_documents import made

ROOT = Path(__file__).parents[2]
# Of tasks that take neither a word list nor prose.
PINNED = "7be8ecc26bd565a2"


def digest(docs):
    return hashlib.sha256(json.dumps(docs).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", GENERATORS)
def test_more_samples_leave_the_first_as_they_are(name, tiny, folder):
    few = made(tiny[1], folder, name, 14000, 2)
    many = made(tiny[1], folder, name, 14000, 5)
    assert many[: len(few)] == few
    assert len({doc["input"] for doc in many}) == len(many)


def test_another_process_makes_the_same(tiny, folder):
    names = ["sp_niah_multikey_1", "sp_cwe", "sp_fwe", "sp_qa_2"]
    options = {"haystack": str(folder / "walks.txt"), "max_seq_lengths": [9000], "num_samples": 2}
    metadata = {**options, "tokenizer": str(folder / "model")}
    code = (
        "import json; from sparse_patch_eval.tasks.documents import from_metadata;"
        f"print(json.dumps([from_metadata(name, {metadata}) for name in {names}]))"
    )
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "eval"))
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [documents(name, tiny[1], **options) for name in names]


def test_samples_are_what_they_were_whatever_the_python(tiny, folder):
    names = ("sp_vt", "sp_passkey", "sp_qa_2")
    assert digest([made(tiny[1], folder, name, 6000, 2) for name in names]) == PINNED


def test_seed_and_length_draw_other_samples(tiny, folder):
    one, other = (made(tiny[1], folder, "sp_passkey", count=5, seed=seed) for seed in (0, 1))
    assert not {doc["outputs"][0] for doc in one} & {doc["outputs"][0] for doc in other}
    longer = made(tiny[1], folder, "sp_passkey", 7000, 5)
    assert not {doc["outputs"][0] for doc in one} & {doc["outputs"][0] for doc in longer}


def test_lengths_come_one_after_the_other_with_an_index_of_their_own(tiny):
    docs = documents("sp_passkey", tiny[1], max_seq_lengths=[2000, 1500], num_samples=2)
    assert [(doc["max_length"], doc["index"]) for doc in docs] == [
        (2000, 0),
        (2000, 1),
        (1500, 0),
        (1500, 1),
    ]


def test_reserve_is_kept_free(tiny):
    (whole,) = documents("sp_passkey", tiny[1], max_seq_lengths=[2000], num_samples=1)
    (less,) = documents("sp_passkey", tiny[1], max_seq_lengths=[2000], num_samples=1, reserve=300)
    assert 270 <= len(whole["input"]) - len(less["input"]) <= 330


def test_tokens_of_candidates_are_what_lm_eval_counts(tiny, folder):
    for doc in made(tiny[1], folder, "sp_niah_single_2", count=2):
        assert doc["candidate_tokens"] == [1 + len(one) for one in doc["candidates"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_lengths": []}, r"max_seq_lengths=\[\] must be a list of token counts"),
        ({"max_seq_lengths": "4096"}, "max_seq_lengths='4096' must be a list"),
        ({"max_seq_lengths": [4096, 0]}, "must be a list of token counts"),
        ({"num_samples": 0}, "num_samples=0 must be a whole number of 1 or more"),
        ({"depths": 1}, "depths=1 must be a whole number of 2 or more"),
        ({"reserve": -1}, "reserve=-1 must be"),
        ({"haystack": "no such text"}, "unknown text 'no such text'"),
    ],
)
def test_wrong_arguments_are_named(options, message, tiny):
    with pytest.raises(ValueError, match=message):
        documents("sp_niah_grid", tiny[1], **options)


def test_an_unknown_task_lists_those_there_are(tiny):
    with pytest.raises(ValueError, match="unknown task 'sp_nothing': use one of sp_niah_single_1"):
        documents("sp_nothing", tiny[1])


@pytest.mark.parametrize("name", GENERATORS)
def test_a_length_too_short_says_how_much_is_needed(name, tiny, folder):
    with pytest.raises(ValueError, match=rf"{name}: length 200 is too short") as error:
        made(tiny[1], folder, name, 200, 1)
    needed = int(str(error.value).split("about ")[1].split()[0])
    # Another length draws other values, so "about".
    made(tiny[1], folder, name, round(1.1 * needed), 1)


@pytest.mark.parametrize("key", ["tokenizer", "pretrained", "model"])
def test_the_tokenizer_goes_by_the_names_lm_eval_knows(key, folder):
    metadata = {key: str(folder / "model"), "max_seq_lengths": [1500], "num_samples": 1}
    assert len(from_metadata("sp_passkey", {**metadata, "method": "dense", "dtype": "auto"})) == 1


def sample(units):
    return Problem("x" * units, "", (), "", (), None)


@pytest.mark.parametrize(
    "cost", [lambda n: n, lambda n: 7 * n, lambda n: 40 + n**2, lambda n: n // 3]
)
@pytest.mark.parametrize("limit", [60, 1000, 12345])
def test_fitting_finds_the_most_units_in_few_steps(cost, limit):
    tried = []

    def count(one):
        tried.append(len(one.input))
        return cost(len(one.input))

    found, units = fit(Growth(sample, 1, 10**5), count, limit, slack=0)
    assert len(found.input) == units
    assert cost(units) <= limit
    assert cost(units) == limit or cost(units + 1) > limit
    assert len(tried) < 30


def test_fitting_stops_within_the_slack_and_at_the_most():
    _, units = fit(Growth(sample, 1, 10**5), lambda one: len(one.input), 1000, slack=990)
    assert units == 17  # the first step
    assert fit(Growth(sample, 1, 50), lambda one: len(one.input), 1000, slack=0)[1] == 50
    with pytest.raises(TooShort, match="5 tokens"):
        fit(Growth(sample, 5, 50), lambda one: len(one.input), 4, slack=0)


def test_one_value_is_replaced_by_one_of_the_stand_ins():
    import random

    lists = one_replaced(["a", "b", "c"], ["a", "b", "c", "d"], random.Random(0))
    assert len({tuple(one) for one in lists}) == 7
    assert all(sum(x != y for x, y in zip(one, "abc", strict=True)) == 1 for one in lists)
