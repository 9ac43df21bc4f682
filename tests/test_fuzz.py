"""Some seconds of the fuzzer; by hand it goes on for as long as you like (`tests/fuzz.py`)."""

import pytest

from tests import fuzz


@pytest.mark.parametrize("seconds", [10, pytest.param(30, marks=pytest.mark.wide)])
def test_random_cases_agree_with_the_reference(seconds):
    outcomes = list(fuzz.cases(seconds, seed=0))
    assert not [outcome.error for outcome in outcomes if outcome.error]
    kinds = {outcome.says.partition(":")[0] for outcome in outcomes}
    assert kinds == {"op", "method", "model"}


def test_a_case_is_what_its_number_says():
    first, again = (list(fuzz.cases(0, seed=4)) for _ in range(2))
    assert first == again
    assert first[0].number == 4 * fuzz.CASES_PER_SEED


def test_a_failure_says_how_to_repeat_it(monkeypatch):
    def broken(number):
        raise AssertionError("heads (4, 2): out of range")

    monkeypatch.setattr(fuzz, "CHECKS", (broken,))
    (outcome,) = fuzz.cases(0, 1)
    assert outcome.error.startswith("python tests/fuzz.py --case 1000000\nheads (4, 2): out of")
