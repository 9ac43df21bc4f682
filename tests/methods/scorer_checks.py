"""What tests of block-choosing methods share: inputs, and slow restatements of the choice."""

import torch
from sparse_patch_kernels import block_sparse_attention

from tests.golden.gen_inputs import make_qkv

HEADS, KV_HEADS, DIM = 4, 2, 32
SCALE = DIM**-0.5

# kind of input, keys, keys before the first query
CALLS = [
    ("noise", 512, 0),
    ("noise", 437, 75),
    ("structured", 512, 0),
    ("structured", 500, 0),
    ("structured", 490, 128),
    ("structured", 501, 77),
]


def inputs(kind, n, offset):
    """q `[4, n - offset, 32]`, k and v `[2, n, 32]`."""
    if kind == "structured":
        q, k, v = (torch.tensor(x[0]).transpose(0, 1) for x in make_qkv(5, n, 4, 2, DIM))
        return q[:, offset:], k, v
    random = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(h, n, DIM, generator=random) for h in (HEADS, KV_HEADS, KV_HEADS))
    return 2 * q[:, offset:], k, v


def rows_in(m, n, offset, block):
    """Rows of the call that lie in block m of the position grid."""
    return [row for row in range(n - offset) if (row + offset) // block == m]


def mean(x, positions):
    return sum(x[i].double() for i in positions) / len(positions)


def block_means(x, n, block):
    """Mean row of every block of `x [n, dim]`, one by one."""
    return [mean(x, range(i, min(i + block, n))) for i in range(0, n, block)]


def softmax(logits):
    return torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()


def seen_by(m, n, block_q, block_k):
    """Key blocks that some position of query block m sees."""
    return range(-(-min((m + 1) * block_q, n) // block_k))


def forced(m, n, block_q, block_k, sink, local):
    """The first blocks and the latest, counted from the first block of m's own."""
    own = m * block_q // block_k
    return {j for j in seen_by(m, n, block_q, block_k) if j < sink or j > own - local}


def best(worth, count):
    """Indices of the `count` largest entries of a dict, the lower index first among equals."""
    return set(sorted(worth, key=lambda j: (-worth[j], j))[:count])


def top_p(mass, gamma):
    """Best entries of a dict until they hold `gamma`, the one that crosses the line included."""
    kept, held = set(), 0.0
    for j in sorted(mass, key=lambda j: (-mass[j], j)):
        if held >= gamma * sum(mass.values()):
            break
        kept.add(j)
        held += mass[j]
    return kept


def by_mass(gamma):
    """`choose(logits, forced)` of top-p where forced blocks do not count."""

    def choose(logits, forced):
        mass = softmax(list(logits.values()))
        return top_p(dict(zip(logits, mass, strict=True)), gamma) | forced

    return choose


def by_rank(topk):
    """`choose(logits, forced)` of top-k, where forced blocks count."""

    def choose(logits, forced):
        free = {j: logit for j, logit in logits.items() if j not in forced}
        return best(free, max(0, topk - len(forced))) | forced

    return choose


def listed(plan, n_blocks, block_k):
    """bool `[heads, q_blocks, k_blocks]`: which blocks a plan of one run list names."""
    (run,) = plan.runs
    start, valid = run.expand(HEADS)[0], run.valid(HEADS)
    assert run.width == block_k
    assert not bool((start % block_k)[valid].any())
    mask = torch.zeros(HEADS, plan.n_q_blocks, n_blocks, dtype=torch.bool)
    head, row, slot = valid.nonzero(as_tuple=True)
    mask[head, row, (start[head, row, slot] // block_k).long()] = True
    return mask


def assert_keeps(plan, keeps, block_q, block_k):
    """The plan lists exactly what `keeps(head, m)` says for each query block m of the positions.

    Query blocks of a plan count from the first query: one that straddles two blocks of the position
    grid must list what either keeps, as far as its own rows can see.
    """
    n, offset = plan.kv_len, plan.q_offset
    want = torch.zeros(HEADS, plan.n_q_blocks, -(-n // block_k), dtype=torch.bool)
    for head in range(HEADS):
        for b in range(plan.n_q_blocks):
            first, end = plan.row_range(b)
            for m in {first // block_q, (end - 1) // block_q}:
                for j in keeps(head, m):
                    want[head, b, j] |= j * block_k < end
    assert (plan.q_len, offset) == (n - offset, n - plan.q_len)
    assert torch.equal(listed(plan, want.shape[2], block_k), want)


def assert_lawful(plan, q, k, v):
    """Causal, every row sees itself, and both backends compute the same from it."""
    plan.check()
    seen = plan.to_dense_mask()
    position = torch.arange(plan.q_len) + plan.q_offset
    assert not bool((seen & (torch.arange(plan.kv_len) > position[:, None])).any())
    assert bool(seen[:, torch.arange(plan.q_len), position].all())
    want = block_sparse_attention(q, k, v, plan, backend="reference", return_lse=True)
    got = block_sparse_attention(q, k, v, plan, backend="cpu", return_lse=True)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
