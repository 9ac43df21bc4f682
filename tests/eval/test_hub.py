"""Every metric of the hub benchmarks, on local files and with the network cut."""

import json
import random
import shutil
import socket
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import lm_eval
import pytest
from lm_eval.api.model import LM
from sparse_patch_eval.base.fetch import FetchError
from sparse_patch_eval.tasks.hub import benchmarks as hub
from sparse_patch_eval.tasks.hub import data as hub_data
from sparse_patch_eval.tasks.hub import load as hub_load
from sparse_patch_eval.tasks.hub.tables import HUB

DATA = Path(__file__).parent / "data" / "hub"
WRONG = "%%%"  # no word, letter or number of any answer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using slow pure-python SequenceMatcher"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:jieba.*"),
]


class Scripted(LM):
    """Says what `answer(doc)` returns, and finds nothing else likely."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def generate_until(self, requests):
        return [self.answer(request.doc) for request in requests]

    def loglikelihood(self, requests):
        right = [request.args[1].strip() == self.answer(request.doc) for request in requests]
        return [(0.0 if is_right else -9.0, is_right) for is_right in right]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError("no task of the hub rolls")


@pytest.fixture(autouse=True)
def reached(monkeypatch, tmp_path):
    """Cuts the network and collects who tried to use it."""
    tried = []

    def refuse(*address, **_):
        tried.append(address)
        raise OSError("the network is cut")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tried


def scores(tasks, answer):
    """Primary metric of each task when the model says `answer(doc)`."""
    result = lm_eval.evaluate(
        Scripted(answer), {"tasks": dict(tasks)}, bootstrap_iters=0, limit=20, log_samples=False
    )
    metric = {name: task.config.metric_list[0]["metric"] for name, task in tasks.items()}
    return {name: result["results"][name][f"{metric[name]},none"] for name in tasks}


def only(name, **options):
    return hub.load_tasks([name], **options)[name]


def prompt(task, number=0):
    task.build_all_requests(limit=number + 1, rank=0, world_size=1)
    return task.instances[-1].args[0]


LONGBENCH = """hotpotqa qasper_e multifieldqa_zh gov_report vcsum trec samsum passage_count
passage_retrieval_en passage_retrieval_zh lcc"""


def test_longbench_scores_right_and_wrong_answers_with_every_metric(reached):
    tasks = hub.load_tasks([f"longbench_{name}" for name in LONGBENCH.split()], data_dir=DATA)
    right = scores(tasks, lambda doc: doc["answers"][-1])
    assert right == pytest.approx(dict.fromkeys(tasks, 1.0))
    assert scores(tasks, lambda doc: WRONG) == dict.fromkeys(tasks, 0.0)
    assert not reached


def test_longbench2_scores_the_likeliest_letter(reached):
    names = [f"longbench2_{name}" for name in ("academic_single", "code", "table")]
    tasks = hub.load_tasks(names, data_dir=DATA)
    assert scores(tasks, lambda doc: "ABCD"[doc["answer"]]) == dict.fromkeys(tasks, 1.0)
    assert scores(tasks, lambda doc: "ABCD"[doc["answer"] - 1]) == dict.fromkeys(tasks, 0.0)
    assert not reached


def test_infinitebench_scores_right_and_wrong_answers_with_every_metric(reached):
    tasks = hub.load_tasks(["infinitebench"], data_dir=DATA)
    assert len(tasks) == 11

    def letter_or_text(doc):
        first = doc["answer"][0]
        return "ABCD"[doc["options"].index(first)] if doc["options"] else first

    assert scores(tasks, letter_or_text) == dict.fromkeys(tasks, 1.0)
    assert scores(tasks, lambda doc: WRONG) == dict.fromkeys(tasks, 0.0)
    assert not reached


def test_babilong_scores_by_label_and_by_mention(reached):
    names = [f"babilong_{name}" for name in ("qa1", "qa7", "qa8", "qa12")]
    tasks = hub.load_tasks(names, data_dir=DATA)
    assert scores(tasks, lambda doc: f"It is {doc['target']}.") == dict.fromkeys(tasks, 1.0)
    assert scores(tasks, lambda doc: WRONG) == dict.fromkeys(tasks, 0.0)
    hedged = scores({"babilong_qa1": tasks["babilong_qa1"]}, lambda doc: "kitchen or garden")
    assert hedged == {"babilong_qa1": 0.0}
    assert not reached


def test_babilong_joins_lengths_and_says_each():
    task = only("babilong_qa1", data_dir=DATA, metadata={"max_seq_lengths": [0, 4096]})
    assert [doc["max_length"] for doc in task.eval_docs] == [0, 0, 4096]


def test_babilong_shows_every_example():
    assert prompt(only("babilong_qa8", data_dir=DATA)).count("What is") == 3 + 1


@pytest.fixture
def few_words(monkeypatch):
    """lm-eval's RULER with ten words: all of them take 15 s to pair, which it does on import."""

    categories = {
        "nouns": ["mill", "ferry", "tower", "bridge", "lamp"],
        "adjectives": ["old", "red", "tall", "wet", "kind"],
        "verbs": ["go"],
    }

    def forget():
        for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler")]:
            del sys.modules[name]

    words = SimpleNamespace(_categories=categories)
    monkeypatch.setattr("wonderwords.RandomWord", lambda: words)
    forget()
    yield
    forget()


