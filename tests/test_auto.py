"""`patch(..., min_length="auto")`: what a patched model answers, counts and leaves alone.

The costs given here are such that measured times decide nothing: exact attention takes ages or no
time at all.
"""

import copy
import io

import pytest
import torch

import sparse_patch
from sparse_patch import budget, layer, patching, routing
from sparse_patch.costs import CostModel, Rate
from tests.zoo import tiny_model

FLEX = {"block_size": 16, "min_budget": 1, "gamma": 0.5, "min_queries": 0}
FLEX_NUMBER = {**FLEX, "min_length": 0}
AGES, NONE = Rate(1e6, 0, 1), Rate(1e-9, 0, 0)
PAYS = CostModel(sdpa=AGES, dense=AGES, sparse=Rate(0, 0, 1e-9))
NEVER_PAYS = CostModel(sdpa=NONE, dense=AGES, sparse=NONE)
NEVER_PAYS_BY_OP = CostModel(sdpa=AGES, dense=NONE, sparse=NONE)
KEEPS_TOO_MUCH = CostModel(sdpa=AGES, dense=AGES, sparse=Rate(0, 0, 10))
"""A plan pays that keeps a tenth."""


@pytest.fixture
def llama():
    return tiny_model("llama")


def tokens(batch=1, length=200):
    return torch.randint(6, 128, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(ids, **inputs).logits


def padded():
    ids, mask = tokens(2), torch.ones(2, 200).long()
    ids[1, :67], mask[1, :67] = 0, 0
    return ids, {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def test_where_sparse_pays_it_is_as_with_a_number(llama):
    ids, extra = padded()
    with sparse_patch.patch(llama, "flexprefill", **FLEX_NUMBER):
        want = logits(llama, ids, **extra)
    with sparse_patch.patch(llama, "flexprefill", min_length="auto", costs=PAYS, **FLEX) as handle:
        got = logits(llama, ids, **extra)
    assert torch.equal(got, want)
    assert handle.report().sparse_calls == 8
    assert handle.report().exact == {}


def test_with_no_method_named_the_recommended_one_runs_where_it_pays(llama):
    recommended = sparse_patch.get_method(sparse_patch.RECOMMENDED)
    with sparse_patch.patch(llama, costs=PAYS) as handle:
        want = logits(llama, tokens())
    assert handle.method == recommended
    assert handle.report().sparse_calls == 4  # of 200 tokens: no length is too short
    with sparse_patch.patch(llama, recommended, min_length="auto", costs=PAYS):
        assert torch.equal(logits(llama, tokens()), want)
    with sparse_patch.patch(llama, gamma=0.5, min_length=300) as handle:
        logits(llama, tokens())
    assert handle.method == sparse_patch.get_method(sparse_patch.RECOMMENDED, gamma=0.5)
    assert handle.report().exact == {"short": 4}


@pytest.mark.parametrize("method", [sparse_patch.RECOMMENDED, "flexprefill:gamma=0.5", "dense"])
def test_a_method_that_is_named_runs_from_1024_keys_on(llama, method):
    with sparse_patch.patch(llama, method) as handle:
        logits(llama, tokens(length=1023))
        assert handle.report().exact == {"short": 4}
        logits(llama, tokens(length=1024))
    assert handle.method == sparse_patch.get_method(method)
    assert handle.report().exact["short"] == 4


@pytest.mark.parametrize("costs", [NEVER_PAYS, NEVER_PAYS_BY_OP])
def test_where_it_never_pays_the_answer_is_that_of_dense(llama, costs):
    ids, extra = padded()
    want = logits(llama, ids, **extra)
    with sparse_patch.patch(llama, "flexprefill", min_length="auto", costs=costs, **FLEX) as handle:
        got = logits(llama, ids, **extra)
    real = extra["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-4, rtol=0)
    assert handle.report().exact == {"costs more": 8}
    assert "costs more 8" in str(handle.report())


def test_exact_attention_runs_the_cheaper_way(llama, monkeypatch):
    by_op = []
    op = layer.block_sparse_attention
    monkeypatch.setattr(
        layer,
        "block_sparse_attention",
        lambda *args, **more: by_op.append(args[3].sink) or op(*args, **more),
    )
    for costs, calls in ((NEVER_PAYS, []), (NEVER_PAYS_BY_OP, [200] * 4)):
        with sparse_patch.patch(llama, "flexprefill", min_length="auto", costs=costs, **FLEX):
            logits(llama, tokens())
        assert by_op == calls


def test_a_plan_that_keeps_too_much_is_not_run(llama, monkeypatch):
    """Here plans take no time."""
    want = logits(llama, tokens())
    options = {"min_length": "auto", "costs": KEEPS_TOO_MUCH, **FLEX}
    with sparse_patch.patch(llama, "flexprefill", **options) as handle:
        monkeypatch.setattr(handle._states[0][1].options.budget, "clock", lambda: 0.0)
        got = [logits(llama, tokens()) for _ in range(3)]
    for one in got:
        torch.testing.assert_close(one, want, atol=1e-4, rtol=0)
    assert handle.report().exact == {"keeps too much": 12}


def test_plans_that_lose_are_stopped(llama, monkeypatch):
    """Each plan takes half of what exact attention would, on a clock that says so."""
    clock = iter(range(10**6))
    options = {"min_length": "auto", "costs": KEEPS_TOO_MUCH, **FLEX}
    with sparse_patch.patch(llama, "flexprefill", **options) as handle:
        account = handle._states[0][1].options.budget
        monkeypatch.setattr(account, "clock", lambda: next(clock) * 1e6)
        for _ in range(5):
            logits(llama, tokens())
    exact = handle.report().exact
    assert exact["keeps too much"] <= 2
    assert exact["did not pay before"] == 20 - exact["keeps too much"]


def test_soft_caps_and_sinks_go_through_the_op():
    for family in ("gemma2", "gpt_oss"):
        model = tiny_model(family)
        ids = tokens(length=60)
        want = logits(model, ids)
        with sparse_patch.patch(
            model, "dense", min_length="auto", costs=NEVER_PAYS_BY_OP
        ) as handle:
            got = logits(model, ids)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        assert handle.report().exact["costs more"] > 0


def test_chunks_are_costed_too(llama):
    ids = tokens(length=300)
    want = logits(llama, ids)
    for costs in (NEVER_PAYS, NEVER_PAYS_BY_OP):
        options = {"min_length": "auto", "costs": costs, **FLEX}
        with sparse_patch.patch(llama, "flexprefill", **options), torch.no_grad():
            first = llama(ids[:, :150], use_cache=True)
            got = llama(ids[:, 150:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(got, want[:, 150:], atol=1e-4, rtol=0)


def test_decode_steps_run_exact_even_of_methods_that_decode_sparsely(llama):
    with sparse_patch.patch(llama, "hip", min_length="auto", costs=PAYS) as handle:
        llama.generate(tokens(), max_new_tokens=3, do_sample=False)
    assert handle.report().decode_calls == 0
    assert handle.report().exact["decode"] == 8


def test_layers_kept_dense_take_no_part_in_the_account(llama):
    options = {"min_length": "auto", "costs": PAYS, "dense_layers": 1, **FLEX}
    with sparse_patch.patch(llama, "flexprefill", **options) as handle:
        logits(llama, tokens())
    assert handle._states[0][1].options.budget.layers == 3
    assert handle.report().exact == {"layer kept dense": 1}


def test_copies_have_accounts_of_their_own(llama):
    sparse_patch.patch(llama, "flexprefill", min_length="auto", costs=PAYS, **FLEX)
    want = logits(llama, tokens())
    file = io.BytesIO()
    torch.save(llama, file)
    file.seek(0)
    account = llama.model.layers[0].self_attn._sparse_patch.options.budget
    for clone in (copy.deepcopy(llama), torch.load(file, weights_only=False)):
        other = [layer.self_attn._sparse_patch.options.budget for layer in clone.model.layers]
        assert other[0] is not account
        assert all(one is other[0] for one in other)  # shared by its layers
        assert torch.equal(logits(clone, tokens()), want)


def test_a_compiled_model_goes_the_same_way(llama):
    with sparse_patch.patch(llama, "flexprefill", min_length="auto", costs=PAYS, **FLEX) as handle:
        want = logits(llama, tokens())
        compiled = torch.compile(llama, backend="eager", fullgraph=True)
        assert torch.equal(logits(compiled, tokens()), want)
    assert handle.report().sparse_calls == 8


def test_a_number_measures_nothing_and_keeps_no_account(llama, monkeypatch):
    def measured(dtype):
        raise AssertionError("costs were asked for")

    monkeypatch.setattr(patching, "of_this_machine", measured)
    monkeypatch.setattr(budget, "of_this_machine", measured)
    with sparse_patch.patch(llama, "flexprefill", **FLEX_NUMBER) as handle:
        logits(llama, tokens())
    assert handle.report().sparse_calls == 4
    with sparse_patch.patch(llama, "flexprefill", min_length=300, **FLEX) as handle:
        logits(llama, tokens())
    assert handle.report().exact == {"short": 4}


def test_the_machine_is_measured_when_it_is_patched(llama, monkeypatch):
    asked = []
    for module in (patching, budget):
        monkeypatch.setattr(module, "of_this_machine", lambda dtype: asked.append(dtype) or PAYS)
    with sparse_patch.patch(llama, "flexprefill", min_length="auto", **FLEX) as handle:
        assert asked == [torch.float32]
        logits(llama, tokens())
    assert handle.report().sparse_calls == 4


def test_elsewhere_auto_is_a_length(llama, monkeypatch):
    """As on a GPU: what is not the CPU backend is neither costed nor timed."""
    options = {"min_length": "auto", "backend": "reference", **FLEX}
    monkeypatch.setattr(patching, "ELSEWHERE_MIN_LENGTH", 200)
    with sparse_patch.patch(llama, "flexprefill", **options) as handle:
        logits(llama, tokens(length=199))
        logits(llama, tokens())
    assert handle.report().exact == {"short": 4}
    assert handle.report().sparse_calls == 4


def test_reasons_are_known():
    assert {"costs more", "keeps too much", "did not pay before"} <= set(routing.REASONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_length": "always"}, "min_length='always' must be .* or 'auto'"),
        ({"min_length": "auto", "costs": "costs.json"}, "costs='costs.json' must be"),
        ({"costs": PAYS}, "costs=CostModel.* needs min_length='auto'"),
    ],
)
def test_bad_arguments_are_named(llama, options, message):
    with pytest.raises(ValueError, match=message):
        sparse_patch.patch(llama, "flexprefill", **options)
    assert "_sparse_patch_book" not in llama.model.__dict__
