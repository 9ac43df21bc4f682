"""A method as text: one spelling, in Python as on the command line."""

import json
import re

import pytest

from sparse_patch import Profile, get_method
from sparse_patch.spelling import join_list, literal, spec_of, split_list, split_method


@pytest.mark.parametrize(
    ("text", "params"),
    [
        ("flexprefill", {}),
        (
            "flexprefill: gamma=0.95, max_budget=None,variant=corrected",
            {"gamma": 0.95, "variant": "corrected"},
        ),
        ("strided:preset=fine", {"preset": "fine"}),
        ("strided:preset=fine,gamma=0.93", {"preset": "fine", "gamma": 0.93}),
        ("pbs:segment=128", {"segment": 128}),
    ],
)
def test_a_method_is_read_with_its_parameters(text, params):
    assert get_method(text) == get_method(text.partition(":")[0], **params)


def test_keywords_override_what_the_text_says():
    fine = get_method("strided", preset="fine")
    assert get_method("strided:preset=fine,gamma=0.5", gamma=0.9) == fine
    assert get_method("strided:gamma=0.8", preset="fine") == get_method(
        "strided", preset="fine", gamma=0.8
    )
    assert get_method("pbs:preset=nosuch", preset="plus") == get_method("pbs", preset="plus")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flexprefil", "did you mean 'flexprefill'"),
        ("flexprefil:gamma=0.9", "unknown method 'flexprefil'; did you mean 'flexprefill'"),
        ("", "unknown method ''"),
        ("flexprefill:gamma", "method 'flexprefill:gamma': 'gamma' must be key=value"),
        ("flexprefill:gamma=", "must be key=value"),
        ("flexprefill:gamma=2", "gamma=2"),
        ("flexprefill:gama=1", "did you mean 'gamma'"),
        ("strided:preset=fin", "strided has no preset 'fin'; did you mean 'fine'?"),
        ("strided:preset=1", "strided has no preset 1"),
        (
            "xattention:thresholds=a,b.json,gamma=0.5",
            "'b.json' must be key=value, as in flexprefill:gamma=0.9; "
            "write a comma inside a value as \\,",
        ),
    ],
)
def test_a_bad_text_is_named(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        get_method(spec)


@pytest.mark.parametrize(
    "params", [{}, {"gamma": 0.9}, {"a": None, "b": True, "c": (1, 2.5)}, {"path": "a,b c"}]
)
def test_a_text_says_what_it_was_made_of(params):
    assert split_method(spec_of("name", params)) == ("name", params)


@pytest.mark.parametrize(
    "parts", [[], ["a"], ["a", "b c"], ["a,b", ",", "c,,d,"], ["C:\\x", "\\\\y,z", "(1", "2)"]]
)
def test_a_list_reads_as_it_was_written(parts):
    assert split_list(join_list(parts)) == parts
    assert split_list(" , ".join(join_list([part]) for part in parts)) == parts


def test_values_are_pythons_or_yamls_or_text():
    texts = ["0.9", "None", "True", "true", "false", "(1,2)", "__import__('os')", "1+"]
    assert list(map(literal, texts)) == [
        0.9, None, True, True, False, (1, 2), "__import__('os')", "1+",
    ]  # fmt: skip


def test_a_profile_cannot_hide_a_file_in_a_methods_name():
    """The check of its files reads the parameters, not the name."""
    model = {"type": "llama", "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8}
    share = {"heads": [0], "method": "xattention:thresholds=x.json", "params": {}}
    content = Profile(model, {}).to_dict()
    content["layers"] = {"0": [share]}
    with pytest.raises(ValueError, match="unknown method 'xattention:thresholds"):
        Profile.from_dict(json.loads(json.dumps(content)))
