"""Needle prompts: exact length, needles where they should be, prose that is never shared."""

import itertools

import pytest
from sparse_patch_eval.inputs.parts import parts
from study.needles import needle_prompt, needle_prompts

MARK = "One of the special magic numbers for "


@pytest.fixture(scope="module")
def walks(folder):
    return (folder / "walks.txt").read_text()


def decoded(prompt, tokenizer):
    # The fixture's tokenizer has no decoder: bytes of ASCII are characters of their own.
    return (
        "".join(tokenizer.convert_ids_to_tokens(prompt.input_ids[0]))
        .replace("Ġ", " ")
        .replace("Ċ", "\n")
    )


@pytest.mark.parametrize("keys", [1, 3, 8])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_every_needle_is_whole_and_before_the_scored_prose(tiny, walks, keys, depth):
    prompt = needle_prompt(tiny[1], 1500, text=walks, keys=keys, scored=100, depth=depth, seed=3)
    assert prompt.input_ids.shape == (1, 1500)
    words = decoded(prompt, tiny[1])
    scored = words[prompt.scored.start + 1 : prompt.scored.stop + 1]
    assert len(scored) == 100
    assert scored in walks
    question = words[prompt.scored.stop + 1 :]
    assert question.startswith("\n\nWhat is the special magic number")
    before = words[: prompt.scored.start + 1]
    numbers = [prompt.answer, *prompt.others]
    assert len(set(numbers)) == 8
    assert [before.count(f" is: {number}.\n") for number in numbers] == [1] * keys + [0] * (
        8 - keys
    )
    assert before.count(MARK) == keys
    asked = question.rsplit("\n", 1)[1]
    assert f"{asked} {prompt.answer}.\n" in before


def test_depth_moves_the_needle_that_is_asked_for(tiny, walks):
    places = []
    for depth in (0.0, 0.5, 1.0):
        prompt = needle_prompt(tiny[1], 2000, text=walks, keys=1, scored=50, depth=depth, seed=1)
        places.append(decoded(prompt, tiny[1]).index(MARK))
    assert places[0] == 1
    assert places[2] > places[1] + 500 > places[0] + 1000


def test_the_prose_around_the_needles_is_one_window(tiny, walks):
    prompt = needle_prompt(tiny[1], 1500, text=walks, keys=2, scored=50, seed=5)
    words = decoded(prompt, tiny[1]).split("\n\nWhat is")[0]
    pieces = [
        piece.split(".\n", 1)[-1] if n else piece
        for n, piece in enumerate(words.split("\n" + MARK))
    ]
    assert "".join(pieces) in walks


@pytest.mark.parametrize(
    "change", [{"keys": 0}, {"keys": 9}, {"depth": 1.5}, {"depth": float("nan")}]
)
def test_options_out_of_range_are_errors(tiny, walks, change):
    with pytest.raises(ValueError, match=r"keys=.* depth="):
        needle_prompt(tiny[1], 1500, **{"text": walks, "keys": 1, "scored": 50, **change})


def test_too_short_a_length_says_how_much_is_needed(tiny, walks):
    with pytest.raises(ValueError, match="length 600 is too short") as error:
        needle_prompt(tiny[1], 600, text=walks, keys=8, scored=50)
    least = int(str(error.value).split("need ")[1].split()[0])
    made = needle_prompt(tiny[1], least, text=walks, keys=8, scored=50)
    assert made.input_ids.shape == (1, least)
    with pytest.raises(ValueError, match="too short"):
        needle_prompt(tiny[1], least - 1, text=walks, keys=8, scored=50)


def test_parts_share_nothing_and_a_quarter_is_held_back(walks):
    kept, back = parts(walks, 1000), parts(walks, 1000, held_back=True)
    assert len(back) == (len(kept) + len(back)) // 4
    assert len(kept) + len(back) == len(walks) // 6000
    places = sorted(walks.index(part) for part in kept + back)
    assert all(b - a >= 6000 for a, b in itertools.pairwise(places))
    assert kept != parts(walks, 1000, seed=1)


def test_prompts_take_texts_and_numbers_of_keys_by_turns(tiny, walks):
    texts = {"a": walks[:90000], "b": walks[90000:]}
    made = needle_prompts(tiny[1], 1000, 6, texts=texts, scored=50)
    assert [prompt.text for prompt in made] == ["a", "b"] * 3
    assert [prompt.keys for prompt in made] == [1, 1, 8, 8, 1, 1]
    assert len({prompt.answer for prompt in made}) == 6
    fewer = needle_prompts(tiny[1], 1000, 3, texts=texts, scored=50)
    for a, b in zip(fewer, made, strict=False):
        assert a.input_ids.equal(b.input_ids)


def test_prompts_that_are_held_back_share_nothing_with_the_others(tiny, walks):
    made = needle_prompts(tiny[1], 1000, 4, texts={"a": walks}, scored=50)
    back = needle_prompts(tiny[1], 1000, 4, texts={"a": walks}, scored=50, held_back=True)
    assert not {p.answer for p in made} & {p.answer for p in back}
    scored = [decoded(p, tiny[1])[p.scored] for p in (*made, *back)]
    assert len(set(scored)) == 8


def test_a_text_without_room_for_the_prompts_is_named(tiny, walks):
    with pytest.raises(ValueError, match="text 'a' has room for 2 disjoint prompts of 1000 tokens"):
        needle_prompts(tiny[1], 1000, 3, texts={"a": walks[:13000]}, scored=50)


@pytest.mark.parametrize(("held_back", "least"), [(False, "6,000"), (True, "24,000")])
def test_a_text_without_room_for_one_prompt_says_what_one_takes(tiny, walks, held_back, least):
    options = {"texts": {"a": walks[:5999]}, "scored": 50, "held_back": held_back}
    with pytest.raises(
        ValueError, match=rf"'a' is too short .* 5,999 characters, and {least} are needed"
    ):
        needle_prompts(tiny[1], 1000, 3, **options)
    options["texts"] = {"a": walks[: int(least.replace(",", ""))]}
    assert len(needle_prompts(tiny[1], 1000, 1, **options)) == 1
