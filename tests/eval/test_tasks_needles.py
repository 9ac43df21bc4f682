"""Needles in copy wording, the grid, passkey and key-value retrieval."""

import json
import re

import pytest

pytest.importorskip("wonderwords")

from sparse_patch_eval.inputs.text import QUESTION, STATEMENT, WORDS
from sparse_patch_eval.tasks.table import GENERATORS, GRID
from sparse_patch_eval.tasks.values import DEPTHS

from tests.eval.task_documents import made

NEEDLE = re.compile(r"\n ?One of the special magic numbers for (\w+) is: (\d{7})\.\n")


@pytest.mark.parametrize(("name", "keys"), [("sp_needle", 1), ("sp_needle_multi", 8)])
def test_the_prompt_ends_with_the_needles_own_words(name, keys, tiny, folder):
    for doc in made(tiny[1], folder, name):
        body, _, question = doc["input"].rpartition("\n\n")
        hidden = dict(NEEDLE.findall(f"{body}\n"))
        assert len(hidden) == len(set(hidden.values())) == keys
        assert set(hidden) <= set(WORDS)
        (word,) = [word for word, number in hidden.items() if [number] == doc["outputs"]]
        assert f"\n\n{question}" == QUESTION.format(word=word)
        assert doc["prompt"] == doc["input"] + STATEMENT.format(word=word)
        wrong = {c for n, c in enumerate(doc["candidates"]) if n != doc["gold"]}
        assert len(wrong & set(hidden.values())) == keys - 1


@pytest.mark.parametrize("name", ["sp_needle", "sp_needle_multi", "sp_passkey", "sp_kv_retrieval"])
def test_depths_are_even_and_prompts_fill_the_length(name, tiny, folder):
    docs = made(tiny[1], folder, name)
    assert sorted(doc["depth"] for doc in docs) == list(DEPTHS)
    assert [doc["index"] for doc in docs] == list(range(40))
    for doc in docs:
        budget = GENERATORS[name].tokens_to_generate
        used = len(tiny[1](doc["prompt"])["input_ids"]) + budget
        assert 6000 - 90 <= used <= 6000  # 90: a pair of UUIDs


@pytest.mark.parametrize("name", ["sp_needle", "sp_passkey", "sp_kv_retrieval"])
def test_the_needle_stands_at_its_depth(name, tiny, folder):
    for doc in made(tiny[1], folder, name):
        body = doc["input"]
        if name == "sp_kv_retrieval":
            body = body[body.index("{") : body.index("}")]
        where = body.index(doc["outputs"][0]) / len(body)
        assert where == pytest.approx(doc["depth"], abs=0.05)


def test_the_grid_has_every_depth_for_every_sample(tiny, folder):
    docs = made(tiny[1], folder, GRID, count=3)
    assert len(docs) == 33
    assert [doc["depth"] for doc in docs[:11]] == pytest.approx([n / 10 for n in range(11)])
    assert [doc["depth"] for doc in docs[:11]] == [doc["depth"] for doc in docs[22:]]
    assert len({doc["outputs"][0] for doc in docs}) == 33  # each cell draws its own
    for doc in docs:
        where = doc["input"].index(doc["outputs"][0]) / len(doc["input"].rpartition("\n\n")[0])
        assert where == pytest.approx(doc["depth"], abs=0.02)


def test_more_depths_keep_the_samples_of_those_there_were(tiny, folder):
    few, many = (made(tiny[1], folder, GRID, count=1, depths=n) for n in (3, 5))
    assert [doc["prompt"] for doc in few] == [many[n]["prompt"] for n in (0, 2, 4)]


def test_the_grid_asks_in_either_wording(tiny, folder):
    (copied, *_) = made(tiny[1], folder, GRID, count=1)
    (asked, *_) = made(tiny[1], folder, GRID, count=1, wording="question")
    assert copied["gen_prefix"].startswith("One of the special magic numbers for")
    assert re.search(r"\nWhat is the special magic number for \S+ mentioned", asked["input"])
    with pytest.raises(ValueError, match="wording='both' must be one of copy, question"):
        made(tiny[1], folder, GRID, count=1, wording="both")


def test_a_pass_key_is_said_twice_in_filler(tiny, folder):
    sentence = re.compile(r"(The grass is green|The sky is blue|The sun is yellow|Here we go)\.")
    for doc in made(tiny[1], folder, "sp_passkey"):
        (key,) = doc["outputs"]
        assert re.fullmatch(r"[1-9]\d{4}", key)
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        assert doc["input"].count(needle) == 1
        intro, body, question = doc["input"].split("\n\n")
        assert intro.startswith(
            "There is an important info hidden inside a lot of irrelevant text."
        )
        assert f"{question} {doc['gen_prefix']}" == "What is the pass key? The pass key is"
        rest = sentence.sub("", body.replace(needle, "").replace("There and back again.", ""))
        assert rest.strip() == ""
        assert all(c not in body for n, c in enumerate(doc["candidates"]) if n != doc["gold"])


def test_pairs_are_json_and_one_value_is_asked_for(tiny, folder):
    for doc in made(tiny[1], folder, "sp_kv_retrieval"):
        head, body, tail = re.fullmatch(r"(.*?)(\{.*\})(.*)", doc["input"], re.S).groups()
        pairs = json.loads(body)
        assert head.startswith("Extract the value corresponding to the specified key in the JSON")
        key = re.fullmatch(r'\n\nKey: "(\S+)"', tail)[1]
        assert doc["outputs"] == [pairs[key]]
        assert doc["gen_prefix"] == "Corresponding value:"
        assert len(set(pairs.values())) == len(pairs) > 40
        told = [json.loads(one) for one in doc["candidates"]]
        assert told[doc["gold"]] == pairs[key]
        assert set(told) <= set(pairs.values())
