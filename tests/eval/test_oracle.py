"""The oracle against an exhaustive search, and as a bound on every block method."""

import itertools

import pytest
import torch
from sparse_patch_eval.ask.capture import Attention
from sparse_patch_eval.ask.judge import judge
from study.oracle import Oracle, oracle

import sparse_patch
from sparse_patch import BlockPlan


def attention(heads=2, kv_heads=1, n=40, dim=8, seed=0, spread=2.0):
    g = torch.Generator().manual_seed(seed)

    def draw(h):
        return torch.randn(h, n, dim, generator=g)

    return Attention(spread * draw(heads), spread * draw(kv_heads), draw(kv_heads), dim**-0.5)


def probabilities(one):
    k = one.k.repeat_interleave(one.q.shape[0] // one.k.shape[0], 0)
    n = one.q.shape[1]
    late = torch.ones(n, n, dtype=torch.bool).triu(1)
    return (one.q @ k.mT * one.scale).masked_fill(late, float("-inf")).softmax(-1).double()


def every_choice(one, block_q, block_k):
    """(recall, density) of every set of blocks with the first and the diagonal in."""
    probs = probabilities(one)
    heads, n, _ = probs.shape
    forced_mass = forced_keys = causal = 0
    free = []
    for head, first in itertools.product(range(heads), range(0, n, block_q)):
        end = min(first + block_q, n)
        causal += end
        for start in range(0, end, block_k):
            stop = min(start + block_k, end)
            mass = float(probs[head, first:end, start:stop].sum())
            if start == 0 or start + block_k > first:
                forced_mass, forced_keys = forced_mass + mass, forced_keys + stop - start
            else:
                free.append((mass, stop - start))
    assert 5 < len(free) < 15
    for chosen in itertools.product((False, True), repeat=len(free)):
        kept = list(itertools.compress(free, chosen))
        mass = forced_mass + sum(mass for mass, _ in kept)
        keys = forced_keys + sum(keys for _, keys in kept)
        yield mass / (heads * n), keys / causal


@pytest.mark.parametrize(
    ("n", "block_q", "block_k", "heads"),
    [(40, 8, 8, 2), (37, 8, 8, 2), (30, 4, 8, 1), (40, 16, 8, 2)],
)
def test_no_choice_of_blocks_does_with_less(n, block_q, block_k, heads):
    one = attention(heads, 1, n)
    choices = list(every_choice(one, block_q, block_k))
    mine = oracle(one, block_q=block_q, block_k=block_k)
    for recall in (0.3, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99):
        least = min(density for mass, density in choices if mass >= recall - 1e-9)
        assert mine.density(recall) == pytest.approx(least)
    assert mine.density(1.0) == 1.0


def test_masses_are_those_of_dense_attention_and_rows_hold_one_each():
    one = attention(4, 2, 70)
    mine = oracle(one, block_q=16, block_k=16)
    assert mine.forced_mass + float(mine.masses.sum()) == pytest.approx(mine.rows, rel=1e-6)
    assert mine.rows == 4 * 70
    assert (mine.masses.diff() <= 0).all()


def test_joined_layers_compete_as_heads_of_one_layer_do():
    a, b = attention(2, 1, 60, seed=1), attention(2, 1, 60, seed=2, spread=0.5)
    both = Attention(torch.cat([a.q, b.q]), torch.cat([a.k, b.k]), torch.cat([a.v, b.v]), a.scale)
    whole = oracle(both, block_q=8, block_k=8)
    joined = Oracle.join([oracle(one, block_q=8, block_k=8) for one in (a, b)])
    for recall in (0.5, 0.7, 0.9, 0.97):
        assert joined.density(recall) == whole.density(recall)
    with pytest.raises(ValueError, match="one block size"):
        Oracle.join([oracle(a, block_k=8), oracle(a, block_k=16)])


@pytest.mark.parametrize("rows", [None, 64])
def test_no_block_plan_beats_it_on_the_rows_looked_at(rows):
    one = attention(4, 2, 200, seed=3)
    mine = oracle(one, block_q=16, block_k=16, rows=rows)
    g = torch.Generator().manual_seed(0)
    for keep in (0.1, 0.3, 0.6):
        mask = torch.rand(4, 13, 13, generator=g) < keep
        mask[..., 0] = True
        mask |= torch.eye(13, dtype=torch.bool)
        plan = BlockPlan.from_block_mask(mask, block_q=16, block_k=16, q_len=200, kv_len=200)
        judged = judge(one, plan, rows=rows)
        recall = sum(judged.recall) / 4
        assert mine.density(recall - 1e-6) <= judged.density
        assert mine.density(recall - 1e-6) > 0.3 * judged.density


@pytest.mark.parametrize("rows", [None, 16, 50, 1000])
def test_the_same_rows_are_looked_at_as_by_recall(rows):
    """A plan that shows each row itself only: its recall is the diagonal, on those rows."""
    one = attention(2, 1, 100)
    plan = BlockPlan(100, 100, 16, window=1)
    mine = oracle(one, block_q=16, block_k=1, rows=rows)
    diagonal = probabilities(one).diagonal(dim1=1, dim2=2)
    looked = {None: range(7), 16: [6], 50: [6, 4, 2, 0], 1000: range(7)}[rows]
    index = torch.tensor([n for n in range(100) if n // 16 in looked])
    assert mine.rows == 2 * len(index)
    found = sparse_patch.recall(one.q, one.k, plan, scale=one.scale, rows=rows)
    torch.testing.assert_close(found.double(), diagonal[:, index].mean(1), atol=1e-5, rtol=1e-4)