@pytest.mark.usefixtures("few_words")
def test_ruler_scores_string_match_at_every_length(folder):
    asked = {"tokenizer": str(folder / "model"), "max_seq_lengths": [1024, 2048]}
    tasks = hub.load_tasks(["niah_multikey_2"], data_dir=DATA, metadata=asked)
    documents = tasks["niah_multikey_2"].eval_docs
    assert [documents[n]["max_length"] for n in (0, 499, 500, 999)] == [1024, 1024, 2048, 2048]
    assert scores(tasks, lambda doc: " ".join(doc["outputs"])) == {"niah_multikey_2": 1.0}
    assert scores(tasks, lambda doc: WRONG) == {"niah_multikey_2": 0.0}


@pytest.mark.usefixtures("few_words")
def test_ruler_questions_accept_any_of_the_answers(folder, monkeypatch):
    questions = [
        {"question": f"Who is {n}?", "is_impossible": False, "answers": [{"text": f"Ann{n}"}]}
        for n in range(500)
    ]
    page = {"paragraphs": [{"context": "Nobody knows.", "qas": questions}]}
    answer = SimpleNamespace(raise_for_status=lambda: None, json=lambda: {"data": [page]})
    monkeypatch.setattr("requests.get", lambda url, timeout: answer)
    asked = {"tokenizer": str(folder / "model"), "max_seq_lengths": [1024]}
    tasks = hub.load_tasks(["ruler_qa_squad"], metadata=asked)
    assert scores(tasks, lambda doc: f"It is {doc['outputs'][0]}") == {"ruler_qa_squad": 1.0}
    assert scores(tasks, lambda doc: WRONG) == {"ruler_qa_squad": 0.0}


@pytest.mark.usefixtures("few_words")
def test_ruler_makes_the_same_prompts_again_and_leaves_the_random_state(folder):
    asked = {"tokenizer": str(folder / "model"), "max_seq_lengths": [1024], "seed": 3}
    before = random.getstate()
    first = only("niah_multikey_2", metadata=asked).eval_docs[7]["input"]
    assert random.getstate() == before
    random.random()
    assert only("niah_multikey_2", metadata=asked).eval_docs[7]["input"] == first
    other = only("niah_multikey_2", metadata={**asked, "seed": 4})
    assert other.eval_docs[7]["input"] != first


