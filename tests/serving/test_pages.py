"""Keys and values are read back from a paged cache, whatever its blocks look like inside."""

import pytest
import torch

from sparse_patch.serving.pages import Pages, find_packing, side_by_side

BLOCK, DIM, HEADS = 32, 48, 3


def transposed(x):
    return x.mT.flatten()


def plain(x):
    return x.flatten()


def tiled(x):
    """As for matrix units: groups of 16 tokens, in which two channels of a token lie together."""
    groups = x.view(BLOCK // 16, 16, DIM // 2, 2)
    return groups.transpose(1, 2).flatten()


def shuffled(x):
    generator = torch.Generator().manual_seed(5)
    return x.flatten()[torch.randperm(x.numel(), generator=generator)]


PACKINGS = [plain, transposed, tiled, shuffled]


def packed(pack_k, pack_v, keys, values, table):
    """A cache `[blocks, heads, BLOCK, 2 * DIM]`: keys, values `[heads, kv_len, DIM]` in it."""
    cache = torch.full((9, HEADS, BLOCK, 2 * DIM), float("nan"), dtype=keys.dtype)
    for place, start in zip(table, range(0, keys.shape[1], BLOCK), strict=True):
        for head in range(HEADS):
            halves = []
            for pack, x in ((pack_k, keys), (pack_v, values)):
                block = torch.full((BLOCK, DIM), float("nan"), dtype=x.dtype)
                part = x[head, start : start + BLOCK]
                block[: len(part)] = part
                halves.append(pack(block))
            cache[place, head] = torch.cat(halves).view(BLOCK, 2 * DIM)
    return cache


@pytest.mark.parametrize("pack_v", PACKINGS)
@pytest.mark.parametrize("pack_k", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packing_is_found_by_writing_numbers(pack_k, pack_v, dtype):
    packing = find_packing(lambda k, v: (pack_k(k), pack_v(v)), BLOCK, DIM, dtype)
    keys, values = torch.randn(2, HEADS, 70, DIM).to(dtype)
    table = [4, 1, 7]
    cache = packed(pack_k, pack_v, keys, values, table)
    tables = torch.tensor([[0, 0, 0, 0], [*table, 0]], dtype=torch.int32)
    got = Pages(cache, packing, tables).read(1, 70)
    assert torch.equal(got[0], keys)
    assert torch.equal(got[1], values)


@pytest.mark.parametrize("kv_len", [1, 31, 32, 33, 64])
def test_the_last_block_need_not_be_full(kv_len):
    keys, values = torch.randn(2, HEADS, kv_len, DIM)
    table = list(range(-(-kv_len // BLOCK)))
    cache = packed(plain, plain, keys, values, table)
    packing = find_packing(lambda k, v: (plain(k), plain(v)), BLOCK, DIM, torch.float32)
    got = Pages(cache, packing, torch.tensor([[*table, 8]])).read(0, kv_len)
    assert torch.equal(got[0], keys)
    assert torch.equal(got[1], values)


def test_a_cache_whose_tokens_hold_key_and_value_side_by_side():
    keys, values = torch.randn(2, HEADS, 40, DIM)
    cache = torch.zeros(5, HEADS, BLOCK, 2 * DIM)
    both = torch.cat([keys, values], -1)
    cache[3], cache[0, :, :8] = both[:, :32], both[:, 32:]
    got = Pages(cache, side_by_side, torch.tensor([[3, 0]])).read(0, 40)
    assert torch.equal(got[0], keys)
    assert torch.equal(got[1], values)


@pytest.mark.parametrize(
    "lossy",
    [
        lambda x: x.flatten() * 0.5,
        lambda x: x.flatten().to(torch.float8_e4m3fn).to(x.dtype),
        lambda x: torch.zeros_like(x).flatten(),
        lambda x: x.flatten().to(torch.int8),
        lambda x: torch.cat([x.flatten(), x.flatten()]),
        lambda x: torch.full_like(x, float("nan")).flatten(),
    ],
    ids=["scaled", "8 bits", "nothing", "another type", "twice", "nan"],
)
def test_a_cache_that_does_not_hold_values_as_they_are_is_not_read(lossy):
    for write in (lambda k, v: (lossy(k), plain(v)), lambda k, v: (plain(k), lossy(v))):
        assert find_packing(write, BLOCK, DIM, torch.bfloat16) is None
