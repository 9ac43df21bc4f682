"""RULER's variable tracking, common words and frequent words against its definitions."""

import random
import re
from collections import Counter
from itertools import islice, pairwise
from math import pi

import pytest

pytest.importorskip("wonderwords")
pytest.importorskip("scipy")

from sparse_patch_eval.tasks import counting, values
from sparse_patch_eval.tasks.counting import zeta_counts
from sparse_patch_eval.tasks.table import GENERATORS, RULER
from sparse_patch_eval.tasks.values import NOISE

from tests.eval.task_documents import made


def test_the_table_holds_rulers_thirteen_tasks_and_answer_lengths():
    assert len(RULER) == 13
    budget = {name: task.tokens_to_generate for name, task in RULER.items()}
    assert {budget[name] for name in RULER if "niah" in name} == {128}
    assert [budget[f"sp_{name}"] for name in ("vt", "cwe", "fwe")] == [30, 120, 50]
    assert budget["sp_qa_1"] == budget["sp_qa_2"] == 32


@pytest.fixture
def chains(tiny, folder):
    return made(tiny[1], folder, "sp_vt")


def test_variables_form_a_chain_of_four_hops_in_noise(chains):
    for doc in chains:
        body = doc["input"].rpartition("Memorize and track")[2].split("\n\n")[1]
        lines = body.split("\n")
        statements = [line for line in lines if line.startswith("VAR ")]
        names = doc["outputs"]
        value = re.fullmatch(r"VAR ([A-Z]{5}) = (\d{5})", statements[0])
        assert value[1] == names[0]
        hops = [f"VAR {later} = VAR {earlier}" for earlier, later in pairwise(names)]
        assert statements[1:] == hops
        assert len(hops) == 4
        assert len(set(names)) == 5
        assert {*lines} - {*statements} == {NOISE, *lines[-1:]} or {*lines} == {NOISE, *statements}
        assert f"assigned the value {value[2]} in the text above." in doc["input"]
        assert doc["gen_prefix"] == (
            "Answer: According to the chain(s) of variable assignment in the text above, 5 "
            f"variables are assgined the value {value[2]}, they are:"
        )


def test_a_solved_example_with_shorter_names_precedes(chains):
    for doc in chains:
        example, _, question = doc["input"].rpartition("Memorize and track")
        assert example.startswith("Memorize and track the chain(s) of variable assignment hidden")
        shown = example.split("they are: ")[1].split()
        assert len(shown) == 5
        assert all(re.fullmatch("[A-Z]{3}", name) for name in shown)
        assert all(f"VAR {name} = " in example for name in shown)
        value, other = re.findall(r"are assigned the value (\d{5}) in", doc["input"])
        assert value != other
        assert other in question


def test_wrong_chains_are_made_of_its_variables(chains):
    for doc in chains:
        assert doc["candidates"][doc["gold"]].split() == doc["outputs"]
        for number, one in enumerate(doc["candidates"]):
            assert set(one.split()) <= set(doc["outputs"])
            assert (number == doc["gold"]) == (set(one.split()) == set(doc["outputs"]))


def listed(text):
    return re.findall(r"\d+\. (\S+)", text)


@pytest.mark.parametrize(
    ("length", "often", "seldom", "example"),
    [(3000, 6, 1, (3, 1, 20)), (14000, 30, 3, (10, 3, 40))],
)
def test_ten_words_are_common(length, often, seldom, example, tiny, folder):
    for doc in made(tiny[1], folder, "sp_cwe", length, 10):
        shown, _, text = doc["input"].rpartition("Below is a numbered list of words.")
        text, question = text.split("\n", 1)[1].split("\n")
        assert question == "Question: What are the 10 most common words in the above list?"
        numbers = [int(number) for number in re.findall(r"(\d+)\. ", text)]
        assert numbers == list(range(1, len(numbers) + 1))
        counts = Counter(listed(text))
        assert {word for word, count in counts.items() if count == often} == set(doc["outputs"])
        assert {count for word, count in counts.items() if word not in doc["outputs"]} == {seldom}
        assert len(doc["outputs"]) == 10
        assert len(counts) > 20
        pattern, rare, size = example
        body, answer = shown.split(
            "Answer: The top 10 words that appear most often in the list are:"
        )
        seen = Counter(listed(body.split("\n")[1]))
        assert len(seen) == size
        assert {word for word in seen if seen[word] == pattern} == set(listed(answer))
        assert {seen[word] for word in seen if word not in listed(answer)} == {rare}
        assert (
            doc["gen_prefix"] == "Answer: The top 10 words that appear most often in the list are:"
        )
        for number, one in enumerate(doc["candidates"]):
            assert set(listed(one)) <= set(counts)
            assert (number == doc["gold"]) == (set(listed(one)) == set(doc["outputs"]))