def test_longbench_prompt_comes_once_from_the_hubs_files_and_from_the_authors(tmp_path):
    asked = (DATA / "Xnhyacinth__LongBench/hotpotqa/test.jsonl").read_text()
    hubs = prompt(only("longbench_hotpotqa", data_dir=DATA))
    assert hubs.count("The following are given passages.") == 1
    assert hubs.endswith("Question: Where was the builder of the mill at Arden born?\nAnswer:")
    context = json.loads(asked)["context"].split("given passages.\n")[1]
    bare = {
        "input": "Where was the builder of the mill at Arden born?",
        "context": context.split("\n\nAnswer")[0],
        "answers": ["Tolby"],
        "all_classes": None,
    }
    with zipfile.ZipFile(archive(tmp_path), "w") as packed:
        packed.writestr("data/hotpotqa.jsonl", json.dumps(bare))
    assert prompt(only("longbench_hotpotqa", data_dir=tmp_path)) == hubs


def archive(root):
    (root / "LongBench").mkdir()
    return root / "LongBench" / "data.zip"


@pytest.mark.parametrize(("task", "end"), [("lcc", "code:\n"), ("passage_count", "is: ")])
def test_longbench_prompt_keeps_its_last_white_space(tmp_path, task, end):
    (tmp_path / "LongBench" / "data").mkdir(parents=True)
    bare = {"input": "", "context": "x = 1\n", "answers": ["2"], "all_classes": None}
    (tmp_path / "LongBench" / "data" / f"{task}.jsonl").write_text(json.dumps(bare))
    assert prompt(only(f"longbench_{task}", data_dir=tmp_path)).endswith(end)
    assert prompt(only(f"longbench_{task}", data_dir=DATA)).endswith(end)


def test_few_shot_answers_count_by_their_first_line():
    tasks = hub.load_tasks(["longbench_trec", "longbench_samsum"], data_dir=DATA)
    late = scores(tasks, lambda doc: f"\n{doc['answers'][0]}\nType: City, Dialogue: Tea?")
    assert late == pytest.approx(dict.fromkeys(tasks, 1.0))
    assert scores(tasks, lambda doc: f"Who?\n{doc['answers'][0]}")["longbench_trec"] == 0.0


def test_parquet_of_a_hub_cache_reads_like_jsonl(tmp_path):
    name = "Xnhyacinth/LongBench"
    rows = DATA / name.replace("/", "__") / "trec" / "test.jsonl"
    place = tmp_path / f"datasets--{name.replace('/', '--')}" / "snapshots" / "abc" / "trec"
    place.mkdir(parents=True)
    table = datasets.Dataset.from_list([json.loads(rows.read_text())])
    table.to_parquet(place / "test-00000-of-00001.parquet")
    same = prompt(only("longbench_trec", data_dir=tmp_path))
    assert same == prompt(only("longbench_trec", data_dir=DATA))


@pytest.mark.parametrize(
    ("task", "dataset"),
    [
        ("longbench_hotpotqa", "Xnhyacinth/LongBench"),
        ("longbench2_code", "recursal/longbench-v2"),
        ("infinitebench_passkey", "xinrongzhang2022/InfiniteBench"),
        ("babilong_qa1", "RMT-team/babilong-1k-samples"),
    ],
)
def test_without_network_or_data_the_download_is_named(task, dataset):
    command = f"hf download {dataset} --repo-type dataset --local-dir DATA_DIR/"
    with pytest.raises(FetchError, match="--data-dir") as error:
        hub.load_tasks([task])
    assert str(error.value).startswith(f"{task}: dataset {dataset}")
    assert command in str(error.value)


