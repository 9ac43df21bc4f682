"""RULER's needles: the eight tasks' samples against its definitions."""

import re

import pytest

pytest.importorskip("wonderwords")

from sparse_patch_eval.inputs.text import long_text
from sparse_patch_eval.tasks.table import RULER
from sparse_patch_eval.tasks.values import DEPTHS, NOISE, prose

from tests.eval.task_documents import made

NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.(?=\s|$)")
WORDS, NUMBER = r"[a-z]+-[a-z]+", r"[1-9]\d{6}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"

# name: haystack, form of keys, form of values, keys, values of each, keys asked for
DEFINITIONS = {
    "sp_niah_single_1": ("noise", WORDS, NUMBER, 1, 1, 1),
    "sp_niah_single_2": ("essay", WORDS, NUMBER, 1, 1, 1),
    "sp_niah_single_3": ("essay", WORDS, UUID, 1, 1, 1),
    "sp_niah_multikey_1": ("essay", WORDS, NUMBER, 4, 1, 1),
    "sp_niah_multikey_2": ("needle", WORDS, NUMBER, None, 1, 1),
    "sp_niah_multikey_3": ("needle", UUID, UUID, None, 1, 1),
    "sp_niah_multivalue": ("essay", WORDS, NUMBER, 1, 4, 1),
    "sp_niah_multiquery": ("essay", WORDS, NUMBER, 4, 1, 4),
}


def needles(doc):
    """Values of each key, in order of appearance, before the question."""
    found = {}
    for _, key, value in NEEDLE.findall(doc["input"].rpartition("\n")[0]):
        found.setdefault(key, []).append(value)
    return found


@pytest.fixture(params=DEFINITIONS)
def task(request):
    return request.param


@pytest.fixture
def docs(task, tiny, folder):
    return made(tiny[1], folder, task)


def test_keys_values_and_questions_are_rulers(task, docs):
    _, key_form, value_form, keys, each, asked = DEFINITIONS[task]
    for doc in docs:
        found = needles(doc)
        assert all(re.fullmatch(key_form, key) for key in found)
        values = [value for group in found.values() for value in group]
        assert all(re.fullmatch(value_form, value) for value in values)
        assert len(set(values)) == len(values)
        assert {len(group) for group in found.values()} == {each}
        assert len(found) == keys if keys else len(found) > 20
        question = doc["input"].rpartition("\n")[2]
        queried = [key for key in found if key in question]
        assert len(queried) == asked
        assert sorted(doc["outputs"]) == sorted(v for key in queried for v in found[key])


def test_prompts_are_rulers(task, docs):
    one = len(docs[0]["outputs"]) == 1
    kind = "uuid" if RULER[task].type_needle_v == "uuids" else "number"
    for doc in docs:
        query = re.search(r"for (.+) mentioned", doc["input"].rpartition("\n")[2])[1]
        if one:
            assert doc["input"].startswith(
                f"A special magic {kind} is hidden within the following text. "
                f"Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
            )
            assert doc["prompt"].endswith(
                f"\nWhat is the special magic {kind} for {query} mentioned in the provided text? "
                f"The special magic {kind} for {query} mentioned in the provided text is"
            )
        else:
            assert doc["input"].startswith("Some special magic numbers are hidden within")
            assert doc["prompt"].endswith(
                f"\nWhat are all the special magic numbers for {query} mentioned in the provided "
                f"text? The special magic numbers for {query} mentioned in the provided text are"
            )


def test_the_haystack_is_noise_prose_or_needles(task, docs, folder):
    haystack = DEFINITIONS[task][0]
    text = " ".join((folder / "walks.txt").read_text().split())
    begins = set()
    for doc in docs:
        body = doc["input"].split("\n", 1)[1].rpartition("\n")[0]
        rest = [part.strip() for part in NEEDLE.sub("\n", body).split("\n") if part.strip()]
        if haystack == "noise":
            assert set(rest) == {NOISE}
        elif haystack == "needle":
            assert rest == []
        else:
            joined = " ".join(rest)
            assert joined in text  # once, in its order: nothing is tiled
            begins.add(joined[:40])
    assert len(begins) > 35 or haystack != "essay"  # each its own window


def test_the_needle_asked_for_takes_all_forty_depths(task, docs):
    assert sorted(doc["depth"] for doc in docs) == list(DEPTHS)
    assert DEPTHS[:3] == (0.0, 0.03, 0.05)
    assert DEPTHS[-1] == 1.0
    for doc in docs:
        body = doc["input"].split("\n", 1)[1].rpartition("\n")[0]
        first = [m for m in NEEDLE.finditer(body) if m[3] == doc["outputs"][0]]
        assert len(first) == 1
        others = sum(len(m[0]) for m in NEEDLE.finditer(body) if m[3] in doc["outputs"])
        place = first[0].start() / (len(body) - others)
        # Within a sentence or a line, and the other needles in between.
        assert place == pytest.approx(doc["depth"], abs=0.08)


def test_several_needles_stand_apart_at_depths_of_their_own(tiny, folder):
    for doc in made(tiny[1], folder, "sp_niah_multikey_1"):
        starts = [match.start() for match in NEEDLE.finditer(doc["input"])]
        assert len(starts) == 4
        assert len(set(starts)) == 4


def test_prompts_fill_the_length(task, docs, tiny):
    for doc in docs:
        used = len(tiny[1](doc["prompt"])["input_ids"]) + 128
        assert 6000 - 120 <= used <= 6000  # 120: a statement about UUIDs


def test_wrong_answers_are_made_of_values_in_the_prompt_where_there_are_any(task, docs):
    haystack, _, _, keys, each, asked = DEFINITIONS[task]
    for doc in docs:
        values = {value for group in needles(doc).values() for value in group}
        wrong = [c for n, c in enumerate(doc["candidates"]) if n != doc["gold"]]
        if each * asked > 1:
            assert all(set(re.findall(NUMBER, one)) < values for one in wrong)
        else:
            there = {"needle": 7, "noise": 0, "essay": (keys or 1) - 1}[haystack]
            assert sum(one in values for one in wrong) == there


def test_the_whole_answer_tells_values_as_they_stand(tiny, folder):
    for doc in made(tiny[1], folder, "sp_niah_multivalue"):
        (values,) = needles(doc).values()
        answer = doc["candidates"][doc["gold"]]
        assert answer == "{}, {}, {}, and {}".format(*values)
    for doc in made(tiny[1], folder, "sp_niah_multiquery"):
        answer = doc["candidates"][doc["gold"]]
        assert answer == "{}, {}, {}, and {}".format(*doc["outputs"])  # as asked


def test_prose_is_cut_at_sentences(folder):
    from sparse_patch_eval.tasks.problem import Draw

    window = prose(Draw("any", 200, 0.5, str(folder / "walks.txt")))
    assert len(window.words) == 200
    assert all(window.words[start] == "Traveller" for start in window.starts)
    assert window.cut(100, 0.0) == 0
    assert window.cut(100, 1.0) == 100
    assert window.words[window.cut(100, 0.5)] == "Traveller"


def test_a_text_that_is_too_short_is_never_repeated(tiny, folder):
    path = folder / "short.txt"
    path.write_text("A few words only. " * 20)
    with pytest.raises(ValueError, match=r"too short for length 6000.*never repeated"):
        made(tiny[1], folder, "sp_niah_single_2", haystack=str(path))
    assert len(long_text(str(path))) == 360
