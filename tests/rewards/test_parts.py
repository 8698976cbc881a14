"""Sums of reward sources: how a part is read, refused and said; and what an ensemble's scores are joined to."""

from __future__ import annotations

import math

import pytest

from rlhf_exp.errors import InputError
from rlhf_exp.rewards import functions, parts, source
from rlhf_exp.schema import RewardSource, learns, member_of, proxies, stage_of
from tests.rewards.test_functions import run


def a_sum(*texts: str, **values) -> RewardSource:
    return RewardSource(kind="sum", parts=list(texts), **values)


@pytest.mark.parametrize(
    ("text", "weight", "spec"),
    [
        ("1.0*learned", 1.0, "learned"),
        ("-0.01 * length", -0.01, "length"),
        ("5e-1*regex:a*b|c *d", 0.5, "regex:a*b|c *d"),  # only the first star is ours
        ("0*python:my.f", 0.0, "python:my.f"),
    ],
)
def test_a_part_is_a_weight_and_a_spec(text, weight, spec):
    assert parts.parse(text) == (weight, spec)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("length", "expected WEIGHT*SPEC, such as 0.5*length"),
        ("0.5*", "expected WEIGHT*SPEC, such as 0.5*0.5"),
        ("", "expected WEIGHT*SPEC, such as 0.5*length"),
        ("half*length", "'half' is no weight: expected a number before the first *, such as -0.01*length"),
        ("*length", "'' is no weight: expected a number before the first *, such as -0.01*length"),
        ("nan*length", "'nan' is no weight: expected a number before the first *, such as -0.01*length"),
        ("inf*length", "'inf' is no weight: expected a number before the first *, such as -0.01*length"),
        ("1*lenght", "there is no function lenght; did you mean length?"),
        ("1*lerned", "there is no function lerned; did you mean learned?"),
        ("1*length:3", "takes no argument, got 3"),
    ],
)
def test_a_part_that_cannot_be_is_one_line_and_hides_no_other(text, line):
    config = run("ppo")
    config.reward_source = a_sum(text, "1*length", "2*regex:[")
    with pytest.raises(InputError) as caught:
        functions.check_config(config)
    problems = caught.value.problems
    assert len(problems) == 2
    bad = text if ("is no" in line and "weight" in line) or "WEIGHT" in line else text.partition("*")[2]
    assert f"reward_source.parts[0]={bad}: {line}" in problems
    assert any(p.startswith("reward_source.parts[2]=regex:[: is no regular expression") for p in problems)


def test_the_functions_of_a_sum_and_of_gold_are_the_runs():
    config = run("ppo")
    config.reward_source = a_sum("1*learned", "2*python:rlhf_exp.rewards.rules.length", gold="optimality")
    spec = "python:rlhf_exp.rewards.rules.length"
    assert functions.of_config(config) == {
        "reward_source.parts[1]": spec,
        "reward_source.gold": "optimality",
    }
    assert set(functions.fingerprints(config)) == {"reward_source.parts[1]"}  # a user's source is in the key
    evaluation = run("eval", kind="learned", gold="learned")
    evaluation.reward_source.gold = "learned"
    assert functions.of_config(evaluation) == {}


def test_roles():
    assert proxies(RewardSource()) == ("reward",)
    assert proxies(RewardSource(ensemble=3)) == ("reward", "reward_1", "reward_2")
    assert proxies(RewardSource(kind="function")) == ()
    assert proxies(a_sum("1*length")) == ()
    assert proxies(a_sum("1*length", "2 * learned ", ensemble=2)) == ("reward", "reward_1")
    assert not learns(a_sum("1*regex:x*learned"))
    assert [member_of(role) for role in ("reward", "reward_1", "reward_12", "gold", "ppo")] == [
        0,
        1,
        12,
        None,
        None,
    ]
    assert [stage_of(role) for role in ("sft", "reward", "reward_1", "gold", "eval")] == [
        *("sft", "reward", "reward", "reward", "eval")
    ]


def test_what_is_said():
    assert parts.said(RewardSource()) == "learned reward model"
    assert parts.said(RewardSource(kind="function", function="length")) == "length"
    assert parts.said(RewardSource(ensemble=2), "X") == "mean - 0.5 * std of X"
    assert parts.said(a_sum("-1*length", "0.5*learned"), "X") == "- 1 * length + 0.5 * (X)"


def test_an_ensemble_by_hand():
    """Scores 1, 3, 5: mean 3, variance (4 + 0 + 4) / 3. Where all agree nothing is taken off."""
    joined, spread = source.join([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]], 0.5)
    assert spread == pytest.approx([math.sqrt(8 / 3), 0.0])
    assert joined == pytest.approx([3 - 0.5 * 1.6329931618554521, 2.0])
    assert source.join([[1.0], [3.0]], 0.0)[0] == [2.0]
    assert source.join([[0.1, -7.3]], 0.5) == ([0.1, -7.3], [0.0, 0.0])  # alone: its own scores, bit for bit
    assert all(math.isnan(x) for x in source.join([[math.nan], [1.0]], 0.5)[0])  # seen, not an exception


def test_a_sum_by_hand(monkeypatch):
    """2 * (mean 2 - 1 * std 1) - 0.5 * words: the members' scores are joined before they are weighed."""
    monkeypatch.setattr(
        source, "by_model", lambda role, *_: {"reward": [1.0, 5.0], "reward_1": [3.0, 5.0]}[role]
    )
    monkeypatch.setattr(source, "by_rule", lambda spec, *_: {"length": [4.0, 0.0]}[spec])
    given, figures = a_sum("2*learned", "-0.5*length", ensemble=2, ensemble_lambda=1.0), {}
    assert source.score(given, None, {}, [[1], [1]], [[2], [2]], 8, figures) == [2 * 1 - 2.0, 10.0]
    assert figures == {
        "objective/ensemble_std": 0.5,
        "objective/part_1": 3.0,
        "objective/part_2": 2.0,
    }