@pytest.mark.parametrize(
    ("task", "asked"),
    [
        ("longbench_trec", {"path": "Xnhyacinth/LongBench", "name": "trec"}),
        ("longbench2_code", {"path": "recursal/longbench-v2", "name": "code_repo_qa"}),
        (
            "infinitebench_longbook_qa_en",
            {
                "path": "xinrongzhang2022/InfiniteBench",
                "name": None,
                "data_files": {"longbook_qa_eng": "longbook_qa_eng.jsonl"},
                "split": "longbook_qa_eng",
            },
        ),
        (
            "babilong_qa7",
            {
                "path": "RMT-team/babilong-1k-samples",
                "name": "0k",
                "data_files": None,
                "split": "qa7",
            },
        ),
    ],
)
def test_the_hub_is_asked_for_one_configuration_and_split(monkeypatch, task, asked):
    source = HUB[task].tasks[task]
    if source.dataset.startswith("RMT"):
        source = replace(source, config="0k")
    documents = hub_data.read(source, DATA)

    def load_dataset(path, name=None, **options):
        assert {"path": path, "name": name, **options} == asked
        return documents if "split" in options else {source.split: documents}

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert scores({task: only(task)}, lambda doc: WRONG) == {task: 0.0}


def test_switched_off_hub_is_the_same_error(monkeypatch, reached):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="hf download Xnhyacinth/LongBench"):
        hub.load_tasks(["longbench_hotpotqa"])
    assert not reached


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("niah_single_2", "punkt_tab"),
        ("niah_single_2", "baber/paul_graham_essays"),
        ("ruler_qa_squad", "rajpurkar.github.io"),
        ("ruler_qa_hotpot", "namlh2004/hotpotqa"),
    ],
)
@pytest.mark.parametrize("data_dir", [None, DATA])
@pytest.mark.usefixtures("few_words")
def test_ruler_tasks_that_fetch_say_what_and_name_ours(folder, monkeypatch, task, says, data_dir):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked = {"tokenizer": str(folder / "model"), "max_seq_lengths": [1024]}
    with pytest.raises(FetchError, match="Our own `ruler` tasks need no network") as error:
        hub.load_tasks([task], data_dir=data_dir, metadata=asked)
    assert says in str(error.value)


def test_missing_files_are_listed(tmp_path):
    with pytest.raises(FetchError) as error:
        hub.load_tasks(["babilong_qa2"], data_dir=tmp_path)
    for name in (
        "RMT-team__babilong-1k-samples/0k/qa2-*.parquet",
        "babilong-1k-samples/data/qa2/0k.json",
    ):
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(FetchError, match="not a folder"):
        hub.load_tasks(["babilong_qa2"], data_dir=tmp_path / "none")


@pytest.mark.parametrize("line", ['{"text": "no such columns"}', "not json"])
def test_files_of_another_form_are_refused(tmp_path, line):
    (tmp_path / "LongBench").mkdir()
    (tmp_path / "LongBench" / "hotpotqa.jsonl").write_text(line + "\n")
    with pytest.raises(FetchError, match="longbench_hotpotqa: dataset Xnhyacinth/LongBench"):
        hub.load_tasks(["longbench_hotpotqa"], data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("hotpotqa.jsonl", b""),
        ("hotpotqa.jsonl", b"\n\n"),
        ("hotpotqa.jsonl", '{"context": ""}\n'.encode("utf-16")),
        ("hotpotqa.json", b"\x89PNG\r\n"),
        ("hotpotqa.parquet", b""),
        ("hotpotqa.parquet", b'{"context": ""}\n'),
        ("data.zip", b""),
        ("data.zip", b"no zip"),
    ],
)
def test_files_without_documents_are_named(tmp_path, name, content):
    file = tmp_path / "LongBench" / name
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(FetchError, match=r"longbench_hotpotqa: .* cannot be read \(") as error:
        hub.load_tasks(["longbench_hotpotqa"], data_dir=tmp_path)
    assert f"{file}: " in str(error.value)
    assert "hf download" in str(error.value)


def test_an_empty_file_in_a_zip_is_named(tmp_path):
    with zipfile.ZipFile(archive(tmp_path), "w") as packed:
        packed.writestr("hotpotqa.jsonl", "")
    with pytest.raises(FetchError, match=r"hotpotqa\.jsonl::.*data\.zip: no documents in it"):
        hub.load_tasks(["longbench_hotpotqa"], data_dir=tmp_path)


