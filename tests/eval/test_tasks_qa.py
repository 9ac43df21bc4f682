"""The stand-ins for RULER's question answering: who tells what, and that only they do."""

import re
from collections import Counter

import pytest
from sparse_patch_eval.tasks.world import KINDS, Mint

from tests.eval.task_documents import made

TASKS = ("sp_qa_1", "sp_qa_2")


def pages(doc):
    body = doc["input"].split("given documents.\n\n", 2)[1].rpartition("\n\nAnswer the question")[0]
    found = re.split(r"(?:^|\n\n)Document (\d+):\n", body)[1:]
    assert [int(number) for number in found[::2]] == list(range(1, len(found) // 2 + 1))
    return found[1::2]


def question(doc):
    return doc["input"].rpartition("\n\nQuestion: ")[2]


def holders(doc, text):
    pattern = re.compile(rf"(?<![\w,]){re.escape(text)}(?![\w,]*\w)")
    return [number for number, page in enumerate(pages(doc)) if pattern.search(page)]


@pytest.fixture
def one(tiny, folder):
    return made(tiny[1], folder, "sp_qa_1", 8000)


@pytest.fixture
def two(tiny, folder):
    return made(tiny[1], folder, "sp_qa_2", 8000)


@pytest.mark.parametrize("task", TASKS)
def test_one_document_tells_the_answer(task, request):
    for doc in request.getfixturevalue("one" if task == "sp_qa_1" else "two"):
        assert len(holders(doc, doc["outputs"][0])) == 1
        assert doc["outputs"][0] not in question(doc)
        assert doc["candidates"][doc["gold"]] == doc["outputs"][0]


def subject(page):
    """The title of a two-hop document."""
    return page.split("\n", 1)[0]


def test_one_hop_names_the_subject_of_the_document_that_answers(one):
    for doc in one:
        (holder,) = holders(doc, doc["outputs"][0])
        opening = re.split(r"(?<=\.) ", pages(doc)[holder])[0]
        named = [word for word in re.findall(r"[A-Z][\w]+", opening) if word in question(doc)]
        assert named, (question(doc), opening)
        assert len(holders(doc, named[-1])) >= 1


def test_two_hops_need_a_document_that_names_the_other(two):
    for doc in two:
        (last,) = holders(doc, doc["outputs"][0])
        middle = subject(pages(doc)[last])
        assert middle not in question(doc)
        (first,) = set(holders(doc, middle)) - {last}
        assert subject(pages(doc)[first]) in question(doc)


@pytest.mark.parametrize("task", TASKS)
def test_wrong_answers_are_told_by_the_documents(task, tiny, folder):
    for doc in made(tiny[1], folder, task, 24000, 20):
        wrong = [c for n, c in enumerate(doc["candidates"]) if n != doc["gold"]]
        assert all(holders(doc, value) for value in wrong)


@pytest.mark.parametrize("task", TASKS)
def test_documents_do_not_look_alike(task, request):
    docs = request.getfixturevalue("one" if task == "sp_qa_1" else "two")
    for doc in docs:
        texts = [page.split("\n")[-1] for page in pages(doc)]
        assert len(texts) > 10
        beginnings = Counter(" ".join(text.split()[-3:]) for text in texts)
        assert beginnings.most_common(1)[0][1] <= 4
    assert len({question(doc) for doc in docs}) == len(docs)
    kinds = {re.sub(r"[A-Z0-9]\S*", "_", question(doc)) for doc in docs}
    assert len(kinds) >= 12


@pytest.mark.parametrize("task", TASKS)
def test_the_document_that_answers_stands_at_the_depth(task, request):
    docs = request.getfixturevalue("one" if task == "sp_qa_1" else "two")
    for doc in docs:
        (holder,) = holders(doc, doc["outputs"][0])
        assert holder / (len(pages(doc)) - 1) == pytest.approx(doc["depth"], abs=0.1)
    assert len({doc["depth"] for doc in docs}) == 40


def test_a_number_or_date_may_be_written_in_two_ways(one):
    spelled = [doc["outputs"] for doc in one if len(doc["outputs"]) == 2]
    assert spelled
    for told, other in spelled:
        if "," in told:
            assert other == told.replace(",", "")
        else:
            day, month, year = told.split()
            assert other == f"{month} {day}, {year}"


def test_prompts_are_rulers(one):
    ask = "Answer the question based on the given documents. Only give me the answer and do not "
    ask += "output any other words."
    for doc in one:
        assert doc["input"].startswith(
            f"{ask}\n\nThe following are given documents.\n\nDocument 1:"
        )
        assert doc["prompt"].endswith(f"\n\n{ask}\n\nQuestion: {question(doc)} Answer:".rstrip())


def test_a_mint_gives_nothing_twice():
    import random

    mint = Mint(random.Random(0))
    for kind in (*KINDS, "date", "count", "town"):
        made_values = [mint.make(kind) for _ in range(3000)]
        assert len(set(made_values)) == 3000


def test_every_sentence_can_be_written():
    for kind in KINDS.values():
        assert len(kind.openings) >= 3
        assert len(kind.facts) >= 5
        for opening in kind.openings:
            assert "X" in opening.format(name="X", noun="y")
        for fact in kind.facts:
            assert "X" in fact.question.format(name="X")
            assert len(fact.wordings) >= 3
            for wording in fact.wordings:
                said = wording.format(it="the y", It="The y", value="V")
                assert "V" in said
                assert "{" not in said
            assert not fact.role or fact.value in KINDS
