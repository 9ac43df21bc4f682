"""`sparse-patch tune`: choices by price, profiles of them, and a whole run on a tiny model."""

import json

import pytest
import torch
from sparse_patch_eval.ask.capture import capture
from sparse_patch_eval.ask.judge import judge, plan_of
from sparse_patch_eval.cli.app import app
from sparse_patch_eval.tuning.choice import (
    Candidate,
    Measured,
    candidates,
    choose_until,
    measure_layer,
    profile_of,
)
from typer.testing import CliRunner

import sparse_patch

MODEL = {"type": "llama", "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8}
MEAN = {"block_size": 16, "gamma": 0.6}
FLEX = {"block_size": 16, "min_budget": 1, "gamma": 0.5}


def run(*arguments):
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


@pytest.fixture(scope="module")
def measured():
    """Three settings of two methods, two layers, two heads; what pays differs by head."""
    some = [Candidate("mean_pool", {"gamma": x}) for x in (0.5, 0.9)]
    some.append(Candidate("xattention", {"gamma": 0.5}))
    density = [[[0.1, 0.1], [0.1, 0.1]], [[0.5, 0.2], [0.5, 0.5]], [[0.3, 0.6], [0.2, 0.9]]]
    recall = [[[0.5, 0.8], [0.9, 0.5]], [[0.9, 0.9], [0.95, 0.9]], [[0.95, 0.9], [0.9, 0.95]]]
    return Measured(some, [0, 1], torch.tensor(density).double(), torch.tensor(recall).double())


def test_the_price_of_lost_attention_decides_head_by_head(measured):
    assert measured.choose(1e-3, 2).tolist() == [[0, 0], [0, 0]]
    # Density + recall lost: head 0 of layer 0 costs 0.6, 0.6 and 0.35.
    assert measured.choose(1.0, 2).tolist() == [[2, 0], [0, 0]]
    assert measured.choose(1e4, 2).tolist() == [[2, 1], [1, 2]]
    assert measured.of(torch.tensor([[2, 0], [0, 0]])) == pytest.approx((0.15, 0.7875))


def test_a_layer_has_no_more_methods_than_allowed(measured):
    for price in (0.01, 0.3, 1.0, 10.0, 1e4):
        for row in measured.choose(price, 1).tolist():
            assert len({measured.candidates[i].name for i in row}) == 1
    assert measured.choose(1e4, 1).tolist() == [[2, 2], [1, 1]]


def test_the_choice_of_least_density_that_meets_a_target_is_found(measured):
    choice = choose_until(measured, lambda one: measured.of(one)[1] >= 0.78, 2, most_recall=False)
    assert choice.tolist() == [[2, 0], [0, 0]]
    with pytest.raises(ValueError, match=r"the most that these candidates keep is density 0\.475"):
        choose_until(measured, lambda one: measured.of(one)[1] >= 0.99, 2, most_recall=False)


def test_the_choice_of_most_recall_that_is_fast_enough_is_found(measured):
    """Here what is fast keeps little."""
    for limit in (0.1, 0.15, 0.4, 0.475, 1.0):
        choice = choose_until(
            measured, lambda one, most=limit: measured.of(one)[0] <= most + 1e-6, 2,
            most_recall=True,
        )  # fmt: skip
        density, recall = measured.of(choice)
        assert density <= limit + 1e-6
        others = [measured.of(measured.choose(10.0 ** (n / 20), 2)) for n in range(-60, 80)]
        assert recall == pytest.approx(max(r for d, r in others if d <= limit + 1e-6))
    with pytest.raises(ValueError, match=r"the least that these candidates keep is density 0\.1"):
        choose_until(measured, lambda one: False, 2, most_recall=True)


def test_single_settings_are_compared_at_the_same_recall(measured):
    low, high = measured.recall[:2].mean((1, 2)).tolist()
    assert measured.single("mean_pool", low) == pytest.approx(0.1)
    assert measured.single("mean_pool", (low + high) / 2) == pytest.approx((0.1 + 0.425) / 2)
    assert measured.single("mean_pool", 0.99) is None
    assert measured.single("xattention", 0.5) == pytest.approx(0.5)


def test_measuring_is_what_the_plan_keeps(tiny):
    model, _ = tiny
    ids = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    inside = capture(model, ids).layers[1]
    some = [Candidate("mean_pool", MEAN), Candidate("flexprefill", FLEX)]
    density, recall = measure_layer(some, 1, inside, rows=300)
    for i, one in enumerate(some):
        plan = plan_of(one.method, 1, inside)
        torch.testing.assert_close(density[i], plan.head_density())
        want = torch.tensor(judge(inside, plan).recall).double()
        torch.testing.assert_close(recall[i], want, atol=1e-5, rtol=0)
    exact = [Candidate("mean_pool", {"gamma": 1.0})]
    assert [x.tolist() for x in measure_layer(exact, 1, inside, rows=50)] == [[[1.0] * 4]] * 2


def test_methods_without_blocks_cannot_be_mixed(tiny):
    model, _ = tiny
    ids = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    inside = capture(model, ids, [0]).layers[0]
    pbs = Candidate("pbs", {"block_size": 16, "segment": 32, "tau": 0.5})
    with pytest.raises(ValueError, match="whole blocks of keys"):
        measure_layer([pbs], 0, inside, rows=50)


def test_blocks_that_do_not_fit_are_named_when_the_first_layer_is_measured(tiny):
    model, _ = tiny
    ids = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    inside = capture(model, ids, [0]).layers[0]
    small, large = (Candidate("mean_pool", {"gamma": 0.5, "block_size": size}) for size in (16, 32))
    with pytest.raises(ValueError, match="same number of rows"):
        measure_layer([small, large], 0, inside, rows=50)


def test_heads_that_differ_in_one_number_plan_together():
    some = [Candidate("mean_pool", {"block_size": 16, "gamma": x}) for x in (0.5, 0.9)]
    some += [Candidate("flexprefill", {**FLEX, "gamma": x}) for x in (0.5, 0.9)]
    empty = torch.zeros(4, 2, 4)
    measured = Measured(some, [0, 1], empty, empty)
    profile = profile_of(measured, torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0]]), MODEL, {})
    mean, low, high = profile.layers[0]
    assert (mean.heads, mean.params["gamma"]) == ((0, 1), [0.5, 0.9])
    # FlexPrefill has one gamma for all heads.
    assert (low.heads, low.params["gamma"], high.heads) == ((2,), 0.5, (3,))
    (whole,) = profile.layers[1]
    assert (whole.heads, whole.params["gamma"]) == ((0, 1, 2, 3), 0.5)
    # Heads of a KV group that has others too: its values fill up all places of the group.
    (first, *_) = profile_of(measured, torch.tensor([[0, 2, 1, 2], [0] * 4]), MODEL, {}).layers[0]
    assert (first.heads, first.params["gamma"]) == ((0, 2), [0.5, 0.5, 0.9, 0.5])


