"""What hides keys: windows, chunks, packed sequences and padding, alone and together.

The truth is the unpatched model with eager attention, whose mask Transformers writes out.
"""

import itertools

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import sparse_patch
from sparse_patch.masks import mask_function
from sparse_patch.sequences import CausalMask, padding_of, spans_of, visible_to_last
from tests.zoo import CHUNK, LAYERS, WINDOW, batch, tiny_model

KEEP = {"block_size": 16, "min_length": 0, "min_queries": 0}
# Families whose mask hides more than the future, by what does it.
LOCAL = {"mistral_swa": WINDOW, "gemma2": WINDOW, "gpt_oss": WINDOW, "llama4_text": CHUNK}


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(ids, **inputs).logits


def tokens(length, batch=1, seed=0):
    return torch.randint(6, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def with_padding(side, length=40, pads=13):
    """Ids, mask and positions of two rows, the first of them padded."""
    ids, mask = tokens(length, batch=2), torch.ones(2, length).long()
    where = {
        "left": slice(0, pads),
        "right": slice(length - pads, None),
        "inner": slice(9, 9 + pads),
    }
    mask[0, where[side]] = 0
    return ids, {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def set_local(model, size):
    for config in {
        id(m.config): m.config for m in model.modules() if hasattr(m, "config")
    }.values():
        config.sliding_window = size
        config.attention_chunk_size = size
    return model


# --- what spans are ------------------------------------------------------------------------------


def visible(spans, kv_len, q_len):
    """bool `[q_len, kv_len]`: what the queries of a row see by its spans."""
    seen = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for span in spans:
        keys, queries = torch.arange(kv_len)[span.keys], torch.arange(q_len)[span.queries]
        for i, query in enumerate(queries):
            first = 0 if span.first is None else int(span.first[i])
            last = len(keys) - len(queries) + i
            assert not seen[query].any(), "a query in two spans"
            seen[query, keys[first : last + 1]] = True
    return seen


@pytest.mark.parametrize("seed", range(60))
def test_spans_show_what_the_numbers_say(seed):
    """Any first keys that never go back, any padding, any number of queries."""
    rng = torch.Generator().manual_seed(seed)
    kv_len = int(torch.randint(1, 60, (1,), generator=rng))
    q_len = int(torch.randint(1, kv_len + 1, (1,), generator=rng))
    place = torch.arange(kv_len)
    first = torch.stack(
        [
            (place - int(torch.randint(0, kv_len, (1,), generator=rng))).clamp(min=0),
            place // 7 * 7,
            torch.randint(0, kv_len, (kv_len,), generator=rng).cummax(0).values.minimum(place),
            place * 0,
        ]
    )
    real = torch.rand(4, kv_len, generator=rng) < 0.8
    mask = first.where(real, kv_len).as_subclass(CausalMask)
    want = (place <= place[:, None]) & (place >= first[..., None]) & real[:, None] & real[..., None]
    for row, spans in enumerate(spans_of(mask, 4, q_len)):
        assert torch.equal(visible(spans, kv_len, q_len), want[row, kv_len - q_len :])
    assert torch.equal(visible_to_last(mask)[real[:, -1], 0, 0], want[real[:, -1], -1])
    assert torch.equal(padding_of(mask), real)
    for row, spans in enumerate(spans_of(real, 4, q_len)):
        want = (place <= place[:, None]) & real[row] & real[row][:, None]
        assert torch.equal(visible(spans, kv_len, q_len), want[kv_len - q_len :])


def test_numbers_of_others_are_padding_not_first_keys():
    mask = torch.tensor([[0, 1, 1, 1]])
    (spans,) = spans_of(mask, 1, 4)
    assert [(span.keys, span.first) for span in spans] == [(slice(1, 4), None)]


def test_only_we_compute_with_a_mask():
    mask = torch.arange(6)[None].as_subclass(CausalMask)
    assert torch.equal(mask.to(torch.bool).as_subclass(torch.Tensor), torch.ones(1, 6).bool())
    assert mask[:, :, -2:, :].shape == (1, 6)
    for misuse in (
        lambda: mask + 1,
        lambda: mask == 0,
        lambda: mask.float(),
        lambda: mask.to(torch.float32),
        lambda: mask[:, None, None],
        lambda: mask[:, :, :, 2:],
        lambda: torch.nn.functional.scaled_dot_product_attention(
            *torch.randn(3, 1, 1, 6, 8), attn_mask=mask.to(torch.bool)
        ),
    ):
        with pytest.raises((RuntimeError, IndexError), match=r"sparse_patch|too many indices"):
            misuse()


# --- windows and chunks --------------------------------------------------------------------------


@pytest.mark.parametrize("family", LOCAL)
@pytest.mark.parametrize("size", [1, 5, 39, 40, 41, 1000])
@pytest.mark.parametrize("side", ["left", "right", "inner"])
def test_any_window_or_chunk_with_padding_anywhere(family, size, side):
    model = set_local(tiny_model(family), size)
    ids, extra = with_padding(side)
    want = logits(model, ids, **extra)
    with sparse_patch.patch(model, "dense", **KEEP) as handle:
        got = logits(model, ids, **extra)
    real = extra["attention_mask"].bool()
    assert (got - want)[real].abs().max() <= 5e-6
    report = handle.report()
    assert "mask" not in report.exact
    if size >= 40:
        assert (report.sparse_calls, report.exact) == (2 * LAYERS, {})


@pytest.mark.parametrize("family", LOCAL)
def test_a_window_as_wide_as_the_row_without_its_padding_hides_nothing(family):
    model = set_local(tiny_model(family), 27)
    ids, extra = with_padding("left")
    with sparse_patch.patch(model, "dense", **KEEP) as handle:
        logits(model, ids[:1], **{name: x[:1] for name, x in extra.items()})
    assert (handle.report().sparse_calls, handle.report().exact) == (LAYERS, {})


@pytest.mark.parametrize("family", LOCAL)
@pytest.mark.parametrize("cache", ["of the model", "without its config"])
def test_chunked_prefill_and_steps_beyond_the_window(family, cache):
    """With a cache that drops what has left the window, and with one that keeps it."""
    model, ids = tiny_model(family), tokens(64, batch=2)

    def all_logits():
        past = DynamicCache(config=model.config) if cache == "of the model" else DynamicCache()
        ends = [(0, 5), (5, 33), (33, 34), (34, 60), *((i, i + 1) for i in range(60, 64))]
        return torch.cat([logits(model, ids[:, a:b], past_key_values=past) for a, b in ends], 1)

    want = all_logits()
    with sparse_patch.patch(model, "dense", **KEEP) as handle:
        got = all_logits()
    assert (got - want).abs().max() <= 5e-6
    assert "mask" not in handle.report().exact


@pytest.mark.parametrize("family", LOCAL)
def test_no_mask_of_length_times_length_is_written_out(family, monkeypatch):
    """`test_exact` has the memory that attention takes."""
    monkeypatch.setattr("sparse_patch.masks.sdpa_mask", lambda **_: 1 / 0)
    model = tiny_model(family)
    with sparse_patch.patch(model, "a_shape", sink=4, window=16, min_length=0):
        logits(model, tokens(200))
        logits(model, tokens(200), attention_mask=(torch.arange(200)[None] >= 30).long())


def test_a_compiled_window_that_hides_nothing_runs_sparse():
    model = set_local(tiny_model("mistral_swa"), 1000)
    ids, extra = with_padding("left")
    with sparse_patch.patch(model, "a_shape", sink=1, window=9, min_length=0) as handle:
        want = logits(model, ids, **extra)
        got = logits(torch.compile(model, backend="eager", fullgraph=True), ids, **extra)
    real = extra["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=0)
    assert handle.report().exact == {}
    torch._dynamo.reset()


def test_a_mask_that_a_model_wants_written_out_is_written_out():
    model = tiny_model("llama")
    with sparse_patch.patch(model, "dense"):
        embeds = torch.zeros(1, 9, 64)
        mask = create_causal_mask(model.config, embeds, None, None, allow_is_causal_skip=False)
        assert mask.shape == (1, 1, 9, 9)
        model.config.sliding_window = 4
        both = lambda *at: at[2] * 0 == 0  # noqa: E731
        mask = create_sliding_window_causal_mask(
            model.config, embeds, None, None, or_mask_function=both
        )
        assert mask.shape == (1, 1, 9, 9)


def test_an_unknown_mask_function_is_written_out():
    assert mask_function(1, 9, 9, mask_function=lambda b, h, q, k: k <= q).shape == (1, 1, 9, 9)
    assert mask_function(1, 9, 9) is None


# --- packed sequences ----------------------------------------------------------------------------

ENDS = [0, 11, 12, 50, 90]


def packing(ends, how):
    """What says that a row is of several sequences."""
    cut = torch.tensor(ends, dtype=torch.int32)
    lengths = cut.diff().tolist()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    index = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None].int()
    longest = max(lengths)
    return {
        "positions": {"position_ids": positions},
        "positions and a mask of ones": {
            "position_ids": positions,
            "attention_mask": torch.ones(1, ends[-1]).long(),
        },
        "seq_idx": {"position_ids": positions, "seq_idx": index},
        "cu_seq_lens": {
            "position_ids": positions,
            "cu_seq_lens_q": cut,
            "cu_seq_lens_k": cut,
            "max_length_q": longest,
            "max_length_k": longest,
        },
    }[how]


def apart(model, ids, ends):
    return torch.cat(
        [logits(model, ids[:, a:b], use_cache=False) for a, b in itertools.pairwise(ends)],
        1,
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", *LOCAL])
@pytest.mark.parametrize(
    "how", ["positions", "positions and a mask of ones", "seq_idx", "cu_seq_lens"]
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_sequences_do_not_see_one_another(family, how, use_cache):
    model, ids = tiny_model(family), tokens(90)
    want = apart(model, ids, ENDS)
    with sparse_patch.patch(model, "dense", **KEEP) as handle:
        got = logits(model, ids, use_cache=use_cache, **packing(ENDS, how))
    assert (got - want).abs().max() <= 5e-6
    assert set(handle.report().exact) <= {"decode", "sliding window"}


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_swa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["positions", "seq_idx"])
def test_packed_sequences_with_padding_do_not_see_one_another(family, side, how):
    model, ids, pads = tiny_model(family), tokens(90), 13
    want = apart(model, ids, ENDS)
    given = packing(ENDS, how) | {"attention_mask": torch.ones(1, 90).long()}
    pad = (pads, 0) if side == "left" else (0, pads)
    padded = {name: torch.nn.functional.pad(x, pad) for name, x in given.items()}
    with sparse_patch.patch(model, "dense", **KEEP):
        got = logits(model, torch.nn.functional.pad(ids, pad), **padded)
    real = padded["attention_mask"].bool()
    assert (got[real] - want[0]).abs().max() <= 5e-6


def test_chunks_packing_and_padding_before_it_are_an_error():
    model, ids = tiny_model("llama4_text"), tokens(103)
    given = packing(ENDS, "positions") | {"attention_mask": torch.ones(1, 90).long()}
    padded = {name: torch.nn.functional.pad(x, (13, 0)) for name, x in given.items()}
    with sparse_patch.patch(model, "dense", **KEEP):
        with pytest.raises(ValueError, match="cannot be combined with packed"):
            logits(model, ids, **padded)


def test_each_packed_sequence_is_sparse_as_it_would_be_alone():
    model, ids = tiny_model("llama"), tokens(90)
    with sparse_patch.patch(model, "a_shape", sink=1, window=9, min_length=0) as handle:
        want = apart(model, ids, ENDS)
        alone = handle.report().sparse_calls, handle.report().exact
        got = logits(model, ids, **packing(ENDS, "positions"))
    assert (got - want).abs().max() <= 5e-6
    assert handle.report().sparse_calls == 2 * alone[0] > 0
    # A sequence of a single token is a decode step alone, and too short for the method here.
    assert sum(handle.report().exact.values()) == 2 * sum(alone[1].values())


def test_a_packed_sequence_that_is_short_runs_exact():
    model, ids = tiny_model("llama"), tokens(90)
    with sparse_patch.patch(model, "a_shape", sink=1, window=9, min_length=20) as handle:
        logits(model, ids, **packing(ENDS, "cu_seq_lens"))
    assert (handle.report().sparse_calls, handle.report().exact) == (2 * LAYERS, {"short": 8})


def test_packed_sequences_train_apart():
    model, ids = tiny_model("llama").train(), tokens(90)
    labels = ids.clone()
    labels[:, ENDS[:-1]] = -100  # the first of each has no token before it

    def gradients(**inputs):
        model.zero_grad()
        model(ids, labels=labels, use_cache=False, **inputs).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    want = gradients(position_ids=packing(ENDS, "positions")["position_ids"])
    with sparse_patch.patch(model, "dense", **KEEP):
        torch.testing.assert_close(
            gradients(**packing(ENDS, "cu_seq_lens")), want, atol=2e-5, rtol=1e-3
        )


@pytest.mark.parametrize("how", ["positions", "cu_seq_lens", "seq_idx"])
def test_packed_sequences_cannot_go_on_from_a_cache(how):
    model = tiny_model("llama")
    with sparse_patch.patch(model, "dense", **KEEP), torch.no_grad():
        past = model(tokens(20), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="cannot continue a cache, which holds 20 tokens"):
            model(tokens(90), past_key_values=past, **packing(ENDS, how))
        model(tokens(90), past_key_values=DynamicCache(), **packing(ENDS, how))


@pytest.mark.parametrize(
    "wrong",
    [{"cu_seq_lens_k": torch.tensor([0, 20, 90])}, {"cu_seq_lens_q": torch.tensor([0, 50, 91])}],
)
def test_packing_that_contradicts_itself_is_an_error(wrong):
    model = tiny_model("llama")
    with sparse_patch.patch(model, "dense", **KEEP):
        with pytest.raises(ValueError, match="cu_seq_lens_q="):
            logits(model, tokens(90), **packing(ENDS, "cu_seq_lens") | wrong)


def test_packing_in_a_compiled_graph_is_an_error():
    model = tiny_model("llama")
    with sparse_patch.patch(model, "dense", **KEEP):
        compiled = torch.compile(model, backend="eager")
        with pytest.raises(RuntimeError, match="cu_seq_lens_q= reached attention"):
            logits(compiled, tokens(90), **packing(ENDS, "cu_seq_lens"))
    torch._dynamo.reset()


def test_packing_that_no_mask_asks_for_is_an_error(monkeypatch):
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **_: None)
    model = tiny_model("llama")
    with sparse_patch.patch(model, "dense", **KEEP):
        with pytest.raises(RuntimeError, match="have seen one another"):
            logits(model, tokens(90), **packing(ENDS, "positions"))
        with pytest.raises(RuntimeError, match="cu_seq_lens_q= reached attention"):
            logits(model, tokens(90), **packing(ENDS, "cu_seq_lens"))


def test_one_sequence_said_as_packed_is_one_sequence():
    model, ids = tiny_model("llama"), tokens(90)
    for ends in ([0, 90], [0, 90, 90]):
        with sparse_patch.patch(model, "dense", **KEEP):
            got = logits(
                model, ids, **packing([0, 90], "positions"), cu_seq_lens_q=torch.tensor(ends)
            )
        assert (got - logits(model, ids)).abs().max() <= 5e-6


def test_positions_of_padding_begin_no_sequence():
    model, inputs = tiny_model("llama"), batch()
    want = model(**inputs).logits
    with sparse_patch.patch(model, "dense", **KEEP), torch.no_grad():
        got = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert (got - want)[real].abs().max() <= 5e-6
