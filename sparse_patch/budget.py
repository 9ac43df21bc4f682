"""Never slower: when `min_length="auto"` plans a call on a CPU, and when it does not.

Three times decide whether sparse attention pays: the time of the plan, which is measured, and the
times of sparse and of exact attention, which `costs` predicts. A finished plan is run where that is
clearly faster than exact attention, whatever the plan took.

Plans are made on credit, so that those that do not pay stay rare. The layers of a patch share an
account of seconds. Every call adds `SHARE` of its exact time, and a plan that paid adds what it
saved; a plan that did not pay subtracts what it lost, and below zero no layer plans. The account
begins with what one prefill adds and holds at most twice that. In n calls of a model of L layers,
hardly more than `SHARE * (n + 2 * L)` of a call's exact time, and one plan, can be lost.

A layer whose plan did not pay also waits: it skips 1, 2, 4, 8, then 16 calls between attempts, and
attempts a plan only when the account can bear the loss (calls of more than twice the work do not
wait). So layers that never pay stop planning, and the others go on.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sparse_patch_kernels import BlockPlan
from torch import Tensor

from .costs import CostModel, Work, of_this_machine

SHARE = 0.01
# Fewest keys of a sparse call where neither a budget nor a measurement (`break_even`) decides.
ELSEWHERE_MIN_LENGTH = 16384
# The best to hope for: seconds of a plan, where none was timed, and the density that it keeps.
LEAST_PLAN_SECONDS = 2e-4
LEAST_DENSITY = 0.05
# If a plan saves less than this share of exact attention, exact attention runs instead.
LEAST_SAVED = 0.05
# Timed plans of a size before the fastest of them is the lower bound.
TIMED_PLANS = 3
LONGEST_WAIT = 16
# A plan is charged at most this many exact calls: a slower one means that the machine stood still.
MOST_LOST = 4
# Number of latest times whose median counts: one plan may be slow because the machine was busy.
LATEST = 5


@dataclass
class Wait:
    """A layer after plans that did not pay.

    Attributes:
        left: calls still to skip, of `length` in all; calls of more than twice `pairs` do not wait.
        lost: what the last plan lost, as a share of exact attention.
    """

    left: int
    length: int
    pairs: float
    lost: float


@dataclass
class Budget:
    """The account of one patch.

    Attributes:
        layers: how many layers share it.
        given: the cost model; None: that of this machine.
        clock: seconds, of any origin.
        credit: seconds that plans may lose; `opened` says whether a first call has put some in.
        waits: by layer.
        plans: seconds per pair of the latest plans, by the size of their calls.
        ops: measured / expected seconds of the latest calls of the op.
        paces: the same for exact calls; old ones are dropped. A busy machine is slower than when
            its costs were measured, in planning too, so plan times are divided by this pace.
        unpaced: calls since the last exact one.
    """

    layers: int
    given: CostModel | None = None
    clock: Callable[[], float] = time.perf_counter
    credit: float = 0.0
    opened: bool = False
    waits: dict[int, Wait] = field(default_factory=dict)
    plans: dict[int, deque[float]] = field(default_factory=dict)
    ops: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))
    unpaced: int = 0

    def bill(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, plain: bool) -> Bill:
        """For a call with q `[heads, q_len, dim]`, k and v `[kv_heads, kv_len, ...]`.

        Args:
            plain: neither soft cap nor sinks.
        """
        costs = self.given or of_this_machine(q.dtype)
        return Bill(self, layer, Work.of(q, k, v, plain=plain), costs)

    def earn(self, exact: float) -> None:
        """Enter a new call; `exact` is its expected seconds of exact attention."""
        self.unpaced += 1
        if self.unpaced > 2 * self.layers:
            self.paces.clear()
        if not self.opened:
            self.opened, self.credit = True, SHARE * self.layers * exact
        else:
            self.save(SHARE * exact, exact)

    def save(self, seconds: float, exact: float) -> None:
        """Add seconds to the account, or subtract them; `exact` is as for `earn`."""
        most = max(self.credit, self.most(exact))
        self.credit = min(self.credit + max(seconds, -MOST_LOST * exact), most)

    def most(self, exact: float) -> float:
        """The seconds that the account holds at most."""
        return 2 * SHARE * self.layers * exact

    def pace(self) -> float:
        """Measured / expected seconds of attention at present; 1 before any was timed."""
        latest = self.paces or self.ops
        return statistics.median_low(latest) if latest else 1.0

    def least_plan_seconds(self, work: Work) -> float:
        """Lower bound on the seconds of a plan for such a call."""
        timed = self.plans.get(_size(work), ())
        if len(timed) < TIMED_PLANS:
            return LEAST_PLAN_SECONDS
        return min(timed) * work.pairs


@dataclass
class Bill:
    """The costs of one call of one layer: `why_exact` is asked before it, `why_not` if a plan was
    made, and `settle` after it.

    Attributes:
        plan: the plan that was made; `density` is the plan's.
    """

    budget: Budget
    layer: int
    work: Work
    costs: CostModel
    plan: BlockPlan | None = None
    density: float = 1.0

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds, of any origin."""
        return self.budget.clock

    @property
    def exact(self) -> float:
        """Expected seconds of exact attention."""
        return self.costs.exact_seconds(self.work)

    @property
    def exact_by_op(self) -> bool:
        """Should exact attention run as the sparse op with all keys?"""
        return self.costs.exact_by_op(self.work)

    def why_exact(self) -> str | None:
        """The reason not to plan this call, or None."""
        budget, work = self.budget, self.work
        budget.earn(self.exact)
        least = budget.least_plan_seconds(work) + self.costs.sparse_seconds(work, LEAST_DENSITY)
        if least >= self.exact:
            return "costs more"
        wait, needed = budget.waits.get(self.layer), 0.0
        if wait is not None and work.pairs <= 2 * wait.pairs:
            needed = min(wait.lost * self.exact, budget.most(self.exact))
            if wait.left:
                wait.left -= 1
                return "did not pay before"
        return "did not pay before" if budget.credit < needed else None

    def why_not(self, plan: BlockPlan | None) -> str | None:
        """The reason not to run this plan, or None."""
        if plan is None:
            return "method"
        self.plan, self.density = plan, plan.density
        return "keeps too much" if self._op() >= (1 - LEAST_SAVED) * self.exact else None

    def settle(self, planning: float | None, op: float | None, exact: float | None) -> None:
        """The call is over: enter what it cost.

        Args:
            planning, op, exact: seconds that each took; None if it did not run.
        """
        budget = self.budget
        if op is not None:
            expected = self._op()
            _note(budget.ops, op / expected)
            ratio = statistics.median_low(budget.ops) if budget.ops else 1.0
            attending = expected * ratio / budget.pace()
        if planning is not None:
            self._book(planning, self.exact if op is None else attending)
        if exact is not None:
            _note(budget.paces, exact / self.exact)
            budget.unpaced = 0

    def _op(self) -> float:
        return self.costs.sparse_seconds(self.work, self.density, self.plan)

    def _book(self, planning: float, attending: float) -> None:
        """Enter a plan into the account.

        Args:
            planning: seconds that it took.
            attending: seconds of the attention after it, at the pace of the cost model.
        """
        budget = self.budget
        plans = budget.plans.setdefault(_size(self.work), deque(maxlen=LATEST))
        plans.append(planning / budget.pace() / self.work.pairs)
        planning = statistics.median_low(plans) * self.work.pairs
        gain = self.exact - planning - attending
        budget.save(gain, self.exact)
        if gain >= -SHARE * self.exact:
            budget.waits.pop(self.layer, None)
            return
        before = budget.waits.get(self.layer)
        length = 1 if before is None else min(2 * before.length, LONGEST_WAIT)
        lost = min(-gain / self.exact, MOST_LOST)
        budget.waits[self.layer] = Wait(length, length, self.work.pairs, lost)


def _note(ratios: deque[float], ratio: float) -> None:
    if ratio > 0:  # a clock may be coarse
        ratios.append(ratio)


def _size(work: Work) -> int:
    """Calls of one size differ in their pairs by less than a factor of two."""
    return int(work.pairs).bit_length()
