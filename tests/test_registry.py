"""Methods by name: errors that help, and a place for methods of others."""

from dataclasses import FrozenInstanceError, dataclass
from importlib.metadata import EntryPoint

import pytest
import torch

import sparse_patch
from sparse_patch import Method, describe, get_method, list_methods, param, register, registry


@pytest.fixture
def scratch(monkeypatch):
    """A registry that a test may fill."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def test_ships_these_methods():
    assert {"a_shape", "dense", "flexprefill"} <= set(list_methods())
    assert list_methods() == sorted(list_methods())


@pytest.mark.parametrize("name", ["flexprefil", "FlexPrefill", "flex-prefill"])
def test_an_unknown_name_suggests_the_nearest(name):
    with pytest.raises(ValueError, match="did you mean 'flexprefill'"):
        get_method(name)


def test_a_name_unlike_any_lists_them_all():
    with pytest.raises(ValueError, match=r"unknown method 'zzz'\. Known: a_shape, .*dense"):
        get_method("zzz")


def test_methods_are_values():
    assert get_method("flexprefill", gamma=0.8) == get_method("flexprefill", gamma=0.8)
    with pytest.raises(FrozenInstanceError):
        get_method("flexprefill").gamma = 0.5


@pytest.mark.parametrize("name", list_methods())
def test_every_parameter_is_documented_and_its_default_is_lawful(name):
    get_method(name)
    info = describe(name)
    assert info.summary.endswith(".")
    for one in info.parameters:
        assert one.allowed, one.name
        assert one.help, one.name
        get_method(name, **{one.name: one.default})
    for preset in info.presets:
        get_method(name, preset=preset)


@pytest.mark.usefixtures("scratch")
def test_a_third_party_method_registers_and_runs():
    @register("keep_first")
    @dataclass(frozen=True)
    class KeepFirst(Method):
        n: int = param(4, "tokens to keep", least=1)

        def plan(self, q, k, *, scale, q_offset):
            return sparse_patch.BlockPlan(q.shape[1], k.shape[1], 16, sink=self.n, window=1)

    plan = get_method("keep_first", n=2).plan(
        torch.randn(1, 8, 4), torch.randn(1, 8, 4), scale=1.0, q_offset=0
    )
    assert plan.to_dense_mask()[0, 7].tolist() == [True, True, *[False] * 5, True]
    with pytest.raises(ValueError, match="n=0 must be a whole number >= 1"):
        get_method("keep_first", n=0)
    with pytest.raises(ValueError, match="already"):
        register("keep_first")(dataclass(type("Other", (), {"plan": lambda self: None})))
    register("keep_first", replace=True)(dataclass(type("Other", (), {"plan": lambda self: None})))


@pytest.mark.usefixtures("scratch")
def test_an_entry_point_offers_a_method(monkeypatch):
    point = EntryPoint("plugin", "sparse_patch.methods.dense:Dense", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    assert "plugin" in list_methods()
    assert isinstance(get_method("plugin"), registry.method_class("dense"))


def test_what_is_not_a_method_is_refused():
    with pytest.raises(TypeError, match="dataclass"):
        register("not_a_dataclass")(type("Thing", (), {"plan": lambda self: None}))
    with pytest.raises(ValueError, match="letters, digits"):
        register("not a name")


Q, K = torch.randn(4, 32, 8), torch.randn(2, 32, 8)


@pytest.mark.parametrize("name", list_methods())
@pytest.mark.parametrize(
    ("q", "k", "offset", "message"),
    [
        (Q[None], K, 0, r"\[heads, seq, head_dim\]"),
        (Q[:, :0], K, 0, "not empty"),
        (Q, K[..., :4], 0, "share head_dim"),
        (Q[:3], K, 0, "multiple of KV heads"),
        (Q, K.half(), 0, "share dtype"),
        (Q, K, 5, "q_offset=5 plus 32 queries must equal 32 keys"),
        (Q, K[:, :16], -16, "q_offset=-16"),
    ],
)
def test_plans_name_what_is_wrong_with_q_and_k(name, q, k, offset, message):
    with pytest.raises(ValueError, match=message):
        get_method(name).plan(q, k, scale=1.0, q_offset=offset)
