"""Files that the user names: whatever is in them, option and path are named, and what to do."""

import codecs
import gzip
import os
import re

import pytest
import yaml
from sparse_patch_eval.base import text_file
from sparse_patch_eval.base.text_file import read_text
from sparse_patch_eval.cli.app import app
from sparse_patch_eval.inputs.text import long_text
from sparse_patch_eval.lm_eval_model.options import read_method
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from sparse_patch import Profile, get_method
from sparse_patch.spelling import spec_of

WORDS = "Prose of a few words, naïve.\n"
# Content, and what is said of it.
ODD = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\t\r\n\xc2\xa0", "holds white space only"),
    "mark": (codecs.BOM_UTF8, "is empty"),
    "marked blank": (codecs.BOM_UTF8 + b"\n", "holds white space only"),
    "utf16": (
        WORDS.encode("utf-16"),
        "is not UTF-8 but UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    ),
    "utf16be": (
        codecs.BOM_UTF16_BE + WORDS.encode("utf-16-be"),
        "is not UTF-8 but UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    ),
    "utf32": (
        WORDS.encode("utf-32"),
        "is not UTF-8 but UTF-32: convert it with `iconv -f UTF-32 -t UTF-8`",
    ),
    "utf16 unmarked": ("plain\n".encode("utf-16-le"), "holds NUL characters"),
    "latin1": (WORDS.encode("latin-1"), "is not UTF-8 (invalid"),
    "cut": (WORDS.encode()[:-5], "is not UTF-8 (unexpected end of data at byte 24)"),
    "gzip": (gzip.compress(WORDS.encode()), "is not UTF-8 (invalid"),
    "binary": (b"\x7fELF\x02\x01\x01\x00\x00", "holds NUL characters"),
}


def run(*arguments):
    """What a command said that ended as one with a bad option ends."""
    done = CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return " ".join(done.output.replace("│", " ").split())


# --- the reader ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_text_is_refused_by_option_and_path(tmp_path, name):
    content, message = ODD[name]
    file = tmp_path / f"{name}.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^--prompt: {re.escape(f'{file} {message}')}"):
        read_text(file, "--prompt")


@pytest.mark.parametrize("path", ["gone.txt", "", "~no-such-user/x.txt", "file.txt/x", "x" * 300])
def test_what_cannot_be_read_is_named(tmp_path, path):
    (tmp_path / "file.txt").write_text(WORDS)
    path = path if path.startswith("~") else tmp_path / path
    with pytest.raises(ValueError, match="cannot be read") as error:
        read_text(path, "--config")
    assert str(error.value).startswith(f"--config: {path} cannot be read (")


def test_a_file_without_permission_is_named(tmp_path):
    file = tmp_path / "secret.txt"
    file.write_text(WORDS)
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("root reads every file")
    with pytest.raises(ValueError, match=r"secret\.txt cannot be read \(Permission denied\)"):
        read_text(file, "--text")


def test_a_file_without_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(text_file, "MOST_BYTES", 1 << 16)
    with pytest.raises(ValueError, match="/dev/zero is longer than 65,536 bytes"):
        read_text("/dev/zero", "--text")


def test_marks_and_line_ends_of_other_systems_are_no_part_of_a_text(tmp_path):
    file = tmp_path / "a text, from elsewhere.txt"
    file.write_bytes(codecs.BOM_UTF8 + "ä\r\nb\rc\n\ufeffd\u2028e".encode())
    assert read_text(file, "--text") == "ä\nb\nc\n\ufeffd\u2028e"


def test_a_pipe_is_read_too():
    reads, writes = os.pipe()
    os.write(writes, WORDS.encode())
    os.close(writes)
    assert read_text(f"/dev/fd/{reads}", "--prompt") == WORDS
    os.close(reads)


@pytest.mark.parametrize("name", [3, None, ("a", "b"), "kvj", "", "~"])
def test_what_is_no_name_of_a_text_is_shown(name):
    with pytest.raises(ValueError, match=re.escape(f"haystack: unknown text {name!r}: use kjv")):
        long_text(name, option="haystack")


