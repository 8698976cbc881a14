"""Ensembles, sums and the gold scorer inside PPO, ILQL and eval: one base, and each number by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import Roles
from rlhf_exp.rewards.rules import length
from rlhf_exp.rollout.engine import Rollout, judged
from rlhf_exp.schema import RewardSource
from rlhf_exp.stages import evaluate, ilql, ppo
from rlhf_exp.stages.actors import build_actors
from rlhf_exp.stages.context import HEAD_FILE
from tests.stages.plain import prompts_of

ENSEMBLE = {"ensemble": 2, "ensemble_lambda": 2.0}


@pytest.fixture(scope="module")
def second(base, adapters, tmp_path_factory):
    """Another reward model: the adapter `other` with a head of its own."""
    folder = tmp_path_factory.mktemp("second")
    with Roles(base) as roles:
        roles.load("x", adapters["other"])
        roles.save("x", folder)
    head = ScalarHead(base.hidden_size).reset(11)
    head.save(folder / HEAD_FILE)
    return folder


def plain_scores(base, folder, rollout: Rollout) -> list[float]:
    """Each answer on its own: the last hidden state times the head's weights, plus its bias."""
    head = ScalarHead.load(folder / HEAD_FILE)
    with Roles(base) as roles, torch.no_grad():
        roles.load("x", folder)
        found = []
        for prompt, response in zip(rollout.prompts, judged(rollout), strict=True):
            with roles.use("x"):
                last = base.trunk(input_ids=torch.tensor([prompt + response])).last_hidden_state[0, -1]
            found.append(float(last.double() @ head.weight.double() + head.bias.double()))
    return found


def scores_of(config, context, base, rollout, **parents):
    """What PPO takes for scores, and its figures."""
    with Roles(base) as roles:
        actors = build_actors(config, context(**parents), roles)
        return ppo.score_answers(config, actors, rollout, prompts_of()[0])


