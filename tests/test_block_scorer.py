"""What every block scorer shares: the policies, the forced blocks, rectification."""

import math
from dataclasses import dataclass

import pytest
import torch
from sparse_patch_kernels import block_sparse_attention

import sparse_patch
from sparse_patch import get_method
from sparse_patch.block_scorer import BlockScorer
from tests.golden.gen_inputs import make_qkv

BLOCK = 16


@dataclass(frozen=True, eq=False)
class Given(BlockScorer):
    """Blocks are worth what a table says."""

    table: torch.Tensor | None = None

    def block_scores(self, q, k, *, scale, q_offset):
        return self.table


def random_table(lists, rows, blocks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 4, (lists, rows, blocks), generator=generator).float()


def sequence(heads=4, kv_heads=2, q_len=128, kv_len=128, dim=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, dim)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def kept_blocks(plan):
    """bool `[heads, q_blocks, k_blocks]`: blocks of which the block's last row sees a key."""
    tokens = plan.to_dense_mask()
    tokens = torch.stack([rows[:, -1] for rows in tokens.split(plan.block_q, 1)], 1)
    tokens = torch.nn.functional.pad(tokens, (0, -plan.kv_len % BLOCK))
    return tokens.unflatten(-1, (-1, BLOCK)).any(-1)


def plan_of(table, q_len=128, kv_len=128, heads=4, **params):
    q, k, _ = sequence(heads, 2, q_len, kv_len)
    method = Given(block_size=BLOCK, table=table, **params)
    return method.plan(q, k, scale=0.35, q_offset=kv_len - q_len)


def policy_by_loops(table, first_row, choose, sink=1, local=1):
    """Blocks kept of each row: the first `choose(order, mass)` in order, forced ones first.

    `order` ranks the row's causal blocks, `mass` is their share of the row by index.
    """
    kept = torch.zeros(table.shape, dtype=torch.bool)
    for one_list, rows in enumerate(table.tolist()):
        for row, scores in enumerate(rows):
            own = first_row + row
            seen = range(own + 1)
            forced = [b for b in seen if b < sink or b > own - local]
            order = forced + sorted(set(seen) - set(forced), key=lambda b: (-scores[b], b))
            total = sum(math.exp(scores[b]) for b in seen)
            mass = [math.exp(scores[b]) / total for b in seen]
            count = max(choose(order, mass), len(forced))
            kept[one_list, row, order[:count]] = True
    return kept


def until(gamma):
    def choose(order, mass):
        running, count = 0.0, 0
        while running < gamma - 1e-12 and count < len(order):
            running += mass[order[count]]
            count += 1
        return count

    return choose


@pytest.mark.parametrize(("q_len", "kv_len"), [(128, 128), (117, 117), (64, 128), (58, 122)])
@pytest.mark.parametrize(
    ("params", "choose"),
    [
        ({"select": "topk", "topk": 3}, lambda order, mass: 3),
        ({"select": "topk", "topk": 1}, lambda order, mass: 1),
        ({"select": "top_p", "gamma": 0.7}, until(0.7)),
        ({"select": "top_p", "gamma": 0.95}, until(0.95)),
        (
            {"select": "threshold", "alpha": 0.3},
            lambda order, mass: len(
                {b for b in order if mass[b] >= 0.3 * max(mass)}
                | {b for b in order if b in (0, len(order) - 1)}
            ),
        ),
    ],
    ids=["topk 3", "topk 1", "top_p .7", "top_p .95", "threshold"],
)
def test_row_policies_keep_what_loops_keep(params, choose, q_len, kv_len):
    first_row = (kv_len - q_len) // BLOCK
    table = random_table(4, 8 - first_row, 8)
    got = kept_blocks(plan_of(table, q_len, kv_len, **params))
    assert torch.equal(got, policy_by_loops(table, first_row, choose))