def test_missing_packages_are_named_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(hub, "_importable", lambda module: module not in ("jieba", "rouge"))
    with pytest.raises(ImportError, match=r"^longbench needs .*: pip install jieba rouge$"):
        hub.load_tasks(["longbench"])


@pytest.mark.parametrize(
    ("name", "lengths", "says"),
    [
        ("ruler_lm_eval", [512, 4096], "512 is below 1024"),
        ("ruler_vt", [], "max_seq_lengths is empty"),
        ("babilong", [3000], "no length 3000; it has 0 .0k., 1024 .1k."),
        ("babilong_qa12", [1024], "babilong_qa12 exists at length 0"),
        ("longbensh", None, "did you mean longbench"),
    ],
)
def test_impossible_wishes_are_refused_at_once(name, lengths, says):
    with pytest.raises(ValueError, match=says):
        hub.check([name], lengths)


def test_ruler_refuses_what_would_never_return(folder):
    with pytest.raises(ValueError, match="metadata needs a tokenizer"):
        hub.load_tasks(["ruler_vt"])
    with pytest.raises(ValueError, match="would never return"):
        hub.load_tasks(["ruler_vt"], metadata={"tokenizer": str(folder / "model")})


def test_ruler_runs_no_code_of_a_tokenizer(folder, tmp_path):
    """lm-eval asks for it, whatever its user says."""
    path, trace = shutil.copytree(folder / "model", tmp_path / "model"), tmp_path / "owned"
    (path / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass T: pass\n")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["own.T", "own.T"]}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for task in ("niah_single_1", "ruler_vt"):
        with pytest.raises(ValueError, match="code of its own, which is not run"):
            hub.load_tasks([task], metadata={"tokenizer": str(path), "max_seq_lengths": [1024]})
    assert not trace.exists()


def test_lengths_do_not_matter_to_benchmarks_that_have_none():
    assert [one.name for one in hub.check(["longbench2_code"], [512])] == ["longbench2"]


def test_every_task_is_lm_evals_with_its_configuration_and_split():
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(lm_eval.__file__).parent / "tasks"
    for folder in {benchmark.folder for benchmark in HUB.values()}:
        manager = lm_eval.tasks.TaskManager(include_path=root / folder, include_defaults=False)
        ours = {t: s for b in HUB.values() if b.folder == folder for t, s in b.tasks.items()}
        assert set(ours) == set(manager.all_subtasks)
        for task, source in ours.items():
            if source is None:
                continue
            theirs = load_yaml(manager.task_index[task].yaml_path, resolve_func=False)
            split = theirs["test_split"]
            if split.endswith("_en"):  # the one that lm-eval has wrong
                split += "g"
            assert source.split == split
            assert source.dataset == theirs["dataset_path"]
            if folder.startswith("longbench"):
                assert source.config == theirs["dataset_name"]


def test_truncation_is_the_authors():
    kinds = {name: HUB[name].truncation for name in ("longbench", "longbench2", "infinitebench")}
    assert set(kinds.values()) == {"middle"}
    assert HUB["babilong"].truncation is HUB["ruler_lm_eval"].truncation is None


@pytest.mark.parametrize("room", [0, 1, 2, 5, 9, 10, 99])
def test_truncate_middle_keeps_both_ends(room):
    ids = list(range(10))
    kept = hub.truncate_middle(ids, room)
    assert len(kept) == min(room, 10)
    first = room // 2
    assert room >= 10 or kept == ids[:first] + ids[10 - (room - first) :]
    with pytest.raises(ValueError, match="room must be 0 or more"):
        hub.truncate_middle(ids, -1)


def test_our_changes_cover_every_definition():
    assert {benchmark.folder for benchmark in HUB.values()} == set(hub_load._FIXES)