def test_an_ensemble_scores_mean_minus_lambda_std(base, adapters, second, context, ppo_config, rollout):
    config = ppo_config(reward_source=ENSEMBLE)
    scores, figures = scores_of(
        config, context, base, rollout, sft=adapters["sft"], reward=adapters["reward"], reward_1=second
    )
    one, two = plain_scores(base, adapters["reward"], rollout), plain_scores(base, second, rollout)
    spread = [abs(a - b) / 2 for a, b in zip(one, two, strict=True)]  # the standard deviation of two numbers
    expected = [(a + b) / 2 - 2 * s for a, b, s in zip(one, two, spread, strict=True)]
    assert min(spread) > 1e-3
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)
    assert figures["objective/ensemble_std"] == pytest.approx(sum(spread) / len(spread), abs=1e-4)
    assert figures["objective/scores"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_a_sum_of_a_model_and_a_rule(base, adapters, context, ppo_config, rollout):
    config = ppo_config(reward_source={"kind": "sum", "parts": ["0.5*learned", "-2*length"]})
    scores, figures = scores_of(
        config, context, base, rollout, sft=adapters["sft"], reward=adapters["reward"]
    )
    learned = plain_scores(base, adapters["reward"], rollout)
    texts = base.tokenizer.batch_decode(judged(rollout), skip_special_tokens=True)
    words = length(texts, texts)
    assert any(words)
    expected = [0.5 * a - 2 * b for a, b in zip(learned, words, strict=True)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)
    assert figures["objective/part_1"] == pytest.approx(sum(learned) / 8, abs=1e-4)
    assert figures["objective/part_2"] == pytest.approx(sum(words) / 8)


def test_gold_is_the_mean_score_of_its_own_model(base, adapters, second, context, ppo_config, rollout):
    parents = {"sft": adapters["sft"], "reward": adapters["reward"]}
    plain, without = scores_of(ppo_config(), context, base, rollout, **parents)
    config = ppo_config(reward_source={"gold": "learned"})
    scores, figures = scores_of(config, context, base, rollout, **parents, gold=second)
    expected = plain_scores(base, second, rollout)
    assert figures.pop("objective/gold") == pytest.approx(sum(expected) / 8, abs=1e-4)
    assert torch.equal(scores, plain) and figures == without  # the proxy does not feel it


def test_a_gold_rule_reads_the_prompts_of_the_data(base, adapters, context, ppo_config, rollout, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "rlhf_exp.rewards.functions.score", lambda *given, **_: seen.append(given) or [1.0, 2.0] * 4
    )
    config = ppo_config(reward_source={"gold": "sentiment"})
    _, figures = scores_of(config, context, base, rollout, sft=adapters["sft"], reward=adapters["reward"])
    assert figures["objective/gold"] == 1.5
    ((spec, prompts, responses),) = seen
    assert (spec, list(prompts)) == ("sentiment", [str(i) for i in range(8)])
    assert responses == base.tokenizer.batch_decode(judged(rollout), skip_special_tokens=True)


def test_a_fault_of_the_reward_does_not_reach_gold(base, adapters, second, context, ppo_config, rollout):
    parents = {"sft": adapters["sft"], "reward": adapters["reward"], "gold": second}
    found = []
    for faults in ([], ["random_reward_head", "score_without_eos", "sigmoid_scores"]):
        config = ppo_config({"faults": faults}, reward_source={"gold": "learned"})
        found.append(scores_of(config, context, base, rollout, **parents)[1])
    assert found[0]["objective/gold"] == found[1]["objective/gold"]
    assert found[0]["objective/scores"] != found[1]["objective/scores"]


def test_models_are_adapters_on_one_base(base, adapters, second, context, ppo_config):
    before = {id(p) for p in base.model.parameters()}
    config = ppo_config(reward_source=ENSEMBLE | {"gold": "learned"})
    parents = {"reward": adapters["reward"], "reward_1": second, "gold": second}
    with Roles(base) as roles:
        actors = build_actors(config, context(sft=adapters["sft"], **parents), roles)
        assert {id(p) for p in base.model.parameters()} >= before
        assert list(actors.reward_heads) == ["reward", "reward_1", "gold"]
        frozen = [p for role in parents for p in roles.parameters(role)]
        frozen += [p for head in actors.reward_heads.values() for p in head.parameters()]
        assert not any(p.requires_grad for p in frozen)
        assert not {id(p) for p in frozen} & {id(p) for p in actors.trainable()}


def test_the_critic_starts_as_the_reward_model_but_not_as_part_of_a_sum(base, adapters, context, ppo_config):
    stored = ScalarHead.load(adapters["reward"] / HEAD_FILE).weight
    sum_of = {"kind": "sum", "parts": ["0.1*learned", "1*length"]}
    for source, init, starts in (({}, "auto", True), (sum_of, "auto", False), (sum_of, "reward", True)):
        config = ppo_config({"critic": "own", "critic_init": init}, reward_source=source)
        with Roles(base) as roles:
            actors = build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
            assert torch.equal(actors.value_head.weight, stored) == starts


def test_eval_and_ilql_load_what_they_score_with(base, adapters, second, context, run_config):
    parents = {"sft": adapters["sft"], "reward": adapters["reward"], "reward_1": second, "gold": second}
    source = RewardSource(**ENSEMBLE, gold="learned")
    evaluation = run_config("eval", reward_source=source)
    for gold, roles_of in (("none", ["reward", "reward_1"]), ("learned", ["reward", "reward_1", "gold"])):
        evaluation.eval.gold = gold
        with Roles(base) as roles:
            assert list(evaluate.load_scorer(evaluation, context(**parents), roles)) == roles_of
    with Roles(base) as roles:
        config = run_config("ilql", reward_source=source)
        assert list(ilql.put_roles(config, context(**parents), roles)) == ["reward", "reward_1", "gold"]
