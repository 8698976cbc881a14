"""Names of nodes in rounds, and who stands on whom, by hand."""

from __future__ import annotations

import pytest

from rlhf_exp.schema import EvalRun, Evaluation, PPORun, Prefer, PreferRun, RewardSource, stage_of
from rlhf_exp.stages import rounds
from rlhf_exp.stages.nodes import Node, Plan
from rlhf_exp.stages.plan import ORDER


def nodes(count: int, **values) -> dict[str, Node]:
    return {"ppo": Node("ppo", PPORun(stage="ppo", prefer=Prefer(rounds=count, **values)))}


@pytest.mark.parametrize(
    ("role", "asker", "expected"),
    [
        ("reward", "ppo", "reward"),
        ("reward_1", "ppo", "reward_1"),
        ("reward", "ppo.2", "reward.2"),
        ("prefer", "reward", "prefer"),
        ("prefer", "reward.1", "prefer.1"),
        ("ppo", "prefer", "ppo.2"),
        ("ppo", "prefer.2", "ppo.1"),
        ("ppo", "prefer.1", "ppo.0"),
        ("dpo", "prefer.1", "dpo.0"),
        ("reward", "ppo.0", "reward.0"),
        ("earlier", "prefer", "prefer.2"),
        ("start", "ppo", "ppo.2"),
        ("start", "ppo.2", "ppo.1"),
        ("ppo", "eval", "ppo"),
        ("sft", "prefer.1", "sft"),
        ("labeller", "prefer.2", "labeller"),
        ("gold", "ppo.1", "gold"),
        ("policy_1", "prefer.1", "policy_1"),
    ],
)
def test_three_rounds(role, asker, expected):
    assert rounds.place(role, asker, nodes(3)) == expected


def test_without_rounds_only_a_policy_to_be_labelled_has_a_number():
    assert rounds.place("ppo", "prefer", {}) == "ppo.0"
    assert rounds.place("prefer", "reward", {}) == "prefer"
    assert rounds.place("reward", "ppo", nodes(1)) == "reward"


def test_each_node_comes_after_all_that_it_stands_on():
    names = ["ppo", "prefer.2", "labeller", "reward.0", "sft", "eval", "reward.1", "prefer", "ppo.0", "ppo.1"]
    names += ["reward", "policy_0", "prefer.1", "ppo.2", "reward.2", "gold"]
    assert sorted(names, key=lambda name: rounds.rank(name, ORDER)) == [
        *("sft", "policy_0", "labeller", "reward.0", "ppo.0", "prefer.1", "reward.1", "ppo.1"),
        *("prefer.2", "reward.2", "ppo.2", "prefer", "reward", "gold", "ppo", "eval"),
    ]


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("ppo.2", "ppo"),
        ("reward_1.2", "reward"),
        ("labeller", "reward"),
        ("policy_0", "sft"),
        ("prefer.1", "prefer"),
    ],
)
def test_the_stage_of_a_name(name, stage):
    assert stage_of(name) == stage


def prefer(**values) -> PreferRun:
    return PreferRun(stage="prefer", prefer=Prefer(**values))


def test_prefer_asks_for_policies_labeller_and_what_was_before():
    asked = prefer(policies=["sft", "base", "ppo", "./mine"], labellers=["length", "learned"])
    assert rounds.roles("prefer", asked, {}, False) == ["sft", "ppo", "policy_3", "labeller"]
    rule = prefer(policies=["base"], labellers=["length", "judge"])
    assert rounds.roles("prefer", rule, {}, False) == []
    assert rounds.roles("prefer", rule, {}, new_base=True) == ["sft"]
    assert rounds.roles("prefer.1", rule, nodes(3), False) == []
    assert rounds.roles("prefer.2", rule, nodes(3), False) == ["earlier"]
    assert (
        rounds.roles(
            "prefer", prefer(policies=["base"], labellers=["length"], keep="newest"), nodes(3), False
        )
        == []
    )


def test_ppo_starts_from_the_last_round_where_it_is_asked_to():
    found = nodes(2, start="last")
    config = found["ppo"].config
    assert rounds.roles("ppo", config, found, False) == ["start"]
    assert rounds.roles("ppo.1", config, found, False) == []
    assert rounds.roles("ppo", nodes(2)["ppo"].config, nodes(2), False) == []


@pytest.mark.parametrize(
    ("source", "gold", "noted"),
    [
        (RewardSource(kind="function", function="sentiment"), "sentiment", "eval.gold=sentiment"),
        (RewardSource(kind="function", function="sentiment"), "length", None),
        (RewardSource(kind="sum", parts=["1*learned", "-0.01*length"]), "length", "eval.gold=length"),
        (RewardSource(kind="sum", parts=["1*learned", "-0.01*length"]), "learned", None),  # another model
        (RewardSource(), "learned", None),
        (RewardSource(), "none", None),
        (
            RewardSource(kind="function", function="length", gold="length"),
            "none",
            "reward_source.gold=length",
        ),
    ],
)
def test_a_gold_that_is_the_reward_is_noted(source, gold, noted):
    ppo = Node("ppo", PPORun(stage="ppo", reward_source=source))
    evaluation = Node("eval", EvalRun(stage="eval", reward_source=source, eval=Evaluation(gold=gold)))
    plan = Plan(evaluation, [ppo, evaluation], None, evaluation.config)
    expected = (
        f"note: {noted} is also the reward, or a part of it (reward_source), so that it cannot show whether the "
        "policy games its reward: choose another gold"
    )
    assert list(rounds.lines(plan)) == ([expected] if noted else [])
