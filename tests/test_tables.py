"""Tables of methods: whatever a file holds, it is taken whole or refused by its name."""

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_patch import get_method
from tests.drawn import ANY, places

XATTENTION = [[0.9, 0.8, 0.7, 0.6], [0.5, 0.5, 0.5, 0.5]]
MINFERENCE = [
    {"0": ["vertical_and_slash", 30, 50, 0.9], "3": ["block_sparse", 2, 0, 1.0]},
    {"1": ["stream_llm", 16, 64, 0.5]},
]
TABLES = {"xattention": ("thresholds", XATTENTION), "minference": ("patterns", MINFERENCE)}


@pytest.mark.parametrize("method", TABLES)
@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_table_plans_or_is_refused_by_name(tmp_path, method, data):
    """One value is another, or a few bytes of the text are."""
    name, table = TABLES[method]
    path, made = tmp_path / "table.json", copy.deepcopy(table)
    *way, last = data.draw(st.sampled_from(list(places(table))[1:]))
    inner = made
    for step in way:
        inner = inner[step]
    inner[last] = data.draw(ANY)
    text = json.dumps(made)
    if data.draw(st.booleans()):
        start, left_out = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 9))
        text = text[:start] + data.draw(st.text(max_size=3)) + text[start + left_out :]
    path.write_text(text, encoding="utf-8", errors="replace")
    q, k = torch.ones(4, 256, 8), torch.ones(2, 256, 8)
    try:
        found = get_method(method, **{name: str(path)}).for_layer(0)
    except ValueError as error:
        assert "table.json" in str(error)  # noqa: PT017 - most drawn files raise, some load
        return
    try:
        found.plan(q, k, scale=0.3, q_offset=0)
    except ValueError as error:
        assert "head" in str(error)  # noqa: PT017 - a head that this layer has not


@pytest.mark.parametrize("method", TABLES)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[NaN]", "NaN is not a finite number"),
        ("[" * 10**5, "nested too deeply"),
        ('[{"0": 1, "0": 2}]', "the key '0' appears twice"),
        ('[{"' + "1" * 5000 + '": ["block_sparse", 1, 0, 1]}]', "table.json"),
        ("[" + "1" * 5000 + "]", "Exceeds the limit"),
        ("{}", "must hold a JSON list"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, method, text, message):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        get_method(method, **{TABLES[method][0]: str(path)})
    assert str(path) in str(error.value)
