"""The FlashAttention backend's own logic, on CPU tensors: vLLM's kernel is replaced by plain
attention over the same cache. What only a GPU can tell, `scripts/check_serving.py` asks there."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from sparse_patch.exact import Exact
from sparse_patch.serving.account import Account
from sparse_patch.serving.pages import Pages, side_by_side
from sparse_patch.serving.settings import Settings
from tests.serving.test_layer import DIM, HEADS, KV_HEADS, KV_LENS, Q_LENS, SCALE, Step

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

SHAPE = {"type": "llama", "layers": 2, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM}


class Kernel:
    """In the place of vLLM's attention: what it was asked, and plain attention."""

    def __init__(self):
        self.asked = []

    def __call__(self, impl, layer, query, key, value, kv_cache, metadata, output):
        self.asked.append(metadata)
        starts = metadata.query_start_loc.tolist()
        pages = Pages(kv_cache, side_by_side, metadata.block_table)
        for i, kv_len in enumerate(metadata.seq_lens.tolist()):
            rows = slice(starts[i], starts[i + 1])
            k, v = pages.read(i, kv_len)
            out = Exact(scale=SCALE).attend(query[rows].transpose(0, 1)[None], k[None], v[None])
            output[rows] = out[0].transpose(0, 1)
        return output


@pytest.fixture
def kernel(monkeypatch):
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    found = Kernel()
    monkeypatch.setattr(FlashAttentionImpl, "forward", lambda impl, *asked: found(impl, *asked))
    return found


@pytest.fixture
def impl():
    """As vLLM makes it for a decoder layer, without a GPU to ask for its version."""
    from sparse_patch.serving.vllm_flash import SparseFlashImpl

    made = object.__new__(SparseFlashImpl)
    asked = {"method": "dense", "min_length": 100, "layers": [0]}
    settings = Settings.read(asked)
    made.account = Account(settings, settings.choose(SHAPE, 1))
    made.own, made.unpack, made.seen = None, None, False
    made.dtype = torch.float32
    made.attn_type, made.kv_cache_dtype = "decoder", "auto"
    made.num_heads, made.num_kv_heads, made.head_size = HEADS, KV_HEADS, DIM
    made.scale, made.logits_soft_cap, made.sinks, made.alibi_slopes = SCALE, 0, None, None
    made.sliding_window, made.kv_sharing_target_layer_name = (-1, -1), None
    return made


def metadata_of(step, **more):
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    starts = [sum(Q_LENS[:i]) for i in range(len(Q_LENS) + 1)]
    common = {
        "num_actual_tokens": sum(Q_LENS),
        "max_query_len": max(Q_LENS),
        "query_start_loc": torch.tensor(starts, dtype=torch.int32),
        "max_seq_len": max(KV_LENS),
        "seq_lens": torch.tensor(KV_LENS, dtype=torch.int32),
        "block_table": step.pages.table,
        "slot_mapping": torch.empty(0),
        "scheduler_metadata": torch.ones(3),
        "max_num_splits": 16,
    }
    return FlashAttentionMetadata(**{**common, **more})


def forward(impl, step, metadata, layer=0):
    of = SimpleNamespace(layer_name=f"model.layers.{layer}.self_attn.attn")
    cache = step.pages.cache
    return impl.forward(of, step.q, step.k, step.v, cache, metadata, step.out)


def test_sequences_are_shared_out_between_the_op_and_the_kernel(impl, kernel):
    step = Step()
    out = forward(impl, step, metadata_of(step))
    for index, piece in enumerate(step.pieces):
        got = out[piece.start : piece.stop]
        torch.testing.assert_close(got, step.exact(index), atol=1e-5, rtol=1e-5)
    (asked,) = kernel.asked
    assert asked.seq_lens.tolist() == [140, 20, 300]
    assert asked.query_start_loc.tolist() == [0, 1, 21, 26]
    assert (asked.max_query_len, asked.max_seq_len, asked.num_actual_tokens) == (20, 300, 26)
    assert asked.scheduler_metadata is None
    assert impl.account.state(0).stats.sparse == 2


def test_layers_share_the_metadata_of_a_part(impl, kernel):
    step = Step()
    metadata = metadata_of(step)
    forward(impl, step, metadata)
    forward(impl, step, metadata)
    assert kernel.asked[0] is kernel.asked[1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"causal": False}, "not causal"),
        ({"causal": torch.ones(5, dtype=torch.int32)}, "mask"),
        ({"mm_prefix_query_range_tensor": torch.zeros(1)}, "mask"),
        ({"rswa_prefix_lens": torch.zeros(1)}, "mask"),
    ],
)
def test_what_a_step_asks_beyond_causality_is_left_to_the_kernel(impl, kernel, change, reason):
    step = Step()
    metadata = metadata_of(step, **change)
    forward(impl, step, metadata)
    assert kernel.asked == [metadata]
    assert impl.account.state(0).stats.exact[reason] == 2


@pytest.mark.parametrize(
    ("name", "value", "reason", "calls"),
    [
        ("sliding_window", (149, 0), "sliding window", 1),
        ("alibi_slopes", torch.ones(HEADS), "position bias", 2),
        ("kv_cache_dtype", "fp8", "cache", 2),
        ("head_size", DIM // 2, "cache", 1),
    ],
)
def test_what_a_layer_asks_is_counted_by_reason(impl, kernel, name, value, reason, calls):
    """A cache of another form than is known is not read: later chunks go to the kernel."""
    setattr(impl, name, value)
    step = Step()
    forward(impl, step, metadata_of(step))
    assert impl.account.state(0).stats.exact[reason] == calls
    assert len(kernel.asked) == 1


def test_layers_that_are_none_of_ours_are_vllms(impl, kernel):
    step = Step()
    metadata = metadata_of(step)
    forward(impl, step, metadata, layer=1)
    impl.seen, impl.attn_type = False, "encoder_only"
    forward(impl, step, metadata)
    assert kernel.asked == [metadata, metadata]
    assert impl.account.states == {}


def test_prompts_stay_out_of_recorded_graphs():
    from vllm.v1.attention.backend import AttentionCGSupport

    from sparse_patch.serving.vllm_flash import SparseFlashBuilder

    assert SparseFlashBuilder.get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_BATCH


@pytest.mark.parametrize("on_host", [True, False])
def test_lengths_are_taken_from_where_they_need_no_device(monkeypatch, on_host):
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

    from sparse_patch.serving.vllm_flash import SparseFlashBuilder

    step = Step()
    metadata = metadata_of(step)
    monkeypatch.setattr(FlashAttentionMetadataBuilder, "build", lambda *asked: metadata)
    lengths = metadata.seq_lens
    common = SimpleNamespace(
        query_start_loc_cpu=metadata.query_start_loc,
        seq_lens=None if on_host else lengths,
        seq_lens_cpu_upper_bound=lengths if on_host else None,
    )
    built = object.__new__(SparseFlashBuilder).build(0, common)
    assert built.sparse_patch_pieces == step.pieces