def test_top_p_can_count_the_forced_blocks_on_top_instead():
    @dataclass(frozen=True, eq=False)
    class OnTop(Given):
        forced_first = False

    table = torch.zeros(4, 8, 8)
    table[..., 0], table[..., 3] = 3.0, 3.1  # the sink holds 0.41 of a full row, block 3 0.46
    q, k, _ = sequence()
    first, on_top = (
        cls(block_size=BLOCK, table=table, gamma=0.42).plan(q, k, scale=1.0, q_offset=0)
        for cls in (Given, OnTop)
    )
    assert kept_blocks(first)[0, 7].nonzero()[:, 0].tolist() == [0, 7]
    assert kept_blocks(on_top)[0, 7].nonzero()[:, 0].tolist() == [0, 3, 7]


@pytest.mark.parametrize("gamma", [0.5, (0.2, 0.5, 0.9, 0.99)])
def test_per_head_budget_is_what_the_last_block_needs_for_all_rows(gamma):
    q, k, _ = sequence()
    table = random_table(2, 8, 8)
    plan = Given(block_size=BLOCK, table=table, select="per_head_budget", gamma=gamma).plan(
        3 * q, k, scale=0.35, q_offset=0
    )
    scores = 3 * q[:, -BLOCK:] @ k.repeat_interleave(2, 0).mT * 0.35
    own = torch.ones(BLOCK, 128, dtype=torch.bool).tril(128 - BLOCK)
    mass = scores.masked_fill(~own, float("-inf")).softmax(-1).mean(1).unflatten(-1, (-1, BLOCK))
    share = gamma if isinstance(gamma, tuple) else (gamma,) * 4
    kept = kept_blocks(plan)
    budgets = set()
    for head in range(4):
        best = sorted(mass[head].sum(-1).tolist(), reverse=True)
        budget = until(share[head])(range(8), best)
        want = policy_by_loops(table[head // 2, None], 0, lambda *_, n=budget: n)[0]
        assert torch.equal(kept[head], want)
        budgets.add(budget)
    assert len(budgets) > 1  # heads differ, and share a list all the same
    assert plan.runs[0].ranked
    assert plan.runs[0].start.shape[0] == 2


def test_global_keeps_the_best_of_all_causal_blocks_of_a_head():
    table = random_table(4, 8, 8)
    kept = kept_blocks(plan_of(table, select="global", keep=0.6))
    pairs = [(row, block) for row in range(8) for block in range(row + 1)]
    for head in range(4):
        mass = [table[head, row, : row + 1].double().softmax(0).tolist() for row in range(8)]

        def worth(pair, mass=mass):
            row, block = pair
            return block in (0, row), mass[row][block]

        best = sorted(pairs, key=worth, reverse=True)[: math.ceil(0.6 * len(pairs))]
        line = worth(best[-1])[1]
        # Equals at the line are drawn by index: all above it are in, none below.
        assert all(kept[head][pair] for pair in pairs if worth(pair)[0] or worth(pair)[1] > line)
        assert not any(
            kept[head][pair] for pair in pairs if not worth(pair)[0] and worth(pair)[1] < line
        )
        assert int(kept[head].sum()) == len(best)


def test_forced_blocks_and_dense_rows_and_the_least_budget():
    table = random_table(4, 8, 8)
    kept = kept_blocks(plan_of(table, select="topk", topk=1, sink_blocks=2, local_blocks=3))
    want = policy_by_loops(table, 0, lambda *_: 1, sink=2, local=3)
    assert torch.equal(kept, want)
    kept = kept_blocks(plan_of(table, select="topk", topk=1, sink_blocks=0))
    assert torch.equal(kept, torch.eye(8, dtype=torch.bool).expand(4, 8, 8))
    kept = kept_blocks(plan_of(table, select="topk", topk=1, dense_rows=BLOCK + 1))
    assert kept[:, -2:].sum(-1).tolist() == [[7, 8]] * 4
    assert kept[:, :-2].sum(-1).tolist() == [[1, 2, 2, 2, 2, 2]] * 4
    kept = kept_blocks(plan_of(table, select="topk", topk=1, min_budget=3 * BLOCK + 1))
    assert kept.sum(-1).tolist() == [[1, 2, 3, 4, 4, 4, 4, 4]] * 4
    assert torch.equal(kept, policy_by_loops(table, 0, lambda *_: 4))


def test_an_unaligned_chunk_keeps_what_either_of_its_two_rows_keeps():
    table = random_table(4, 6, 8)  # positions 40..127: blocks 2..7
    kept = kept_blocks(plan_of(table, q_len=88, select="topk", topk=3))
    rows = policy_by_loops(table, 2, lambda *_: 3)
    assert kept.shape[1] == 6
    for block in range(5):
        assert torch.equal(kept[:, block], rows[:, block] | rows[:, block + 1])
    assert torch.equal(kept[:, 5], rows[:, 5])


def test_exact_where_all_is_asked_for_or_sparse_makes_no_sense():
    table = torch.zeros(4, 8, 8)
    assert plan_of(table, gamma=1.0) is None
    assert plan_of(table, select="global", keep=1) is None
    assert plan_of(table, select="topk", topk=8) is None
    assert plan_of(table, select="topk", topk=7) is not None
    assert plan_of(table, min_budget=112) is None
    assert plan_of(table, min_budget=111) is not None
    assert plan_of(table[:, -1:], q_len=15) is None
    assert plan_of(table[:, -1:], q_len=16) is not None


@pytest.mark.parametrize("select", ["topk", "top_p", "threshold", "per_head_budget", "global"])
def test_a_knob_that_the_policy_does_not_read_is_refused(select):
    values = {"topk": 5, "gamma": 0.5, "alpha": 0.5, "keep": 0.5}
    reads = {
        "topk": "topk", "top_p": "gamma", "threshold": "alpha", "per_head_budget": "gamma",
        "global": "keep",
    }[select]  # fmt: skip
    Given(select=select, **{reads: values[reads]})
    for name in set(values) - {reads}:
        with pytest.raises(ValueError, match=f"{name}=.* does nothing with select='{select}'"):
            Given(select=select, **{name: values[name]})


def test_gamma_per_head_needs_one_list_per_head():
    table = torch.zeros(2, 8, 8)
    with pytest.raises(ValueError, match=r"4 values .* chooses blocks for 2"):
        plan_of(table, gamma=(0.1, 0.2, 0.3, 0.4))
    kept = kept_blocks(plan_of(torch.zeros(4, 8, 8), gamma=(0.1, 0.5, 0.7, 0.99)))
    assert kept[:, 7].sum(-1).tolist() == [2, 4, 6, 8]


def test_unknown_scores_still_give_a_lawful_plan():
    table = random_table(4, 8, 8)
    table[:, 3:] = float("nan")
    for params in (
        {"select": "topk", "topk": 3},
        {"select": "top_p"},
        {"select": "threshold"},
        {"select": "global"},
    ):
        kept = kept_blocks(plan_of(table, **params))
        assert bool(kept[:, :, 0].all())
        assert bool(kept.diagonal(dim1=1, dim2=2).all())


# Rectification.


def rectified_by_definition(q, k, v, kept, scale):
    """softmax over the kept keys, and over pruned blocks of the past as q . mean(k) + log(block).

    Source: the LSE form of rectification. `kept [heads, q_blocks, k_blocks]`; all in float64.
    """
    q, k, v = q.double(), k.double(), v.double()
    q_len, kv_len = q.shape[1], k.shape[1]
    out = q.new_zeros(q.shape[0], q_len, v.shape[2])
    for head in range(q.shape[0]):
        keys, values = (x[head * len(k) // len(q)] for x in (k, v))
        for row in range(q_len):
            position, block = kv_len - q_len + row, row // BLOCK
            first = kv_len - q_len + block * BLOCK
            logits, shown = [], []
            for j in range(kept.shape[2]):
                part = slice(j * BLOCK, (j + 1) * BLOCK)
                if kept[head, block, j]:
                    seen = slice(j * BLOCK, min((j + 1) * BLOCK, position + 1))
                    logits.extend(keys[seen] @ q[head, row] * scale)
                    shown.extend(values[seen])
                elif part.stop <= first:
                    mean = keys[part].mean(0) @ q[head, row] * scale
                    logits.append(mean + math.log(BLOCK))
                    shown.append(values[part].mean(0))
            out[head, row] = torch.stack(logits).softmax(0) @ torch.stack(shown)
    return out


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("q_len", "kv_len"), [(96, 96), (85, 85), (48, 96), (41, 89), (50, 90), (53, 71)]
)
@pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=str)
def test_rectification_is_its_formula(q_len, kv_len, heads, backend):
    q, k, v = sequence(*heads, q_len, kv_len)
    first_row = (kv_len - q_len) // BLOCK
    table = random_table(2, -(-kv_len // BLOCK) - first_row, -(-kv_len // BLOCK))
    plain, plan = (
        Given(block_size=BLOCK, table=table, select="topk", topk=3, rectify=rectify).plan(
            q, k, scale=0.35, q_offset=kv_len - q_len
        )
        for rectify in ("none", "lse")
    )
    kept = kept_blocks(plain).repeat_interleave(heads[0] // 2, 0)
    assert torch.equal(plan.to_dense_mask(), plain.to_dense_mask())
    assert plan.density > plain.density
    out = block_sparse_attention(q, k, v, plan, scale=0.35, backend=backend)
    want = rectified_by_definition(q, k, v, kept, 0.35)
    torch.testing.assert_close(out.double(), want, atol=3e-6, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(117, 117), (70, 117)])
def test_rectification_never_looks_ahead(q_len, kv_len, backend):
    q, k, v = sequence(q_len=q_len, kv_len=kv_len)
    first_row = (kv_len - q_len) // BLOCK
    table = random_table(4, 8 - first_row, 8)
    plan = plan_of(table, q_len, kv_len, select="topk", topk=3, rectify="lse")
    before = block_sparse_attention(q, k, v, plan, backend=backend)
    for late in range(kv_len - q_len + 1, kv_len, 7):
        changed = [x.clone() for x in (k, v)]
        for x in changed:
            x[:, late:] = 50.0
        after = block_sparse_attention(q, *changed, plan, backend=backend)
        row = late - (kv_len - q_len)
        assert torch.equal(after[:, :row], before[:, :row])
        assert not torch.allclose(after[:, row:], before[:, row:])


@pytest.mark.parametrize("method", ["proxyattn", "given"])
@pytest.mark.parametrize("seed", [1, 2])
def test_rectification_lowers_the_error_at_the_same_selection(method, seed):
    q, k, v = (torch.tensor(x[0]).transpose(0, 1) for x in make_qkv(seed, 1024, 6, 2, 64))
    exact = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 0), v.repeat_interleave(3, 0), is_causal=True
    )
    shared = {"block_size": 64, "select": "topk", "topk": 5}
    errors, masks = [], []
    for rectify in ("none", "lse"):
        if method == "given":
            made = Given(table=torch.zeros(1, 16, 16), rectify=rectify, **shared)
        else:
            made = get_method(method, min_budget=0, rectify=rectify, **shared)
        plan = made.plan(q, k, scale=0.125, q_offset=0)
        out = block_sparse_attention(q, k, v, plan, scale=0.125)
        errors.append(float((out - exact).norm() / exact.norm()))
        masks.append(plan.to_dense_mask())
    assert torch.equal(*(mask.repeat_interleave(6 // len(mask), 0) for mask in masks))
    assert errors[1] < 0.88 * errors[0], errors


def test_rectification_has_nothing_to_add_where_nothing_is_left_out():
    plan = plan_of(torch.zeros(4, 8, 8), select="topk", topk=1, local_blocks=8, rectify="lse")
    assert len(plan.runs) == 1


@pytest.mark.parametrize("select", ["top_p", "per_head_budget", "held_out"])
def test_a_head_with_gamma_1_keeps_all_even_what_weighs_nothing(select):
    q, k = torch.randn(2, 256, 8), torch.randn(1, 256, 8)
    k[0, 0] *= 200  # a sink so strong that other blocks' mass is 0 in float32
    q[:, :, :] = k[0, 0] / k[0, 0].norm() * 8
    method = sparse_patch.get_method(
        "xattention", select=select, gamma=(1.0, 0.5), block_size=32, stride=4
    )
    mask = method.plan(q, k, scale=1.0, q_offset=0).to_dense_mask()
    causal = torch.ones(256, 256, dtype=torch.bool).tril()
    assert torch.equal(mask[0], causal)
    assert not torch.equal(mask[1], causal)
