"""Reading eval.json: baseline, best, last, figures, changes."""

from __future__ import annotations

import math

import pytest

from rlhf_exp.evaluation import outcome


def test_baseline_is_sft_wherever_it_stands_else_the_first(evaluation):
    found = outcome.policies(evaluation)
    assert outcome.baseline([found[2], found[0]])["name"] == "sft"
    assert outcome.baseline(found[1:])["name"] == "ppo@8"


def test_last_is_the_highest_step(evaluation):
    found = outcome.policies(evaluation)
    assert outcome.last(list(reversed(found)))["name"] == "ppo@24"
    assert outcome.last(found[:1])["name"] == "sft"


def test_neither_data_nor_an_average_is_a_checkpoint(with_data):
    found = outcome.policies(with_data)
    assert [policy["name"] for policy in outcome.trained(found)] == ["ppo@8", "ppo@16", "ppo@24"]
    assert outcome.last([*found[:-2], found[-1], found[-2]])["name"] == "ppo@24"
    assert [row["name"] for row in outcome.rows(with_data)][:2] == ["data", "sft"]
    assert outcome.baseline(found)["name"] == "sft"


def test_what_the_data_row_is(evaluation):
    assert outcome.about_data(evaluation) == ""
    one = {"kind": "references", "metrics": {"answers": 1.0, "prompts": 1.0}}
    assert outcome.about_data({"data": one}) == "data: 1 reference of 1 prompt, scored as they are."


def test_no_policies_is_an_error():
    with pytest.raises(ValueError, match="no policies"):
        outcome.policies({"policies": []})


def test_best_is_the_highest_finite_value(evaluation):
    found = outcome.policies(evaluation)
    assert outcome.best(found, outcome.BY_KEY["gold"])["name"] == "ppo@16"
    found[2]["metrics"]["gold"] = math.nan
    assert outcome.best(found, outcome.BY_KEY["gold"])["name"] == "ppo@24"
    assert outcome.best(found, outcome.BY_KEY["kl"]) is None
    assert outcome.best(found[:1], outcome.BY_KEY["gold"]) is None


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (None, ".2f", "–"),
        (math.nan, ".2f", "nan"),
        (-math.inf, ".2f", "-inf"),
        (-0.001, ".2f", "0.00"),
        (-0.004, "+.2f", "0.00"),
        (-0.006, ".2f", "-0.01"),
        (0.0312, ".0%", "3%"),
        (1.5, "+.2f", "+1.50"),
    ],
)
def test_writing_figures(value, spec, text):
    assert outcome.write(value, spec) == text


@pytest.mark.parametrize("value", [None, "0.5", True, [1], {}])
def test_what_is_no_number_counts_as_missing(value):
    assert outcome.number({"gold": value}, "gold") is None
    assert outcome.number(None, "gold") is None


def test_minus_signs_only_before_figures():
    assert outcome.signed("ppo-2: -0.5 (-inf), a-b") == "ppo-2: −0.5 (−inf), a-b"


def test_spread_keeps_both_ends():
    names = list("abcdefghi")
    assert outcome.spread(names, 3) == ["a", "e", "i"]
    assert outcome.spread(names, 9) == names
    assert outcome.spread(names, 1) == ["i"]
    chosen = outcome.spread(names, 5)
    assert chosen == sorted(set(chosen)) and len(chosen) == 5


def test_sampled_leaves_out_policies_without_answers(evaluation):
    for sample in evaluation["samples"]:
        del sample["responses"]["ppo@8"]
    assert outcome.sampled(evaluation, 5) == ["sft", "ppo@16", "ppo@24"]
    assert outcome.sampled({"policies": evaluation["policies"]}, 5) == []


def test_change_from_standard_errors(evaluation):
    before, *_, after = outcome.policies(evaluation)
    mean, low, high = outcome.change(before, after, "reward")
    half = 1.96 * math.sqrt(0.2**2 + 0.1**2)
    assert (mean, low, high) == pytest.approx((2.75, 2.75 - half, 2.75 + half))
    assert outcome.change(before, after, "length") == (pytest.approx(-2.2), None, None)
    assert outcome.change(before, after, "repetition") is None
    assert outcome.change(before, before, "reward") is None


def test_paired_gain_wins_and_then_nothing_else_has_an_interval(evaluation):
    before, *_, after = outcome.policies(evaluation)
    after["gain"] = {"gold": {"mean": 0.4, "low": 0.3, "high": 0.5}}
    assert outcome.change(before, after, "gold") == (0.4, 0.3, 0.5)
    assert outcome.change(before, after, "reward") == (2.75, None, None)
