"""Power: which distances are kept, and nothing else."""

import pytest
import torch

from sparse_patch import get_method
from tests.methods import scorer_checks as checks

BLOCK = 16


def plan_of(q, k, offset=0, **params):
    method = get_method("power", **{"block_size": BLOCK, **params})
    return method.plan(q, k, scale=1.0, q_offset=offset)


def keeps(local=5, sink=1):
    def of_row(_, m):
        powers = {2**i for i in range(20)}
        return {n for n in range(m + 1) if m - n < local or m - n in powers or n < sink}

    return of_row


@pytest.mark.parametrize("call", checks.CALLS, ids=str)
@pytest.mark.parametrize(("local", "sink"), [(5, 1), (1, 0), (2, 3)])
def test_keeps_window_sink_and_powers_of_two(call, local, sink):
    q, k, v = checks.inputs(*call)
    plan = plan_of(q, k, call[2], local_blocks=local, sink_blocks=sink)
    checks.assert_keeps(plan, keeps(local, sink), BLOCK, BLOCK)
    if local == 5:
        checks.assert_lawful(plan, q, k, v)


def test_all_heads_share_one_list_that_no_input_moves():
    q, k, _ = checks.inputs("noise", 500, 0)
    (run,), (other,) = plan_of(q, k).runs, plan_of(-q, 2 * k).runs
    assert run.start.shape[0] == 1
    assert torch.equal(run.start, other.start)
    assert torch.equal(run.count, other.count)


def test_a_row_keeps_about_the_logarithm_of_its_past():
    q, k = torch.zeros(1, 16 * 1024, 1), torch.zeros(1, 16 * 1024, 1)
    (run,) = plan_of(q, k).runs
    # Of 1023 blocks back: 5 in the window, 8, 16, ... 512, and the first.
    assert int(run.count[0, -1]) == 5 + 7 + 1


def test_exact_where_nothing_is_left_out():
    q, k = torch.zeros(4, 6 * BLOCK + 1, 8), torch.zeros(2, 6 * BLOCK + 1, 8)
    assert plan_of(q, k) is not None  # distance 5 from the seventh block
    assert plan_of(q[:, 1:], k[:, 1:]) is None


def test_defaults_are_those_of_the_paper_and_two_layers_stay_dense():
    method = get_method("power")
    assert (method.block_size, method.local_blocks, method.sink_blocks) == (256, 5, 1)
    assert method.dense_layers == 2


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"block_size": 48}, "block_size=48 must be one of"),
        ({"local_blocks": 0}, "local_blocks=0 must be a whole number >= 1"),
        ({"sink_blocks": -1}, "sink_blocks=-1"),
        ({"dense_layers": -1}, "dense_layers=-1"),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        get_method("power", **params)