# --- every option that takes such a file, before the model is looked for -------------------------

OPTIONS = {
    "inspect --prompt": "inspect --prompt FILE",
    "inspect --text": "inspect --text FILE",
    "demo --text": "demo --text FILE",
    "tune --text": "tune --output OUT --text FILE",
    "tune --held-out-text": "tune --output OUT --text GOOD --held-out-text FILE",
    "eval --tasks": "eval --lengths 2k --output OUT --tasks perplexity_FILE",
    "eval --task-arg haystack": (
        "eval --lengths 2k --output OUT --tasks niah --task-arg haystack=FILE"
    ),
    "eval --config": "eval --output OUT --config FILE",
}


@pytest.mark.parametrize("command", OPTIONS)
@pytest.mark.parametrize("name", [*ODD, "folder", "gone"])
def test_a_bad_file_ends_a_command_before_its_model_is_loaded(tmp_path, name, command):
    content, message = ODD.get(name, (None, "cannot be read ("))
    file, good = tmp_path / "file", tmp_path / "good"
    good.write_text(WORDS)
    if name == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    words = [
        word.replace("FILE", str(file)).replace("GOOD", str(good)).replace("OUT", f"{tmp_path}/out")
        for word in OPTIONS[command].split()
    ]
    said = run(*words, "--model", "./no/such/model")
    option = command.split(" ", 1)[1]
    assert re.search(rf"error: {option}( \(.*\))?: {re.escape(f'{file} {message}')}", said), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "\n", '{"heads": '.encode("utf-16"), b"\xff\xfe\x00\x00"])
def test_json_that_is_no_text_is_named_by_those_who_read_it(tmp_path, content):
    file = tmp_path / "odd.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=re.escape(f"profile {file}: not JSON")):
        Profile.load(file)
    said = run("inspect", "--method", f"xattention:thresholds={file}", "--model", "./no/such/model")
    assert f"XAttention: thresholds: '{file}' is not JSON: " in said


def test_json_with_a_byte_order_mark_is_json(tmp_path):
    file = tmp_path / "marked.json"
    file.write_bytes(codecs.BOM_UTF8 + b"[[0.5, 0.25]]")
    assert get_method("xattention", thresholds=str(file)).for_layer(0).gamma == (0.5, 0.25)


def test_the_home_of_nobody_is_a_path_like_any_other():
    where = "~no-such-user/x"
    assert where in run("inspect", "--method", f"xattention:thresholds={where}")
    assert where in run("demo", "--text", "stdlib", "--lengths", "2k", "--model", where)
    assert where in run(
        *("eval", "--tasks", "longbench2", "--data-dir", where, "--model", "./no/such/model")
    )


@pytest.mark.parametrize(
    "text",
    [
        "limit: 2020-13-45",
        "limit: !!float x",
        "limit: !!bool maybe",
        "limit: !!timestamp never",
        "? [a]\n: {b: [",
        "[" * 10**5,
        "# nothing is said\n",
        "---\n--- \na: 1\n",
    ],
)
def test_a_config_that_python_cannot_make_values_of_is_named(tmp_path, text):
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    assert "odd.yaml" in run("eval", "--config", file, "--model", "./no/such/model")


# --- texts that are there, but too short ---------------------------------------------------------


