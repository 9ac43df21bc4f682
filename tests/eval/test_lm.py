"""The lm-eval model: its answers, its errors, what it writes down. No network."""

import json
import re
from pathlib import Path

import pytest
import torch
from sparse_patch_eval.ask.answer import answer
from sparse_patch_eval.inputs import models
from sparse_patch_eval.lm_eval_model import __main__ as lm_cli
from sparse_patch_eval.lm_eval_model.model import SparsePatchLM
from sparse_patch_eval.lm_eval_model.options import PatchOptions, read_method
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparse_patch
from tests.eval.lm_models import CONTEXTS, PAIRS, SPARSE, TASKS, instances, save_tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of lm-eval's dependencies
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("lm") / "tiny"))


@pytest.fixture(scope="module")
def reference(model):
    """What lm-eval's own model answers."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(model, device="cpu", dtype="float32")


def scores(lm, pairs=PAIRS):
    return lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for (ours, greedy), (theirs, is_greedy) in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert greedy == is_greedy


# --- methods and options in text -----------------------------------------------------------------


def test_a_method_is_read_in_every_form():
    wanted = sparse_patch.get_method("flexprefill", gamma=0.95, min_budget=512)
    same = (
        read_method("flexprefill:gamma=0.95;min_budget=512"),
        read_method("flexprefill:gamma=0.95,min_budget=512"),
        read_method("flexprefill:gamma=0.95", {"min_budget": 512}),
        read_method({"name": "flexprefill", "gamma": 0.95, "min_budget": 512}),
    )
    assert all(found == ("flexprefill:gamma=0.95,min_budget=512", wanted) for found in same)
    assert read_method(wanted)[1] is wanted
    assert read_method("dense") == ("dense", None)
    assert read_method("pbs", {"tau": [0.9, 0.8]})[1].tau == (0.9, 0.8)


@pytest.mark.parametrize("split", ["words", "one", "json", "simple"])
def test_the_spelling_survives_lm_evals_parsers(split):
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import simple_parse_args_string

    words = ["pretrained=x", "method=a_shape:sink=4;window=16", "patch_layers=0;-1"]
    line = {
        "words": words,
        "one": [",".join(words)],
        "json": [json.dumps(dict(word.split("=", 1) for word in words))],
        "simple": None,
    }[split]
    if line is None:
        found = simple_parse_args_string(",".join(words))
    else:
        parser = HarnessCLI()._parser
        found = parser.parse_args(["run", "--tasks", "t", "--model_args", *line]).model_args
    assert read_method(found["method"])[1] == sparse_patch.get_method("a_shape", sink=4, window=16)
    assert PatchOptions.read(found["patch_layers"], *[None] * 5).layers == (0, -1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "flexprefil"}, "did you mean 'flexprefill'"),
        ({"method": "flexprefill:gamma=2"}, "gamma=2"),
        ({"method": "flexprefill:gamma=.9", "method_args": {"gamma": 1}}, "gamma is given"),
        ({"method": {"gamma": 1}}, "lacks the method's name"),
        ({"method": 3}, "method=3 must be"),
        ({"method_args": 3}, "method_args=3 must map"),
        ({"min_length": -1}, "min_length=-1 must be"),
        ({"patch_layers": "first"}, "patch_layers='first' must be"),
        ({"continuation": "both"}, "continuation='both' must be one of"),
        ({"softmax_dtype": "bfloat16"}, "softmax_dtype"),
        ({"pretrained": "/nowhere.gguf", "tp_plan": "auto"}, "tp_plan cannot be used with"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SparsePatchLM(**{"pretrained": "/no/such/model", **options})


def test_processes_that_share_the_data_do_not_look_for_several_batch_sizes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="batch_size=auto:4 needs one process"):
        SparsePatchLM("/no/such/model", batch_size="auto:4")


# --- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("continuation", "batch_size"),
    [("decode", 1), ("decode", 4), ("prefill", 1), ("prefill", 4), ("prefill", "auto:3")],
)
def test_unpatched_likelihoods_are_those_of_hflm(model, reference, continuation, batch_size):
    options = {"continuation": continuation, "batch_size": batch_size, "max_batch_size": 4}
    lm = SparsePatchLM(model, **options)
    assert_same(scores(lm), scores(reference))
    rolling = instances("loglikelihood_rolling", [(text * 4,) for text in CONTEXTS])
    assert lm.loglikelihood_rolling(rolling) == pytest.approx(
        reference.loglikelihood_rolling(rolling), abs=1e-3
    )
    lm.tokenizer.padding_side = "left"
    asked = instances("generate_until", [(text, {"max_gen_toks": 5}) for text in CONTEXTS])
    assert lm.generate_until(asked) == reference.generate_until(asked)


@pytest.mark.parametrize("continuation", ["decode", "prefill"])
def test_what_is_too_long_is_cut_as_hflm_cuts_it(model, continuation, caplog):
    from lm_eval.models.huggingface import HFLM

    lm = SparsePatchLM(model, max_length=50, continuation=continuation, batch_size=2)
    assert_same(scores(lm), scores(HFLM(model, device="cpu", max_length=50)))
    assert "max_length is 50" in caplog.text
    with pytest.raises(ValueError, match=r"continuation of 1 to 50"):
        scores(lm, [("a", "b" * 51)])


def test_padding_is_nothing_to_a_method(model):
    """FlexPrefill probes the last queries: with padding there, it would choose by padding."""
    options = {**SPARSE, "method": "flexprefill:gamma=0.7;block_size=16;min_budget=16"}
    alone = SparsePatchLM(model, continuation="prefill", **options)
    batched = SparsePatchLM(model, continuation="prefill", batch_size=6, **options)
    assert_same(scores(batched), scores(alone))
    assert scores(alone) != scores(SparsePatchLM(model)), "the method changes nothing here"
    asked = instances("generate_until", [(text, {"max_gen_toks": 8}) for text in CONTEXTS])
    assert batched.generate_until(asked) == alone.generate_until(asked)


def test_an_answer_is_decoded_from_one_sparse_prefill_of_its_context(model):
    lm = SparsePatchLM(model, **SPARSE)
    found = scores(lm)
    contexts = len({context for context, _ in PAIRS})
    assert lm.sparse_patch_info()["prefill"]["calls"] == contexts * 3
    assert lm.sparse_patch_info()["prefill"]["exact"] == {"decode": 3, "method": 3}, (
        "one token in place of an empty context, and a context that is all window"
    )
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    method = sparse_patch.get_method("a_shape", sink=4, window=16, block_size=16)
    for (context, continuation), score in zip(PAIRS[:10], found, strict=False):
        ids, wanted = lm.encode_pair(context, continuation)
        options = {"min_length": 0, "min_queries": 8}
        expected = answer(
            plain, lm.tokenizer, ids, method=method, patch_options=options, continuations=[wanted]
        )
        assert_same([score], expected.scores)


def test_encoding_follows_lm_eval(model, reference):
    lm = SparsePatchLM(model)
    assert lm.encode_context("a mill") == reference.tok_encode("a mill")
    assert lm.encode_pair("a mill ", "!b") == reference._encode_pair("a mill ", "!b")
    assert lm.encode_pair("", "b!") == ([lm.prefix_token_id], reference.tok_encode("b!"))
    assert lm.encode_context("") == [lm.prefix_token_id]


def test_answers_are_cached_by_lm_eval(model, tmp_path):
    from lm_eval.api.model import CachingLM

    lm = SparsePatchLM(model, **SPARSE)
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    asked = instances("loglikelihood", PAIRS)
    first = cached.loglikelihood(asked)
    calls = lm.sparse_patch_info()["prefill"]["calls"]
    assert cached.loglikelihood(asked) == first
    assert lm.sparse_patch_info()["prefill"]["calls"] == calls


def test_a_loaded_model_works_too(model):
    loaded = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    lm = SparsePatchLM(loaded, tokenizer=tokenizer, **SPARSE)
    assert_same(scores(lm), scores(SparsePatchLM(model, **SPARSE)))
    assert lm.is_writer
    density = lm.sparse_patch_info()["density"]
    lm.unpatch()
    assert_same(scores(lm), scores(SparsePatchLM(model)))
    assert lm.sparse_patch_info()["density"] == density < 1
    assert not loaded._forward_hooks
    assert not loaded._forward_pre_hooks
    assert lm.share([1, 2]) == [1, 2]


def test_names_of_our_command_line_are_models_too(model, monkeypatch):
    monkeypatch.setattr(models, "smollm2", lambda _: Path(model))
    assert_same(scores(SparsePatchLM("smollm2")), scores(SparsePatchLM(model)))
    asked = {}

    def load(name, **options):
        asked.update(options, name=name)
        return AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    monkeypatch.setattr(models, "load", load)
    found = scores(SparsePatchLM("a/tiny.gguf", dtype="float32", **SPARSE))
    assert asked == {"name": "a/tiny.gguf", "dtype": "float32", "device": "cpu"}
    assert_same(found, scores(SparsePatchLM(model, **SPARSE)))


def test_an_adapter_is_patched_with_its_model(model, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
    tuned.save_pretrained(tmp_path)
    lm = SparsePatchLM(model, peft=str(tmp_path), **SPARSE)
    merged = tuned.merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert_same(scores(lm), scores(SparsePatchLM(merged, tokenizer=tokenizer, **SPARSE)))
    assert scores(lm) != scores(SparsePatchLM(model, **SPARSE))
    assert lm.sparse_patch_info()["density"] < 1


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_laid_out_by_device_map_gives_the_same_numbers(model, place, tmp_path):
    layout = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": place,
        "model.layers.2": place,
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    options = (
        {"device_map": layout, "offload_folder": str(tmp_path)}
        if place == "disk"
        else {"device_map": {"": "cpu"}}
    )
    lm = SparsePatchLM(model, **SPARSE, **options)
    if place == "disk":
        assert lm.model.model.layers[2].mlp.up_proj.weight.device.type == "meta"
    assert_same(scores(lm), scores(SparsePatchLM(model, **SPARSE)))


def test_recall_and_layers_are_as_asked(model):
    lm = SparsePatchLM(model, **SPARSE, measure_recall=4, patch_layers="1;-1", dense_layers=2)
    scores(lm)
    info = lm.sparse_patch_info()
    assert info["patch"]["layers"] == (1, -1)
    first, last = info["prefill"]["layers"]
    assert (first["layer"], last["layer"]) == (1, 2)
    assert first["density"] == 1
    assert first["exact"]["layer kept dense"] > 0
    assert 0 < last["sparse_density"] < 1
    assert 0 < last["recall"] < 1
    assert info["density"] == pytest.approx((1 + last["density"]) / 2)


def test_generated_tokens_and_trial_batches_do_not_count_as_prefill(model):
    lm = SparsePatchLM(model, **SPARSE, batch_size="auto", max_batch_size=2)
    lm.generate_until(instances("generate_until", [(CONTEXTS[0], {"max_gen_toks": 5})]))
    prefill = lm.sparse_patch_info()["prefill"]
    assert prefill["calls"] == prefill["sparse_calls"] == 3


# --- lm-eval's command line ----------------------------------------------------------------------


def test_lm_evals_command_line_writes_down_what_the_method_did(model, tmp_path, monkeypatch):
    arguments = [
        "--model", "sparse_patch", "--tasks", "sp_choice,sp_write,sp_perplexity",
        "--model_args", f"pretrained={model},method={SPARSE['method']},min_length=0,min_queries=8",
        "--include_path", str(TASKS), "--output_path", str(tmp_path), "--batch_size", "4",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["lm-eval", "run", *arguments])
    lm_cli.main()
    (file,) = tmp_path.rglob("results_*.json")
    written = json.loads(file.read_text())
    assert 0 <= written["results"]["sp_choice"]["acc,none"] <= 1
    assert written["results"]["sp_perplexity"]["word_perplexity,none"] > 1
    about = written["config"]["sparse_patch"]
    assert about["method"] == "a_shape:sink=4,window=16,block_size=16"
    assert about["params"]["sink"] == 4
    assert about["patch"] == {"min_length": 0, "min_queries": 8}
    assert about["prefill"]["calls"] == 3 * 3 * 5  # layers, tasks, documents
    assert 0 < about["density"] < 1
    assert [layer["layer"] for layer in about["prefill"]["layers"]] == [0, 1, 2]
    assert about["machine"]["torch"] == torch.__version__


def test_our_tasks_are_found_without_a_word(tmp_path):
    given = ["run", "--tasks", "x"]
    assert lm_cli.with_our_tasks(given, tmp_path) == [*given, "--include_path", str(tmp_path)]
    assert lm_cli.with_our_tasks(given[1:], tmp_path) == [*given, "--include_path", str(tmp_path)]
    for own in (["--include_path=/x"], ["--config", "f.yaml"], ["-C", "f.yaml"]):
        assert lm_cli.with_our_tasks([*given, *own], tmp_path) == [*given, *own]
    unsafe = [*given, "--confirm_run_unsafe_code"]
    assert lm_cli.with_our_tasks(unsafe, tmp_path)[-1] == str(tmp_path)
    assert lm_cli.with_our_tasks(given, tmp_path / "none") == given
    assert lm_cli.with_our_tasks(["run"], tmp_path) == ["run"]


@pytest.mark.parametrize(("rank", "result"), [("0", {"results": 1}), ("1", None)])
def test_only_the_first_process_has_results_to_write(rank, result, monkeypatch):
    import lm_eval
    import lm_eval.__main__

    found = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("sys.argv", ["lm-eval"])
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda: {"results": 1}, raising=False)
    run = lambda: found.append(lm_eval.simple_evaluate())  # noqa: E731
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", run)
    lm_cli.main()
    assert found == [result]
