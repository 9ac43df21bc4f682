"""Inputs and readings that the tests of HiP and InfiniteHiP share."""

import hashlib
import json

import numpy as np
import torch

from tests.golden.gen_inputs_hip import make_inputs


def load(path):
    """Golden arrays, their config, and q, k, v; the digests say that the inputs are the same."""
    golden = np.load(path)
    config = json.loads(str(golden["config"]))
    q, k, v = make_inputs(config["seed"], config["T"], config["H"], config["Hkv"])
    arrays = [np.ascontiguousarray(x) for x in (q[:, -config["Tq"] :], k, v)]
    assert [hashlib.sha256(x.tobytes()).hexdigest()[:16] for x in arrays] == config["sha"]
    return golden, config, [torch.tensor(x) for x in arrays]


def integers(heads, n, dim=8, seed=0):
    """Small whole numbers: every order of sums gives the same score, and many scores tie."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (heads, n, dim), generator=generator).float()


def lists(plan, heads):
    """int `[heads, query blocks, n]`: starts, -1 where the list has ended."""
    (run,) = plan.runs
    return run.expand(heads)[0].masked_fill(~run.valid(heads), -1)


def decode_steps(method, q, k, first, n):
    """Plans of `n` decode steps, the first at `first` keys."""
    memory = None
    for kv_len in range(first, first + n):
        row = q[:, kv_len - 1 : kv_len]
        plan, memory = method.decode(row, k[:, :kv_len], scale=1.0, memory=memory)
        yield plan


def fresh_mask(method, q, k, kv_len):
    """bool `[lists, kv_len]`: what a decode step sees that remembers nothing."""
    row = q[:, kv_len - 1 : kv_len]
    plan = method.plan(row, k[:, :kv_len], scale=1.0, q_offset=kv_len - 1)
    return plan.to_dense_mask()[:, 0]
