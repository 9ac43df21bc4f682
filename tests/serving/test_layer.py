"""A step of an engine: who runs sparse, with what answer, and who is left, for which reason."""

import dataclasses

import pytest
import torch
from sparse_patch_kernels import block_sparse_attention

from sparse_patch import describe, get_method
from sparse_patch.call import Call
from sparse_patch.exact import Exact
from sparse_patch.layer import LayerState
from sparse_patch.routing import REASONS, Options
from sparse_patch.serving.batch import pieces_of
from sparse_patch.serving.layer import EngineLayer
from sparse_patch.serving.pages import Pages, side_by_side

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 32, 16
SCALE = DIM**-0.5
# A decode step, a fresh prompt, a later chunk, a short prompt, and a chunk of a few tokens.
Q_LENS, KV_LENS = [1, 150, 70, 20, 5], [140, 150, 201, 20, 300]
REASONS_LEFT = {"decode": 1, "short": 1, "few queries": 1}
DENSE = get_method("dense")


def layer(method=DENSE, **more):
    options = Options(min_length=100, min_queries=64, backend="cpu", measure_recall=False)
    return EngineLayer(LayerState(0, method, options), Call(scale=SCALE), KV_HEADS, **more)


@dataclasses.dataclass
class Step:
    """Random sequences, as an engine has them: tokens of the step in a row, all keys in pages."""

    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        generator = torch.Generator().manual_seed(3)

        def draw(heads, length):
            return torch.randn(heads, length, DIM, generator=generator).to(self.dtype)

        self.whole = [[draw(n, kv) for n in (HEADS, KV_HEADS, KV_HEADS)] for kv in KV_LENS]
        starts = [sum(Q_LENS[:i]) for i in range(len(Q_LENS) + 1)]
        self.pieces = pieces_of(starts, KV_LENS)
        rows = zip(self.whole, Q_LENS, strict=True)
        tokens = [[x[:, -n:].transpose(0, 1) for x in one] for one, n in rows]
        self.q, self.k, self.v = (torch.cat(one) for one in zip(*tokens, strict=True))
        self.out = torch.full_like(self.q, 77.0)
        most = -(-max(KV_LENS) // BLOCK)
        table = torch.randperm(len(KV_LENS) * most, generator=generator).view(-1, most)
        cache = torch.full((table.numel(), KV_HEADS, BLOCK, 2 * DIM), float("nan"))
        cache = cache.to(self.dtype)
        for (_, k, v), blocks in zip(self.whole, table, strict=True):
            for place, start in zip(blocks, range(0, k.shape[1], BLOCK), strict=False):
                both = torch.cat([k, v], -1)[:, start : start + BLOCK]
                cache[place, :, : both.shape[1]] = both
        self.pages = Pages(cache, side_by_side, table.to(torch.int32))

    def attend(self, of, **more):
        inputs = {"q": self.q, "k": self.k, "v": self.v, "pages": self.pages, **more}
        return of.attend(self.pieces, out=self.out, **inputs)

    def exact(self, index, **asked):
        """`[q_len, heads, dim]` of a sequence, by exact attention over all of its keys."""
        q, k, v = self.whole[index]
        q = q[:, -Q_LENS[index] :]
        out = Exact(scale=SCALE, **asked).attend(q[None], k[None], v[None])
        return out[0].transpose(0, 1)

    def rows(self, index):
        return self.out[self.pieces[index].start : self.pieces[index].stop]


def test_dense_is_exact_attention_for_prompts_and_later_chunks():
    step, of = Step(), layer()
    left = step.attend(of)
    assert [piece.index for piece in left] == [0, 3, 4]
    for index in (1, 2):
        torch.testing.assert_close(step.rows(index), step.exact(index), atol=1e-5, rtol=1e-5)
    assert of.state.stats.sparse == 2
    assert dict(of.state.stats.exact) == REASONS_LEFT


def test_what_is_left_to_the_engine_is_not_touched():
    step = Step()
    left = step.attend(layer())
    assert all(bool((step.rows(piece.index) == 77).all()) for piece in left)


@pytest.mark.parametrize("name", ["strided", "flexprefill", "a_shape"])
def test_a_method_chooses_among_all_keys_of_the_sequence(name):
    """A chunk is planned as rows after the keys before it."""
    chosen = get_method(name, **describe(name).examples["sparse"])
    of = layer(chosen)
    step = Step()
    step.attend(of)
    for index in (1, 2):
        q, k, v = step.whole[index]
        q = q[:, -Q_LENS[index] :]
        plan = chosen.plan(q, k, scale=SCALE, q_offset=KV_LENS[index] - Q_LENS[index])
        want = block_sparse_attention(q, k, v, plan, scale=SCALE, backend="cpu")
        torch.testing.assert_close(step.rows(index), want.transpose(0, 1))
    assert 0 < float(of.state.stats.density) < 2


def test_soft_caps_and_sinks_are_those_of_the_layer():
    sinks = torch.tensor([3.0, 0.5, -1.0, 2.0])
    for asked in ({"softcap": 2.0}, {"sinks": sinks}):
        step, of = Step(), layer()
        of.call = Call(scale=SCALE, **asked)
        step.attend(of)
        for index in (1, 2):
            got, want = step.rows(index), step.exact(index, **asked)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            assert (got - step.exact(index)).abs().max() > 0.01


def test_a_window_that_hides_keys_is_exact_and_one_that_hides_none_is_not():
    step, of = Step(), layer(window=180)
    left = step.attend(of)
    assert [piece.index for piece in left] == [0, 2, 3, 4]
    assert of.state.stats.exact["sliding window"] == 1
    torch.testing.assert_close(step.rows(1), step.exact(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reason", ["position bias", "cache"])
def test_a_layer_may_always_be_exact(reason):
    step, of = Step(), layer(always_exact=reason)
    assert step.attend(of) == step.pieces
    assert of.state.stats.exact == {**REASONS_LEFT, reason: 2}


@pytest.mark.parametrize("reason", ["mask", "not causal"])
def test_so_may_a_step(reason):
    step, of = Step(), layer()
    assert step.attend(of, why_all_exact=reason) == step.pieces
    assert of.state.stats.exact[reason] == 2


def test_without_a_cache_that_can_be_read_only_fresh_prompts_run_sparse():
    step, of = Step(), layer()
    assert [piece.index for piece in step.attend(of, pages=None)] == [0, 2, 3, 4]
    assert of.state.stats.exact["cache"] == 1


def test_a_layer_that_shares_a_cache_reads_all_keys_there():
    """What comes with the tokens is then not what the cache holds."""
    step, of = Step(), layer(has_own_keys=False)
    step.attend(of, k=torch.zeros_like(step.k), v=torch.zeros_like(step.v))
    torch.testing.assert_close(step.rows(1), step.exact(1), atol=1e-5, rtol=1e-5)


def test_layers_kept_dense_and_broken_numbers_are_counted():
    step, of = Step(), layer(None)
    assert step.attend(of) == step.pieces
    assert of.state.stats.exact == {"decode": 1, "layer kept dense": 4}
    step, of = Step(), layer()
    step.q[10] = float("nan")
    assert [piece.index for piece in step.attend(of)] == [0, 1, 3, 4]
    assert of.state.stats.exact["non-finite"] == 1


def test_every_reason_is_one_that_the_library_knows():
    assert {"cache", "position bias", "sliding window", "mask", "not causal"} <= set(REASONS)


def test_the_dtype_of_the_engine_is_kept():
    step = Step(dtype=torch.bfloat16)
    step.attend(layer())
    torch.testing.assert_close(step.rows(2), step.exact(2), atol=0.02, rtol=0.02)