def test_words_are_drawn_from_all_there_are_and_pairs_of_words_follow(monkeypatch):
    few = {"noun": ("oak", "elm", "ash"), "adjective": ("red", "wet", "big"), "verb": ("go", "sit")}

    def vocabulary(*kinds):
        return tuple(word for kind in kinds for word in few[kind])

    monkeypatch.setattr(values, "vocabulary", vocabulary)
    monkeypatch.setattr(counting, "vocabulary", vocabulary)
    found = list(islice(counting.endless_words(random.Random(0)), 12))
    assert sorted(found[:8]) == sorted(vocabulary(*few))
    assert found[:8] != list(vocabulary(*few))
    assert all("-" in word for word in found[8:])


def test_coded_words_follow_a_zeta_distribution(tiny, folder):
    for length in (4000, 12000):
        for doc in made(tiny[1], folder, "sp_fwe", length, 10):
            text = doc["input"].split("coded words. ", 1)[1].rpartition("\nQuestion")[0]
            counts = Counter(text.split(" "))
            (dots, most), *ranked = counts.most_common()
            assert dots == "..."
            assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)
            assert doc["outputs"] == [word for word, _ in ranked[:3]]
            assert ranked[2][1] > ranked[3][1]  # the third is not a draw
            number = most * pi**2 / 6
            for rank, (_, count) in enumerate(ranked[:10], 2):
                share = number / rank**2 * 6 / pi**2
                assert count == pytest.approx(share, abs=1.5)
            wrong = [c for n, c in enumerate(doc["candidates"]) if n != doc["gold"]]
            assert all({*one.split(", ")} <= {*counts} for one in wrong)
            assert doc["candidates"][doc["gold"]].split(", ") == doc["outputs"]


def test_the_vocabulary_has_a_word_for_fifty_tokens():
    counts = zeta_counts(10_000, 4096 // 50, 2.0)
    assert len(counts) == 81
    assert counts[0] == int(10_000 * 6 / pi**2)
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("name", ["sp_vt", "sp_cwe", "sp_fwe", "sp_qa_1", "sp_qa_2"])
def test_prompts_fill_the_length(name, tiny, folder):
    for doc in made(tiny[1], folder, name, 14000, 10):
        budget = GENERATORS[name].tokens_to_generate
        used = len(tiny[1](doc["prompt"])["input_ids"]) + budget
        assert 14000 - (700 if "qa" in name else 120) <= used <= 14000


@pytest.mark.parametrize("name", ["sp_cwe", "sp_fwe"])
def test_an_answer_spread_over_the_prompt_has_no_depth(name, tiny, folder):
    assert {doc["depth"] for doc in made(tiny[1], folder, name, 14000, 10)} == {None}


def test_the_chain_begins_where_depth_says(chains):
    for doc in chains:
        lines = doc["input"].rpartition("Memorize and track")[2].split("\n\n")[1].split("\n")
        first = next(n for n, line in enumerate(lines) if line.startswith("VAR"))
        assert first == round(doc["depth"] * lines.count(NOISE))
    depths = sorted(doc["depth"] for doc in chains)
    assert depths[0] < 0.1
    assert depths[-1] > 0.3