def test_a_prompt_without_a_token_is_named(folder, tmp_path):
    """A tokenizer may drop what is a character to Python."""
    path = tmp_path / "model"
    path.symlink_to(folder / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace("\u200b", "")
    path.unlink()
    path.mkdir()
    for file in (folder / "model").iterdir():
        (path / file.name).symlink_to(file)
    for file in path.glob("tokenizer*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(path)
    prompt = tmp_path / "invisible.txt"
    prompt.write_text("\u200b" * 9, encoding="utf-8")
    said = run("inspect", "--model", path, "--prompt", prompt, "--output", tmp_path / "out")
    assert f"--prompt: {prompt} is empty for this model" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", ["0", "1", "20"])
def test_a_text_too_short_for_one_sample_is_not_helped_by_a_smaller_limit(tmp_path, limit):
    (tmp_path / "short").write_text("A word. " * 1500)
    said = run(
        *("eval", "--tasks", f"perplexity_{tmp_path / 'short'}", "--lengths", "2k"),
        *("--limit", limit, "--model", "./no/such/model"),
    )
    assert f"the text '{tmp_path / 'short'}' is too short for a prompt of 2048 tokens" in said
    assert "12,000 characters, and 12,288 are needed" in said
    assert "--limit" not in said


def test_a_text_too_short_for_all_samples_says_how_many_it_has_room_for(tmp_path):
    (tmp_path / "short").write_text("A word. " * 4000)
    words = ["eval", "--tasks", f"perplexity_{tmp_path / 'short'}", "--lengths", "2k"]
    words += ["--model", "./no/such/model"]
    assert "--limit 2 or less" in run(*words, "--limit", "3")
    assert "no/such/model" in run(*words, "--limit", "2")
    assert "no/such/model" in run(*words, "--limit", "0")


def test_a_demo_whose_text_ends_before_its_longest_prompt_times_nothing(folder, monkeypatch):
    monkeypatch.setattr("sparse_patch_eval.cli.demo.warm_up", lambda *_: pytest.fail("timed"))
    (folder / "short.txt").write_text("A word. " * 250)
    said = run(
        *("demo", "--model", folder / "model", "--text", folder / "short.txt"),
        *("--lengths", "1k,3k", "--method", "dense"),
    )
    assert "text is too short for length" in said


# --- commas --------------------------------------------------------------------------------------


def test_a_comma_in_a_path_of_tasks_is_sayable(tmp_path):
    file = tmp_path / "one, two.txt"
    file.write_text("A word. " * 9)
    words = ["eval", "--lengths", "2k", "--model", "./no/such/model"]
    name = f"perplexity_{file}"
    escaped = name.replace(",", "\\,")
    for tasks in (escaped, f"passkey, {escaped} ,niah"):
        assert f"the text '{file}' is too short" in run(*words, "--tasks", tasks)
    cut = run(*words, "--tasks", name)
    assert f"{tmp_path / 'one'} cannot be read" in cut
    assert "a comma in a path is written `\\,`" in cut


def test_a_comma_in_a_list_of_a_config_is_part_of_its_entry(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one,two.txt").write_text("A word. " * 9)
    options = {"tasks": ["passkey", "perplexity_./one,two.txt"], "lengths": ["2k", 4096]}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(options))
    said = run("eval", "--config", "eval.yaml", "--model", "./no/such/model")
    assert "the text './one,two.txt' is too short for a prompt of 2048" in said


@pytest.mark.parametrize("tasks", ["perplexity_a\\,/../../x", ["perplexity_a,/../../x"]])
def test_a_comma_hides_no_path_of_a_config(tmp_path, tasks):
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    said = run("eval", "--config", tmp_path / "eval.yaml", "--model", "./no/such/model")
    assert "'a,/../../x' leads out of the current folder" in said


@pytest.mark.parametrize("name", ["a,b", "a, b c", "a;b", "(a,b", "a),b", 'o\'brien, "x"', "k=v,w"])
def test_a_methods_file_may_have_any_name(tmp_path, name):
    file = tmp_path / f"{name}.json"
    file.write_text("[[0.5]]")
    wanted = get_method("xattention", thresholds=str(file), block_size=64)
    spec = spec_of("xattention", {"thresholds": str(file), "block_size": 64})
    assert get_method(spec) == wanted
    assert read_method(spec.replace(";", "\\;"))[1] == wanted
    assert read_method("xattention:block_size=64", {"thresholds": str(file)})[1] == wanted
