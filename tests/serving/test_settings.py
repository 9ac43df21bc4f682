"""What a user asks of an engine is checked, in words, before anything is loaded."""

import json
import re

import pytest

from sparse_patch import Profile, get_method
from sparse_patch.profiles import Auto, Share
from sparse_patch.serving.settings import Settings

SHAPE = {"type": "llama", "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32}


def profile():
    return Profile(SHAPE, {1: (Share.of((0, 2), "strided", {"preset": "fine"}),)})


def test_a_string_is_the_method():
    assert Settings.read("strided:preset=fine") == Settings(method="strided:preset=fine")


def test_settings_survive_the_way_to_another_process():
    asked = {"method": "hip:preset=paper", "layers": [0, -1], "dense_layers": [0], "min_length": 9}
    settings = Settings.read(asked)
    assert Settings.read(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "stridet"}, "did you mean 'strided'"),
        ({"method": "strided:sride=8"}, "strided has no parameter"),
        ({"method": "strided:preset=fin"}, "did you mean 'fine'"),
        ({"method": "strided:preset"}, "must be key=value"),
        ({"method": 3}, "must be text"),
        ({"methods": "strided"}, "does not know methods"),
        ({}, 'give a "method" or a "profile"'),
        ({"method": "dense", "profile": {}}, "not both"),
        ({"method": "dense", "min_length": "auto"}, "min_length='auto' must be a number"),
        ({"method": "dense", "min_length": -1}, "min_length=-1"),
        ({"method": "dense", "min_queries": 0.5}, "min_queries=0.5"),
        ({"method": "dense", "layers": [4]}, "no attention layer [4]"),
        ({"method": "dense", "layers": 1}, "must be a list of indices"),
        ({"method": "dense", "dense_layers": "two"}, "dense_layers='two'"),
        ({"profile": {"format": "none"}}, "make one with `sparse-patch tune`"),
        ([1], "must be a method"),
    ],
)
def test_what_does_not_exist_is_named(asked, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings.read(asked).choose(SHAPE, processes=1)


def test_layers_are_chosen_as_in_patch():
    choice = Settings.read({"method": "dense", "layers": [1, -1], "dense_layers": [1]})
    choice = choice.choose(SHAPE, 1)
    assert choice.layers == {1, 3}
    assert choice.of_layer(1) is None
    assert choice.of_layer(3) == get_method("dense")
    assert Settings.read({"method": "dense", "dense_layers": 2}).choose(SHAPE, 1).dense == {0, 1}


def test_a_profile_travels_without_its_file(tmp_path):
    profile().save(tmp_path / "profile.json")
    settings = Settings.read({"profile": str(tmp_path / "profile.json")})
    (tmp_path / "profile.json").unlink()
    choice = Settings.read(settings.to_dict()).choose(SHAPE, 1)
    assert choice.of_layer(1) == Auto(profile=profile()).for_layer(1)


def test_a_profile_of_another_model_and_methods_of_all_heads_are_refused():
    settings = Settings.read({"profile": profile().to_dict()})
    with pytest.raises(ValueError, match="made for another model"):
        settings.choose({**SHAPE, "heads": 8}, 1)
    with pytest.raises(ValueError, match="split over 2 processes"):
        settings.choose(SHAPE, 2)