def test_candidates_are_settings_of_a_knob():
    some = candidates({"mean_pool": {"block_size": 64}}, 3)
    gammas = [one.params["gamma"] for one in some]
    assert gammas == sorted(gammas)
    assert len(set(gammas)) == 3
    assert {one.params["block_size"] for one in some} == {64}
    with pytest.raises(ValueError, match="no knob"):
        candidates({"dense": {}}, 3)
    with pytest.raises(ValueError, match="blok_size"):
        candidates({"mean_pool": {"blok_size": 64}}, 3)


COMMON = ("--length", "400", "--rows", "100", "--steps", "3", "--prompts", "1", "--held-out", "1")
BLOCKS = (
    "--method",
    "mean_pool:block_size=16",
    "--method",
    "flexprefill:block_size=16,min_budget=1",
)


@pytest.mark.parametrize("target", ["recall=0.9", "kl<=0.5", "speedup>=0.01"])
def test_a_run_writes_a_profile_that_patches_the_model(folder, tiny, tmp_path, target):
    out = tmp_path / "out"
    given = ("--model", folder / "model", "--text", folder / "walks.txt", "--output", out)
    done = run(*given, *COMMON, *BLOCKS, "--target", target)
    assert done.exit_code == 0, done.output
    content = json.loads((out / "profile.json").read_text())
    tuned_on = content["made"]["measured"]["tuned on"]
    if target.startswith("recall"):
        assert tuned_on["recall"] >= 0.9
    if target.startswith("kl"):
        assert tuned_on["kl"] <= 0.5
    assert 0 < tuned_on["density"] <= 1
    report = (out / "tune.md").read_text()
    assert report.count("| mean_pool |") + report.count("| flexprefill |") >= 5
    if not target.startswith("speedup"):
        got = content["made"]["measured"]["held out"][target[:2] if "kl" in target else "recall"]
        good = got <= 0.5 if "kl" in target else got >= 0.9
        assert ("the target is met" if good else "the target is missed by") in report
    model, _ = tiny
    ids = torch.randint(0, 256, (1, 400), generator=torch.Generator().manual_seed(0))
    with (
        torch.no_grad(),
        sparse_patch.patch(model, profile=out / "profile.json", min_length=0) as handle,
    ):
        model(ids)
        assert handle.report().sparse_calls == 2
    # Everything is measured already: nothing is measured again.
    lines = (out / "measured.jsonl").read_text()
    assert run(*given, *COMMON, *BLOCKS, "--target", target).exit_code == 0
    assert (out / "measured.jsonl").read_text() == lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "recall=1.5"], "recall=R with R below 1"),
        (["--target", "density=0.2"], "--target 'density=0.2'"),
        (["--target", "recall=much"], "--target 'recall=much'"),
        (["--target", "recall<=0.9"], "--target 'recall<=0.9'"),
        (["--target", "kl>=0.1"], "--target 'kl>=0.1'"),
        (["--method", "dense"], "no knob"),
        (["--length", "8k"], "trained on 4,096 positions"),
        (["--method", "mean_pol"], "mean_pol"),
    ],
)
def test_bad_options_end_with_a_message_and_code_2(folder, tmp_path, arguments, message):
    done = run("--output", tmp_path, "--model", folder / "model", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
