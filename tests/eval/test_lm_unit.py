"""An lm-eval task as a unit: asked from one prefill, scored by lm-eval itself."""

from __future__ import annotations

import datasets
import pytest
from lm_eval.tasks import TaskManager
from sparse_patch_eval.runs import lm_unit
from sparse_patch_eval.runs.lm_unit import LmUnit
from sparse_patch_eval.runs.unit import How

from sparse_patch import get_method

DENSE = How(None, {})
DOCS = [
    {"question": f"{'word ' * (3 + n)}{n} and {n} is", "answer": str(2 * n), "depth": n / 4}
    for n in range(4)
]


class Lab:
    """Stands in for the lm-eval model."""

    max_gen_toks, tokenizer_name = 8, "tiny"

    def __init__(self, tiny, max_length=4096):
        self.model, self.tokenizer = tiny
        self.max_length = max_length

    def encode_context(self, text):
        return self.tokenizer(text)["input_ids"]

    def encode_pair(self, context, continuation):
        return self.encode_context(context), self.encode_context(continuation)


def _load(**changes):
    config = {
        "task": "sums",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(DOCS)},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match"}],
        **changes,
    }
    manager = TaskManager(include_defaults=False)
    return manager.load([config])["tasks"]["sums"]


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": ["0", "2", "4", "6"],
    "doc_to_target": "{{['0', '2', '4', '6'].index(answer)}}",
    "generation_kwargs": None,
    "metric_list": [{"metric": "acc"}],
}


def _said(unit, reply):
    rows = {}
    for sample in unit.questions():
        rows[sample.doc_id] = {"responses": [reply(one) for one in sample.content]}
    return rows


def test_right_answers_score_one_and_wrong_ones_zero(tiny):
    unit = LmUnit("made up", _load(), None, lm=Lab(tiny))
    for reply, score in ((lambda one: one.doc["answer"], 1.0), (lambda one: "no", 0.0)):
        scored = unit.score(_said(unit, reply))
        assert [row["scores"] for row in scored.rows.values()] == [{"exact_match": score}] * 4
        assert scored.official["results"]["sums"]["exact_match,none"] == score
        assert scored.higher_is_better == {"exact_match": True}
    assert [row["target"] for row in scored.rows.values()] == ["0", "2", "4", "6"]
    assert {row["answer"] for row in scored.rows.values()} == {"no"}


def test_choices_are_scored_from_likelihoods(tiny):
    unit = LmUnit("made up", _load(**CHOICE), None, lm=Lab(tiny))

    def right(one):
        return [-1.0 if one.args[1].strip() == one.doc["answer"] else -9.0, False]

    scored = unit.score(_said(unit, right))
    assert [row["scores"]["acc"] for row in scored.rows.values()] == [1.0] * 4
    wrong = unit.score(_said(unit, lambda one: [-right(one)[0], False]))
    assert [row["scores"]["acc"] for row in wrong.rows.values()] == [0.0] * 4


def test_some_of_the_samples_can_be_scored(tiny):
    unit = LmUnit("made up", _load(), None, lm=Lab(tiny))
    rows = _said(unit, lambda one: one.doc["answer"])
    scored = unit.score({n: rows[n] for n in (1, 3)})
    assert list(scored.rows) == [1, 3]
    assert scored.rows[3]["target"] == "6"


def test_choices_of_a_sample_come_from_one_prefill(tiny, monkeypatch):
    prefills = []
    answer = lm_unit.answer
    monkeypatch.setattr(
        lm_unit, "answer", lambda *given, **options: prefills.append(1) or answer(*given, **options)
    )
    unit = LmUnit("made up", _load(**CHOICE), None, lm=Lab(tiny))
    row = unit.ask(unit.questions()[0], DENSE)
    assert len(prefills) == 1
    assert [len(reply) for reply in row["responses"]] == [2] * 4
    assert row["density"] == 1.0
    assert row["exact"] == {}


def test_what_is_asked_is_what_the_model_says(tiny):
    lab = Lab(tiny)
    unit = LmUnit("made up", _load(), None, lm=lab)
    sample = unit.questions()[2]
    row = unit.ask(sample, DENSE)
    ids = lab.tokenizer(sample.content[0].args[0], return_tensors="pt")["input_ids"]
    wanted = lab.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    text = lab.tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
    assert row["responses"] == [text.split("\n")[0]]
    assert row["tokens"] == ids.shape[1]
    assert sample.depth == 0.5


def test_a_method_is_measured(tiny):
    long = [{**one, "question": "word " * 200 + one["question"]} for one in DOCS]
    task = _load(custom_dataset=lambda **_: {"test": datasets.Dataset.from_list(long)})
    unit = LmUnit("made up", task, None, lm=Lab(tiny))
    how = How(get_method("a_shape", sink=4, window=64), {"min_length": 0}, measure_recall=True)
    row = unit.ask(unit.questions()[0], how)
    assert 0 < row["density"] < 1
    assert 0 < row["recall"] < 1
    exact = unit.ask(unit.questions()[0], How(how.method, {"min_length": 4096}))
    assert exact["density"] is None
    assert exact["sparse_calls"] == 0
    assert row["sparse_calls"] == 2
    assert sum(exact["exact"].values()) == 2, "one call a layer, and why it ran exact"


def test_a_prompt_that_does_not_fit_is_cut_as_told_and_counted(tiny):
    rooms = []

    def keep_start(tokens, room):
        rooms.append((len(tokens), room))
        return tokens[:room]

    unit = LmUnit("made up", _load(), None, lm=Lab(tiny, max_length=20), truncate=keep_start)
    row = unit.ask(unit.questions()[3], DENSE)
    ((before, room),) = rooms
    assert room == 15
    assert row["tokens"] == room
    assert row["truncated"] == before - room
    assert unit.ask(unit.questions()[3], DENSE)["responses"] == row["responses"]
    with pytest.raises(ValueError, match="more tokens than the 5"):
        LmUnit("made up", _load(), None, lm=Lab(tiny, max_length=5)).ask(unit.questions()[0], DENSE)


def test_what_one_prefill_cannot_answer_is_refused_before_anything_runs(tiny):
    rolling = _load(
        output_type="loglikelihood_rolling", metric_list=[{"metric": "word_perplexity"}]
    )
    with pytest.raises(ValueError, match="rolling"):
        LmUnit("made up", rolling, None, lm=Lab(tiny)).questions()
    sampled = _load(generation_kwargs={"until": ["\n"], "do_sample": True, "temperature": 0.7})
    with pytest.raises(ValueError, match="greedily"):
        LmUnit("made up", sampled, None, lm=Lab(tiny)).questions()


def test_the_limit_keeps_the_first_and_hashes_tell_prompts_apart(tiny):
    whole = LmUnit("made up", _load(), None, lm=Lab(tiny)).questions()
    first = LmUnit("made up", _load(), None, lm=Lab(tiny), limit=2).questions()
    assert [one.prompt_hash for one in first] == [one.prompt_hash for one in whole[:2]]
    assert len({one.prompt_hash for one in whole}) == 4
