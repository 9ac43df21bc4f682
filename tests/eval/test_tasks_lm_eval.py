"""Every offline task through lm-eval's own evaluator, with a scripted model."""

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("wonderwords")

from lm_eval import evaluate
from lm_eval.tasks import TaskManager
from sparse_patch_eval.tasks import OFFLINE, TASKS_FOLDER
from sparse_patch_eval.tasks.table import GENERATORS

from tests.eval.oracle_lm import WRONG, OracleLM

SINGLE = [name for name in OFFLINE if name.startswith("sp_")]


@pytest.fixture(scope="module")
def load(folder, tmp_path_factory):
    """Loads tasks with a byte-level tokenizer and prose of our own, far from any hub."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")

    def tasks(*names, **metadata):
        given = {
            "pretrained": str(folder / "model"),
            "haystack": str(folder / "walks.txt"),
            "max_seq_lengths": [6000],
            "num_samples": 2,
            **metadata,
        }
        manager = TaskManager(
            include_path=str(TASKS_FOLDER), include_defaults=False, metadata=given
        )
        return manager.load(list(names))

    yield tasks
    patch.undo()


def scores(tasks, lm, name, **options):
    found = evaluate(lm, tasks, bootstrap_iters=0, **options)
    wanted = ("string_match", "rank", "answer_nll")
    return {score: found["results"][name][f"{score},none"] for score in wanted}, found


@pytest.mark.parametrize("name", SINGLE)
def test_right_answers_score_one_and_wrong_ones_zero(name, load):
    lengths = [12000] if name == "sp_cwe" else [6000]
    tasks = load(name, max_seq_lengths=lengths)
    right, _ = scores(tasks, OracleLM("right"), name)
    assert right == {"string_match": 1.0, "rank": 1.0, "answer_nll": 0.0}
    wrong, _ = scores(tasks, OracleLM("wrong"), name)
    assert wrong["string_match"] == wrong["rank"] == 0.0
    assert wrong["answer_nll"] > 0.1


def test_no_answer_preferred_counts_as_wrong(load):
    tied, _ = scores(load("sp_needle"), OracleLM("tie"), "sp_needle")
    assert tied == {"string_match": 1.0, "rank": 0.0, "answer_nll": 0.5}


def test_generation_and_likelihoods_share_one_prompt_and_keep_their_order(load):
    lm = OracleLM()
    tasks = load("sp_niah_multikey_1")
    evaluate(lm, tasks, bootstrap_iters=0)
    task = tasks["tasks"]["sp_niah_multikey_1"]
    docs = list(task.test_docs())
    assert len(lm.asked) == 2 * 9
    for number, doc in enumerate(docs):
        mine = sorted((one for one in task.instances if one.doc_id == number), key=lambda i: i.idx)
        prompts = {one.args[0] for one in mine}
        assert prompts == {f"{doc['input']} {doc['gen_prefix']}"}
        assert mine[0].request_type == "generate_until"
        assert mine[0].args[1] == {"do_sample": False, "max_gen_toks": 128, "until": []}
        assert [one.request_type for one in mine[1:]] == ["loglikelihood"] * 8
        assert [one.args[1] for one in mine[1:]] == [f" {one}" for one in doc["candidates"]]
        assert doc["candidates"][doc["gold"]] == doc["outputs"][0]


@pytest.mark.parametrize("name", ["sp_needle", "sp_vt"])
def test_a_chat_template_puts_the_answer_prefix_into_the_assistants_turn(name, load):
    lm = OracleLM()
    tasks = load(name)
    found, _ = scores(tasks, lm, name, apply_chat_template=True)
    assert found == {"string_match": 1.0, "rank": 1.0, "answer_nll": 0.0}
    for one in lm.asked:
        said = f"<user>{one.doc['input']}<assistant>{one.doc['gen_prefix']}"
        assert one.args[0] == said


def test_some_of_several_gold_strings_score_their_share(load):
    lm = OracleLM(said=lambda doc: f"{doc['outputs'][0]} and {doc['outputs'][2].upper()}")
    found, _ = scores(load("sp_niah_multiquery"), lm, "sp_niah_multiquery")
    assert found["string_match"] == 0.5


def test_case_does_not_matter_and_one_spelling_of_a_document_answer_is_enough(load):
    tasks = load("sp_qa_1", num_samples=30)
    docs = list(tasks["tasks"]["sp_qa_1"].test_docs())
    assert any(len(doc["outputs"]) > 1 for doc in docs)
    lm = OracleLM(said=lambda doc: f"it is {doc['outputs'][-1].upper()}!")
    found, _ = scores(tasks, lm, "sp_qa_1")
    assert found["string_match"] == 1.0


def test_the_group_has_all_thirteen_and_averages_them(load):
    tasks = load("sp_ruler", max_seq_lengths=[12000], num_samples=1)
    assert tuple(tasks["tasks"]) == OFFLINE["ruler"].names
    found = evaluate(OracleLM("right"), tasks, bootstrap_iters=0)
    assert found["groups"]["sp_ruler"]["string_match,none"] == 1.0
    assert found["groups"]["sp_ruler"]["answer_nll,none"] == 0.0
    assert not found["higher_is_better"]["sp_ruler"]["answer_nll"]


def test_samples_are_logged_with_what_a_runner_needs(load):
    _, found = scores(load("sp_passkey"), OracleLM("wrong"), "sp_passkey")
    sample = found["samples"]["sp_passkey"][1]
    assert sample["doc_id"] == sample["doc"]["index"] == 1
    assert sample["target"] == sample["doc"]["outputs"][0]
    assert sample["filtered_resps"][0] == WRONG
    assert sample["rank"] == 0.0


def test_the_table_is_what_the_folder_holds(load):
    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False)
    assert set(manager.all_subtasks) == set(SINGLE) == set(GENERATORS)
    assert manager.all_groups == ["sp_ruler"]
    for name, tasks in OFFLINE.items():
        assert tasks.summary, name
        assert set(tasks.names) <= set(SINGLE)


def test_a_task_without_a_tokenizer_says_what_to_give(load):
    with pytest.raises(ValueError, match=r"sp_vt needs a tokenizer.*--metadata '\{\"tokenizer\""):
        load("sp_vt", pretrained=None)


def test_a_length_that_is_too_short_ends_before_anything_runs(load):
    with pytest.raises(ValueError, match=r"sp_vt: length 512 is too short.*about \d+ tokens"):
        load("sp_vt", max_seq_lengths=[512])
