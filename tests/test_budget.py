"""When `min_length="auto"` plans: decisions at given costs and on a clock that only tests move."""

import itertools

import pytest
import torch
from sparse_patch_kernels import BlockPlan

from sparse_patch.budget import LEAST_SAVED, LONGEST_WAIT, MOST_LOST, SHARE, TIMED_PLANS, Budget
from sparse_patch.costs import CostModel, Rate

N = 64
LAYERS = 30
# A pair costs 1 exact, by SDPA, and 1 sparse.
COSTS = CostModel(sdpa=Rate(0, 0, 1 / 32), dense=Rate(1e9, 0, 0), sparse=Rate(0, 0, 1 / 32))
EXACT = N * (N + 1) / 2


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def budget(clock):
    return Budget(LAYERS, COSTS, clock)


def plan(kept, n=N):
    """Keeps about that share, in blocks of a row and a key."""
    mask = torch.zeros(1, n, n, dtype=torch.bool)
    mask[..., : max(1, round(kept * n))] = True
    return BlockPlan.from_block_mask(mask.tril(), block_q=1, block_k=1)


FEW, ALL = plan(0.1), plan(1.0)


def call(budget, clock, *, layer=0, planning=0.0, made=FEW, pace=1.0, n=N):
    """One call as a layer makes it; times are in exact calls at pace 1.

    Returns the reason for an exact call, or None.
    """
    q = torch.zeros(1, n, 16)
    bill = budget.bill(layer, q, q, q, plain=True)
    planned = op = exact = None
    reason = bill.why_exact()
    if reason is None:
        planned, reason = planning * bill.exact * pace, bill.why_not(made)
    if reason is None:
        op = made.density * bill.exact * pace
    else:
        exact = bill.exact * pace
    clock.now += sum(filter(None, (planned, op, exact)))
    bill.settle(planned, op, exact)
    return reason


def calls(budget, clock, layers=LAYERS, **kind):
    return [call(budget, clock, layer=layer, **kind) for layer in range(layers)]


def test_the_costs_of_these_tests_are_as_said():
    assert (
        COSTS.exact_seconds(Budget(1, COSTS).bill(0, *[torch.zeros(1, N, 16)] * 3, plain=True).work)
        == EXACT
    )


def test_plans_that_pay_go_on(budget, clock):
    for _ in range(3):
        assert calls(budget, clock, planning=0.3) == [None] * LAYERS
    assert budget.credit == pytest.approx(2 * SHARE * LAYERS * EXACT)  # holds no more


@pytest.mark.parametrize("pace", [0.2, 1.0, 5.0])
@pytest.mark.parametrize(("planning", "made"), [(0.4, ALL), (1.5, FEW), (0.05, ALL), (0.3, None)])
def test_plans_that_do_not_pay_lose_no_more_than_promised(budget, clock, planning, made, pace):
    for prefill in range(1, 41):
        calls(budget, clock, planning=planning, made=made, pace=pace)
        n = prefill * LAYERS
        lost = clock.now / pace / EXACT - n
        most = SHARE * (n + LAYERS) + planning
        if pace < 1:  # no exact call has told the pace when the first plans are booked
            most += 2 * planning
        assert 0 < lost < most + 1e-6


def test_a_prefill_whose_plans_do_not_pay_is_within_three_hundredths(budget, clock):
    calls(budget, clock, planning=0.4, made=ALL)
    assert clock.now <= 1.03 * LAYERS * EXACT


def test_so_is_one_after_prefills_that_paid(budget, clock):
    for _ in range(5):
        calls(budget, clock, planning=0.3)
    before = clock.now
    reasons = calls(budget, clock, planning=0.3, made=ALL)
    assert clock.now - before <= 1.03 * LAYERS * EXACT
    assert reasons.count("keeps too much") <= 3
    assert reasons.count("did not pay before") >= LAYERS - 3


def test_after_a_bad_text_a_good_one_is_found(budget, clock):
    for _ in range(3):
        calls(budget, clock, planning=0.3, made=ALL)
    found = [calls(budget, clock, planning=0.3).count(None) for _ in range(5)]
    assert found[-1] == LAYERS


