"""Every keyword that reaches attention is understood, or refused in words."""

import ast
import pathlib
import re

import pytest
import torch
import transformers
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils import TransformersKwargs

import sparse_patch
from sparse_patch import call
from sparse_patch.attention import attention_function
from sparse_patch.exact import Exact
from tests.zoo import COMMON, WINDOW, batch, tiny_model

KEEP = {"block_size": 16, "min_length": 0, "min_queries": 0}
TENSORS = {"query", "key", "value", "attention_mask", "dropout", "scaling"}


def understood(name):
    known = call._HANDLED | call._IN_THE_MASK | call._ELSEWHERE | call._SELECTS_KEYS
    return name in known | TENSORS | {"cache"}


def keywords_of_all_families():
    """(family, keyword) of every call of an attention function in Transformers' models.

    Only the calls are parsed: the syntax trees of whole files would take twenty times as long.
    """
    folder = pathlib.Path(transformers.__file__).parent / "models"
    for path in sorted(folder.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"\battention_interface\(", text):
            call = ast.parse(text[match.start() : closing(text, match.end())], mode="eval").body
            for keyword in call.keywords:
                if keyword.arg is not None:
                    yield path.parent.name, keyword.arg


def closing(text, start):
    """Where the parenthesis that was opened before `start` is closed again."""
    depth = 1
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place + 1
    raise ValueError("a parenthesis is never closed")


def test_what_transformers_models_pass_is_understood():
    found = set(keywords_of_all_families())
    assert len({family for family, _ in found}) > 200
    assert not [(family, name) for family, name in sorted(found) if not understood(name)]


def test_what_users_may_pass_to_a_forward_is_understood():
    for names in (TransformersKwargs, FlashAttentionKwargs):
        assert all(understood(name) for name in names.__annotations__)


@pytest.mark.parametrize("value", [torch.ones(1), 2.0, 1, "text", True])
def test_an_unknown_keyword_is_refused(value):
    model = tiny_model("llama")
    with sparse_patch.patch(model, "dense", **KEEP):
        with pytest.raises(RuntimeError, match="attention_temperature= reached attention"):
            model(**batch(), attention_temperature=value)
        model(**batch(), attention_temperature=None)


def test_harmless_keywords_pass():
    model, inputs = tiny_model("llama"), batch()
    want = model(**inputs).logits
    more = {"num_items_in_batch": torch.tensor(3), "output_router_logits": True}
    with sparse_patch.patch(model, "dense", **KEEP), torch.no_grad():
        got = model(**inputs, **more, token_type_ids=torch.zeros(2, 40).long()).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=0)


# --- what is shaped by batch, query and key ------------------------------------------------------


class Module(torch.nn.Module):
    is_causal = True


def truth(q, k, v, real, bias=None, sinks=None):
    """Every row as it would be alone, padding at zero."""
    out = torch.zeros(*q.shape[:3], v.shape[3])
    for i in range(len(q)):
        row, keys = slice(i, i + 1), real[i].nonzero()[:, 0]
        queries = real[i, -q.shape[2] :].nonzero()[:, 0]
        if bias is not None:
            whole = bias.expand(len(q), q.shape[1], q.shape[2], -1)
            own_bias = whole[row, :, queries][..., keys]
        own_sinks = sinks[row, :, queries] if sinks is not None and sinks.ndim > 1 else sinks
        exact = Exact(bias=None if bias is None else own_bias, sinks=own_sinks)
        cut = q[row, :, queries], k[row, :, keys], v[row, :, keys]
        out[i, :, queries] = exact.attend(*cut)[0]
    return out.transpose(1, 2)


HOLES = {"left": slice(0, 9), "right": slice(25, 30), "inner": slice(5, 11), "none": slice(0)}


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (2, 1), (1, 1)])
@pytest.mark.parametrize("q_len", [30, 12, 1])
@pytest.mark.parametrize("holes", HOLES)
def test_a_bias_is_cut_as_its_row_is(shape, q_len, holes):
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 4, q_len, 16), torch.randn(2, 2, 2, 30, 16)
    real = torch.ones(2, 30, dtype=torch.bool)
    real[
        0,
        {"left": slice(0, 9), "right": slice(25, 30), "inner": slice(5, 11), "none": slice(0)}[
            holes
        ],
    ] = False
    if q_len == 1:
        real[:, -1] = True
    bias, mask = torch.randn(*shape, q_len, 33), None if holes == "none" else real
    for sinks in (None, torch.randn(4), torch.randn(2, 4, q_len)):
        given = {"position_bias": bias}
        if sinks is not None:
            given["sinks"] = sinks if sinks.ndim == 1 else sinks[..., None]
        got, _ = attention_function(Module().eval(), q, k, v, mask, **given)
        want = truth(q, k, v, real, bias, sinks)
        torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


