"""What the estimators' kernels share: rows of numbers, their products, sums of logs."""

from __future__ import annotations

import triton
import triton.language as tl

# Logits are in units of log 2: `exp2` is an instruction, `exp` is `exp2` and a product.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def power_of_two(n: int, least: int = 1, most: int | None = None) -> int:
    """The smallest power of two that holds `n`, within bounds that are powers of two."""
    up = max(least, 1 << (n - 1).bit_length())
    return up if most is None else min(up, most)


def split_dim(dim: int) -> tuple[int, int]:
    """Widths, powers of two from 16 on, of the two tiles that hold `dim` numbers; 0: no second.

    Tiles are powers of two. One for all would be padding to a quarter at dims 96 and 192, and more
    at 80; 64 + 32, 128 + 64 and 64 + 16 have none. Where two would be as wide as one, it is one.
    """
    whole = power_of_two(dim, 16)
    first = whole // 2
    if first < 16 or first >= dim:
        return whole, 0
    rest = power_of_two(dim - first, 16)
    return (first, rest) if first + rest < whole else (whole, 0)


@triton.jit
def load_rows(rows, seen, start, WIDTH: tl.constexpr, DIM: tl.constexpr, WHOLE: tl.constexpr):
    """Numbers `start`, ... of each row as `[rows, WIDTH]`; 0 where a row is not `seen`.

    rows: pointers to the rows' first numbers. Numbers past DIM are 0; with WHOLE there are none.
    """
    column = start + tl.arange(0, WIDTH)
    at = rows[:, None] + column[None, :]
    if WHOLE:
        tile = tl.load(at, mask=seen[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=seen[:, None] & (column < DIM)[None, :], other=0.0)
    return tile


@triton.jit
def load_split(rows, seen, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows as two tiles, see `split_dim`; where one holds them the second is the first."""
    first = load_rows(rows, seen, 0, D0, DIM, DIM >= D0)
    second = first
    if D1 > 0:
        second = load_rows(rows, seen, D0, D1, DIM, DIM == D0 + D1)
    return first, second


@triton.jit
def products(
    q0,
    q1,
    q_rows,
    q_seen,
    k_rows,
    k_seen,
    DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
):
    """Products of query rows and key rows: float32 `[queries, keys]`.

    q0, q1: the query rows as `load_split` gives them.
    """
    if q0.dtype == tl.float32:
        # No tensor core keeps float32, and without them a product of whole rows does not fit the
        # registers: short pieces, the queries' too.
        score = tl.zeros([q_rows.shape[0], k_rows.shape[0]], tl.float32)
        for start in range(0, DIM, 16):
            a = load_rows(q_rows, q_seen, start, 16, DIM, DIM % 16 == 0)
            b = load_rows(k_rows, k_seen, start, 16, DIM, DIM % 16 == 0)
            score = tl.dot(a, tl.trans(b.to(tl.float32)), score, input_precision="ieee")
    else:
        k0, k1 = load_split(k_rows, k_seen, DIM, D0, D1)
        score = tl.dot(q0, tl.trans(k0))
        if D1 > 0:
            score = tl.dot(q1, tl.trans(k1), score)
    return score


@triton.jit
def log2_sum(x, AXIS: tl.constexpr):
    """log2 of the sum of 2^x; -inf where all are."""
    best = tl.max(x, AXIS)
    # From -inf, nothing may be taken away. The largest term is 1, so the sum is 1 at least.
    base = tl.where(best == float("-inf"), 0.0, best)
    total = tl.sum(tl.exp2(x - tl.expand_dims(base, AXIS)), AXIS)
    return best + tl.log2(tl.maximum(total, 1.0))


@triton.jit
def log2_add(a, b):
    """log2 of 2^a + 2^b; -inf where both are."""
    best = tl.maximum(a, b)
    base = tl.where(best == float("-inf"), 0.0, best)
    total = tl.exp2(a - base) + tl.exp2(b - base)
    return best + tl.log2(tl.maximum(total, 1.0))