def test_layers_that_never_pay_are_found_and_left_out(budget, clock):
    def prefill():
        return [
            call(budget, clock, layer=i, planning=0.3, made=ALL if i < 5 else FEW)
            for i in range(LAYERS)
        ]

    for _ in range(20):
        prefill()
    rounds = [prefill() for _ in range(4 * LONGEST_WAIT)]
    assert all(reasons[5:] == [None] * (LAYERS - 5) for reasons in rounds)
    tries = sum(reasons[:5].count("keeps too much") for reasons in rounds)
    assert 0 < tries <= 5 * len(rounds) / LONGEST_WAIT


def test_a_layer_waits_longer_each_time_and_not_after_success(budget, clock):
    kind = {"planning": 0.02, "made": ALL}  # a loss that the account can bear
    tried = [i for i in range(80) if call(budget, clock, **kind) == "keeps too much"]
    assert [b - a - 1 for a, b in itertools.pairwise(tried)] == [1, 2, 4, 8, 16, 16, 16]
    while call(budget, clock, planning=0.1) is not None:
        pass
    assert [call(budget, clock, planning=0.1) for _ in range(3)] == [None] * 3
    assert call(budget, clock, **kind) == "keeps too much"
    assert [call(budget, clock, planning=0.1) for _ in range(2)] == ["did not pay before", None]


def test_a_plan_must_save_something_of_exact_attention(budget, clock):
    assert call(budget, clock, made=plan(0.6)) is None
    nearly = plan(1 - LEAST_SAVED / 4)
    assert 1 - LEAST_SAVED < nearly.density < 1
    assert call(budget, clock, made=nearly) == "keeps too much"


def test_waiting_is_for_calls_of_about_that_size(budget, clock):
    def tried(n):
        return call(budget, clock, planning=0.02, made=plan(1.0, n), n=n) == "keeps too much"

    assert tried(N)
    assert not tried(N)
    assert tried(N)
    assert not tried(N // 2)
    assert tried(2 * N)


def test_what_did_not_take_long_is_no_failure(budget, clock):
    """A method that asks for exact attention at a glance is asked again."""
    kind = {"planning": SHARE / 2, "made": None}
    assert [call(budget, clock, **kind) for _ in range(9)] == ["method"] * 9


def test_plans_that_take_longer_than_exact_attention_are_given_up(budget, clock):
    reasons = [call(budget, clock, planning=1.2) for _ in range(2000)]
    assert reasons.count(None) == TIMED_PLANS
    assert reasons[-1] == "costs more"
    assert call(budget, clock, n=4 * N) is None  # of another size nothing is known


def test_calls_that_cost_nothing_are_not_planned(clock):
    """Planning has a price, known or not."""
    budget = Budget(LAYERS, CostModel(*[Rate(0, 0, 1e-12)] * 3), clock)
    assert call(budget, clock) == "costs more"


def test_a_machine_that_stood_still_once_does_no_harm(budget, clock):
    calls(budget, clock, planning=0.3)
    assert call(budget, clock, planning=1e6) is None
    clock.now += 1e9
    assert calls(budget, clock, planning=0.3) == [None] * LAYERS


def test_not_even_in_its_first_call_does_it_harm_for_long(budget, clock):
    assert call(budget, clock, planning=1e6) is None
    reasons = [call(budget, clock, layer=1 + i % 8, planning=0.3) for i in range(500)]
    assert reasons.index(None) <= MOST_LOST / SHARE
    assert reasons[-8:] == [None] * 8


def test_a_machine_that_is_slower_without_an_exact_call_is_told_by_the_op(budget, clock):
    calls(budget, clock, planning=0.3)
    assert calls(budget, clock, planning=0.3, pace=4.0)[3:] == [None] * (LAYERS - 3)


def test_a_machine_that_got_slower_changes_nothing(budget, clock):
    """Its plans take longer, and so does its exact attention."""
    calls(budget, clock, planning=0.3, made=ALL)  # exact calls, that tell the pace
    for _ in range(20):
        reasons = calls(budget, clock, planning=0.3, pace=3.0)
    assert reasons == [None] * LAYERS


def test_without_a_cost_model_the_machine_is_measured(monkeypatch, clock):
    monkeypatch.setattr("sparse_patch.budget.of_this_machine", lambda dtype: COSTS)
    q = torch.zeros(1, N, 16)
    assert Budget(LAYERS, None, clock).bill(0, q, q, q, plain=True).exact == EXACT