def test_sinks_by_query_are_exact_and_counted():
    model = tiny_model("llama")
    module = model.model.layers[0].self_attn
    q, (k, v) = torch.randn(1, 4, 40, 16), torch.randn(2, 1, 2, 40, 16)
    sinks = torch.randn(1, 4, 40, 1)
    with sparse_patch.patch(model, "dense", **KEEP) as handle, torch.no_grad():
        with pytest.warns(sparse_patch.SparsePatchWarning, match="sinks that depend on the query"):
            got, _ = attention_function(module, q, k, v, None, sinks=sinks)
    want = Exact(sinks=sinks[..., 0]).attend(q, k, v).transpose(1, 2)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
    assert handle.report().exact == {"sinks by query": 1}


@pytest.mark.parametrize(
    "given",
    [
        {"position_bias": torch.zeros(1, 4, 40)},
        {"position_bias": torch.zeros(3, 4, 40, 40)},
        {"position_bias": torch.zeros(1, 4, 40, 39)},
        {"position_bias": torch.zeros(1, 2, 40, 40)},
        {"sinks": torch.zeros(3)},
        {"s_aux": torch.zeros(1, 4, 40)},
    ],
    ids=lambda given: str({name: tuple(x.shape) for name, x in given.items()}),
)
def test_a_shape_that_could_be_misread_is_an_error(given):
    q, (k, v) = torch.randn(1, 4, 40, 16), torch.randn(2, 1, 2, 40, 16)
    with pytest.raises(RuntimeError, match=r"sparse_patch: (a position bias|attention sinks)"):
        attention_function(Module().eval(), q, k, v, None, **given)


# --- dtypes --------------------------------------------------------------------------------------


def sdpa(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    ).transpose(1, 2)


@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float16),
        (torch.float32,) * 3,
        (torch.float64,) * 3,
    ],
    ids=lambda dtypes: " ".join(str(one)[6:] for one in dtypes),
)
def test_unlike_dtypes_are_what_sdpa_makes_of_them(dtypes, autocast, length):
    """Whether the prompt is below `min_length` or not."""
    model = tiny_model("llama")
    module = model.model.layers[0].self_attn
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, length, 16).to(dtype)
        for heads, dtype in zip((4, 2, 2), dtypes, strict=True)
    )
    enabled = autocast is not None
    with sparse_patch.patch(model, "dense", min_length=100), torch.no_grad():
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=enabled):
            try:
                want = sdpa(q, k, v)
            except RuntimeError:
                with pytest.raises(ValueError, match="attention takes one dtype, unpatched too"):
                    attention_function(module, q, k, v, None)
                return
            got, _ = attention_function(module, q, k, v, None)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=2e-2 if enabled else 2e-6, rtol=0)


@pytest.mark.parametrize("method", ["a_shape", "flexprefill", "xattention", "hip"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_a_model_under_autocast_chooses_in_full_precision(family, method):
    """Rotary embeddings give q and k in float32 and v comes in bfloat16; selection computes as it
    would with a model that is all of bfloat16, not in what autocast makes of its products."""
    model = tiny_model(family)
    ids = torch.randint(6, 128, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(ids).logits
        with sparse_patch.patch(model, "dense", **KEEP) as handle:
            got = model(ids).logits
        with sparse_patch.patch(model, method, min_length=0, dense_layers=0) as sparse:
            model(ids)
    assert handle.report().sparse_calls > 0
    assert sparse.report().calls == 4
    assert (got.float() - want.float()).abs().mean() < 5e-3


def test_training_under_autocast_has_gradients():
    model = tiny_model("llama").train()
    ids = torch.randint(6, 128, (1, 60), generator=torch.Generator().manual_seed(0))
    with sparse_patch.patch(model, "dense", **KEEP), torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids, labels=ids).loss.backward()
    assert bool(torch.isfinite(model.model.embed_tokens.weight.grad).all())


@pytest.mark.parametrize("family", ["inkling", "inkling2"])
def test_inkling_with_padding_equals_unpatched(family):
    """Its position bias, and in the second its sinks, are by row and query."""
    kind = {"inkling": "Inkling", "inkling2": "Inkling2"}[family]
    if not hasattr(transformers, kind + "TextConfig"):
        pytest.skip(f"Transformers {transformers.__version__} has no {kind}")
    sizes = COMMON | {
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "n_routed_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["hybrid_sliding", "hybrid"],
    }
    known = vars(getattr(transformers, kind + "TextConfig")())
    config = getattr(transformers, kind + "TextConfig")(
        **{name: value for name, value in sizes.items() if name in known}
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    inputs = batch()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = model(**inputs).logits
        with sparse_patch.patch(model, "dense", **KEEP):
            got = model(**inputs).logits
    assert (got - want)[real].abs().max() <= 5e-6
