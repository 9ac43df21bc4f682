"""Knobs turn methods to a density, in few steps; what cannot be reached is said."""

import math

import pytest
from study.tuner import Tuner

import sparse_patch
from sparse_patch.specs import parse_method, spec_of, split_method


def knob_of(name):
    return sparse_patch.describe(name).knob


class Lab:
    """Densities by a formula, and what was asked for."""

    def __init__(self, formula):
        self.formula, self.asked = formula, []

    def __call__(self, spec):
        self.asked.append(spec)
        return self.formula(split_method(spec)[1])


def test_a_share_is_turned_to_the_target_in_few_steps():
    lab = Lab(lambda p: 0.05 + 0.95 * p["gamma"] ** 8)
    tuner = Tuner("flexprefill", lab)
    for target in (0.15, 0.25, 0.4, 0.9):
        got = tuner.tune(target)
        assert got.reached
        assert got.density == pytest.approx(target, rel=0.01)
        assert lab.formula(split_method(got.spec)[1]) == got.density
    assert len(lab.asked) < 24
    assert len(set(lab.asked)) == len(lab.asked)


@pytest.mark.parametrize("power", [0.2, 1, 40])
def test_bent_curves_are_followed_too(power):
    lab = Lab(lambda p: 0.02 + 0.98 * p["gamma"] ** power)
    got = Tuner("flexprefill", lab).tune(0.3)
    assert got.reached == (power != 0.2)  # there, even the least gamma keeps more
    assert len(lab.asked) < 16


def test_whole_numbers_are_tuned_to_the_nearest():
    lab = Lab(lambda p: min(1.0, p["window"] / 4096))
    got = Tuner("a_shape", lab).tune(0.25)
    assert got.reached
    assert got.spec.startswith("a_shape:sink=64,window=10")
    assert len(set(lab.asked)) == len(lab.asked) < 20


def test_a_target_between_two_whole_numbers_is_not_called_reached():
    lab = Lab(lambda p: min(1.0, math.ceil(p["window"] / 512) * 0.11))
    got = Tuner("a_shape", lab).tune(0.26)
    assert not got.reached
    assert got.density == pytest.approx(0.22)


def test_out_of_reach_gives_the_nearest_end():
    floor = Tuner("flexprefill", Lab(lambda p: 0.3 + 0.1 * p["gamma"])).tune(0.2)
    assert (floor.reached, floor.density) == (False, pytest.approx(0.302))
    ceiling = Tuner("flexprefill", Lab(lambda p: 0.1 * p["gamma"])).tune(0.2)
    assert (ceiling.reached, ceiling.density) == (False, pytest.approx(0.1, rel=1e-3))


def test_a_knob_that_keeps_less_when_it_rises():
    knob = knob_of("flashprefill")
    assert knob.params(0)["alpha"] > knob.params(0.5)["alpha"] > knob.params(1)["alpha"] > 0


def test_knobs_of_several_parameters_scale_them_together():
    knob = knob_of("minference")
    for place in (0.3, 0.6, 0.9):
        params = knob.params(place)
        assert params["slash"] / params["vertical"] == pytest.approx(6.096, rel=0.05)


def test_numbers_that_belong_together_keep_their_proportion():
    assert knob_of("psa").make(0.9) == {"thresholds": (0.9, 0.92, 0.94, 0.96)}
    stages = knob_of("infinite_hip").make(0.5)
    assert (stages["keep"], stages["early_keep"]) == ((16384, 4096, 1024), 2048)


@pytest.mark.parametrize("name", [n for n in sparse_patch.list_methods() if knob_of(n)])
def test_every_place_of_a_registered_methods_knob_is_a_method(name):
    specs = [spec_of(name, knob_of(name).params(place)) for place in (0.0, 0.3, 0.5, 0.99, 1.0)]
    assert len({parse_method(spec) for spec in specs}) > 3


def test_the_methods_of_the_core_have_knobs():
    assert all(knob_of(name) for name in ("flexprefill", "proxyattn", "a_shape"))
    assert knob_of("dense") is None


def test_a_method_without_a_knob_is_measured_once():
    lab = Lab(lambda _: 0.7)
    tuner = Tuner("dense", lab)
    assert not tuner.has_knob
    assert [tuner.tune(t).density for t in (0.2, 0.7)] == [0.7, 0.7]
    assert lab.asked == ["dense"]


def test_parameters_of_the_user_win_over_the_knobs_own():
    lab = Lab(lambda p: p["gamma"])
    tuner = Tuner("flexprefill", lab, {"min_budget": 512, "block_size": 64})
    assert "min_budget=512" in tuner.tune(0.5).spec
    assert "block_size=64" in tuner.tune(0.5).spec
    turned = Tuner("flexprefill", lab, {"gamma": 0.8})
    assert not turned.has_knob
    assert turned.tune(0.5).spec == "flexprefill:gamma=0.8"
