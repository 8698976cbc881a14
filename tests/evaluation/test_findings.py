"""The report's sentences."""

from __future__ import annotations

import math

import pytest

from rlhf_exp.evaluation.findings import verdict, warnings


def last(evaluation):
    return evaluation["policies"][-1]


def test_verdict_names_the_figures(evaluation):
    last(evaluation)["gain"] = {"gold": {"mean": 0.4, "low": 0.25, "high": 0.5}}
    assert verdict(evaluation["policies"]) == (
        "After 24 PPO steps the gold score rose from 0.10 to 0.50 (+0.40, 95 % interval +0.25 to +0.50), "
        "at a KL of 7.0 nats from SFT. Answers went from 14.2 to 12.0 tokens; none is empty."
    )


def test_verdict_says_of_how_many_prompts_and_where_they_are_too_few(evaluation):
    assert "95 % interval +0.26 to +0.54 over 64 prompts" in verdict(evaluation["policies"], 64)
    last(evaluation)["gain"] = {"gold": {"mean": 0.4, "low": None, "high": None}}
    assert "went from 0.10 to 0.50 (+0.40; 4 prompts are too few for an interval)" in verdict(
        evaluation["policies"], 4
    )


@pytest.mark.parametrize(
    ("low", "high", "words"), [(-0.1, 0.2, "changed no more than by chance"), (-0.3, -0.1, "fell from")]
)
def test_verdict_claims_no_more_than_the_interval(evaluation, low, high, words):
    last(evaluation)["gain"] = {"gold": {"mean": (low + high) / 2, "low": low, "high": high}}
    assert words in verdict(evaluation["policies"])


def test_verdict_without_gold_and_without_errors(evaluation):
    for policy in evaluation["policies"]:
        policy["metrics"] = {"reward": policy["metrics"]["reward"]}
    assert verdict(evaluation["policies"]) == "After 24 PPO steps the reward went from -0.50 to 2.25 (+2.75)."


def test_verdict_of_one_policy_and_of_no_scores(evaluation):
    first, *_ = evaluation["policies"]
    assert "nothing to compare" in verdict([first])
    for policy in evaluation["policies"]:
        policy["metrics"] = {}
    assert "no score could be compared" in verdict(evaluation["policies"])


def test_a_sound_run_is_not_warned_of(evaluation, curves):
    evaluation["policies"][2]["metrics"]["gold"] = 0.4
    assert warnings(evaluation["policies"], curves) == []
    assert warnings(evaluation["policies"][:1], []) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"empty_rate": 0.0625}, "6.2% of the last checkpoint's answers are empty"),
        ({"length": 7.0}, "shrank to 49% of SFT's length"),
        ({"distinct_2": 0.3}, "Distinct-2 fell to 40% of SFT's"),
        ({"eos_rate": 0.25}, "cut off at the limit"),
        ({"gold": -0.5}, "exploits the reward"),
        ({"kl": math.inf}, "ppo@24: not a finite number: KL"),
    ],
)
def test_each_sign_of_trouble_is_named(evaluation, change, words):
    evaluation["policies"][2]["metrics"]["gold"] = 0.0
    assert not any(words in line for line in warnings(evaluation["policies"], []))
    last(evaluation)["metrics"].update(change)
    assert any(words in line for line in warnings(evaluation["policies"], []))


def test_a_better_earlier_checkpoint_is_named(evaluation):
    (line,) = warnings(evaluation["policies"], [])
    assert line == "The best gold score, 0.62, is that of ppo@16, not of the last checkpoint."


def test_an_earlier_checkpoint_that_is_better_by_noise_is_not(evaluation):
    evaluation["policies"][2]["metrics"]["gold"] = 0.53  # last: 0.50 +- 0.04
    assert warnings(evaluation["policies"], []) == []


def test_steps_with_nan_are_counted(evaluation, curves):
    curves[4]["policy/approxkl"] = math.nan
    curves[9]["critic/loss"] = math.inf
    assert "2 PPO steps logged values that are not finite, the first at step 5." in warnings(
        evaluation["policies"], curves
    )


def test_a_verdict_on_best_of_n_says_that_its_kl_is_a_bound(evaluation):
    end = last(evaluation)
    evaluation["policies"] = [evaluation["policies"][0], end]
    end |= {"name": "sft:best_of_4", "step": None, "best_of": 4, "bounds": ["kl"]}
    said = verdict(evaluation["policies"])
    assert said.startswith("With sft:best_of_4 the gold score ")
    assert "at a KL of at most 7.0 nats from SFT." in said
