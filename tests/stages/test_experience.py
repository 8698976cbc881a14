"""What an answer is paid, and the state that iterations hand on."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rlhf_exp.model.roles import Roles
from rlhf_exp.rollout.engine import Rollout
from rlhf_exp.stages import experience as experiences
from rlhf_exp.stages import order, ppo
from rlhf_exp.stages.actors import build_actors
from rlhf_exp.stages.references import References
from rlhf_exp.stages.state import State
from tests.stages.plain import (
    ROWS,
    SCORES,
    iterate,
    prepare,
)


def shaped(ppo_config, rollout, scores, state=None, **settings):
    config = ppo_config({"reward_clip": 0.0, "missing_eos_penalty": 0.0, **settings})
    state = state or State.start(config.ppo)
    return experiences.shape_scores(
        config.ppo, state, torch.tensor(scores), rollout, torch.tensor([1.0, 2.0, 3.0])
    )


@pytest.fixture
def three() -> Rollout:
    """Answers of 4, 2 and 7 tokens, of which the first ended."""
    return Rollout([[1]] * 3, [[5] * 4, [5] * 2, [5] * 7], [True, False, False], [], None)


def test_scores_are_clipped_and_unfinished_answers_pay(ppo_config, three):
    paid = shaped(ppo_config, three, [12.0, -12.0, 0.5], reward_clip=10.0, missing_eos_penalty=0.75)
    assert paid.tolist() == [10.0, -10.75, -0.25]
    assert shaped(ppo_config, three, [12.0, -12.0, 0.5]).tolist() == [12.0, -12.0, 0.5]


def test_an_unfinished_answer_has_the_fixed_score_whatever_it_says(ppo_config, three):
    paid = shaped(ppo_config, three, [12.0, 9.0, -50.0], missing_eos="score", missing_eos_score=-1.5)
    assert paid.tolist() == [12.0, -1.5, -1.5]


def test_the_references_score_is_subtracted_before_the_clip(ppo_config, three):
    assert shaped(ppo_config, three, [4.0, 4.0, 4.0], score_scaling="reference").tolist() == [3, 2, 1]
    clipped = shaped(ppo_config, three, [4.0, 4.0, 4.0], score_scaling="reference", reward_clip=2.5)
    assert clipped.tolist() == [2.5, 2, 1]


def test_running_moments_are_of_all_scores_so_far(ppo_config, three):
    state = State.start(ppo_config().ppo)
    first = shaped(ppo_config, three, [1.0, 2.0, 3.0], state, score_scaling="running")
    # mean 2, variance 2/3
    assert first.tolist() == pytest.approx([-1.2247449, 0.0, 1.2247449], abs=1e-5)
    # with 10, 10, 12: mean 38/6, squares 14 + 344 -> variance 358/6 - (38/6)^2 = 19.5555
    second = shaped(ppo_config, three, [10.0, 10.0, 12.0], state, score_scaling="running")
    expected = [(s - 38 / 6) / math.sqrt(358 / 6 - (38 / 6) ** 2) for s in (10, 10, 12)]
    assert second.tolist() == pytest.approx(expected, abs=1e-5)
    assert state.scores.count == 6


@pytest.mark.parametrize(("longest", "buffer"), [(10, 4), (7, 7), (20, 1)])
def test_dapos_overlong_buffer_is_a_length_penalty(ppo_config, longest, buffer):
    """Yu et al. 2025, eq. 13, for every length up to the most that can be sampled."""
    answers = [[5] * n for n in range(1, longest + 1)]
    rollout = Rollout([[1]] * longest, answers, [True] * longest, [], None)
    config = ppo_config({"length_penalty": 1 / buffer, "length_budget": longest - buffer, "reward_clip": 0.0})
    paid = experiences.shape_scores(config.ppo, State.start(config.ppo), torch.zeros(longest), rollout)
    for n, got in zip(range(1, longest + 1), paid.tolist(), strict=True):
        expected = 0.0 if n <= longest - buffer else (longest - buffer - n) / buffer
        assert got == pytest.approx(expected, abs=1e-6)
    assert paid[-1] == pytest.approx(-1)


def test_an_eos_after_a_stop_text_is_no_token_that_anybody_chose(ppo_config):
    """Answers of 4 tokens: an EOS that was sampled, one that a stop text put there, none."""
    answers, ended, stops = [[5, 6, 7, 2], [5, 6, 7, 2], [5, 6, 7, 8]], [True, True, False], [None, 2, None]
    rollout = Rollout([[1]] * 3, answers, ended, [], None, stops)
    config = ppo_config(
        {"length_penalty": 0.5, "length_budget": 1, "reward_clip": 0.0, "missing_eos_penalty": 0.0}
    )
    paid = experiences.shape_scores(config.ppo, State.start(config.ppo), torch.zeros(3), rollout)
    assert paid.tolist() == [-1.5, -1.0, -1.5]


# ---------------------------------------------------------------- the state


def test_the_controller_moves_the_coefficient_between_iterations(base, adapters, context, ppo_config):
    settings = {"kl_control": "adaptive", "kl_target": 0.01, "kl_horizon": 80.0, "kl_coef": 0.1}
    config = ppo_config(settings)
    with Roles(base) as roles:
        actors = build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
        carried = ppo.Carried(State.start(config.ppo), References(config))
        first = iterate(config, actors, carried=carried, lr=1.0)
        second = iterate(config, actors, step=2, carried=carried)
    assert (first["objective/kl"], first["objective/kl_coef"]) == (0, 0.1)
    # KL 0: error -1, clipped to -.2, times 8 answers of a horizon of 80
    assert second["objective/kl_coef"] == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    assert second["objective/kl"] > 0.012
    assert carried.state.kl_coef == pytest.approx(0.1 * (1 - 0.02) * (1 + 0.02))


def test_a_fixed_coefficient_stays(ppo_config):
    state = State.start(ppo_config({"kl_coef": 0.3}).ppo)
    state.control(ppo_config().ppo, kl=99.0, episodes=1000)
    assert state.kl_coef == 0.3


def test_the_coefficient_of_the_state_is_the_one_that_counts(actors, rollout, ppo_config):
    config, actors = ppo_config({"kl_control": "adaptive", "kl_coef": 0.0}), actors["trunk"]
    epoch = order.minibatches(rollout, config, 1)[0]
    state = State.start(config.ppo)
    state.kl_coef = 2.0
    _, metrics = prepare(config, actors, rollout, SCORES, epoch, state)
    _, without = prepare(config, actors, rollout, SCORES, epoch)
    fall = without["objective/rewards"] - metrics["objective/rewards"]
    assert fall == pytest.approx(2 * metrics["objective/kl"], abs=1e-4)
    assert abs(metrics["objective/kl"]) > 0.01


@torch.no_grad()
@pytest.mark.parametrize(
    "generation",
    [{"temperature": 0.6, "logprob_mode": "raw"}, {"repetition_penalty": 1.5}, {"temperature": 2.0}],
    ids=str,
)
def test_the_kl_of_the_models_own_distributions_whatever_is_sampled(
    base, actors, rollout, ppo_config, generation
):
    """Of both models' plain logits in float64: the frontier's x-axis."""
    config, actors = ppo_config({}, generation), actors["trunk"]
    epoch = order.minibatches(rollout, config, 1)[0]
    _, metrics = prepare(config, actors, rollout, SCORES, epoch)
    expected = 0.0
    for prompt, response in zip(rollout.prompts, rollout.responses, strict=True):
        said = []
        for role in ("policy", "ref"):
            with actors.roles.use(role):
                logits = base.model(input_ids=torch.tensor([prompt + response])).logits[0].double()
            said.append(logits[len(prompt) - 1 : -1].log_softmax(dim=-1))
        expected += float((said[0].exp() * (said[0] - said[1])).sum())
    assert metrics["objective/kl_untruncated"] == pytest.approx(expected / ROWS, rel=1e-4)
    assert expected > 0.1
    _, plain = prepare(ppo_config(), actors, rollout, SCORES, epoch)
    assert "objective/kl_untruncated" not in plain


@torch.no_grad()
def test_the_kept_mass_of_raw_log_probs_is_the_samplers(actors, rollout, ppo_config):
    config = ppo_config({}, {"top_k": 3, "logprob_mode": "raw"})
    epoch = order.minibatches(rollout, config, 1)[0]
    masses = [torch.linspace(0.1, 0.7, len(response)) for response in rollout.responses]
    _, metrics = prepare(config, actors["trunk"], rollout._replace(masses=masses), SCORES, epoch)
    assert metrics["response/kept_mass"] == pytest.approx(float(torch.cat(masses).mean()))


def test_the_state_survives_a_checkpoint_bit_for_bit(ppo_config, three):
    state = State.start(ppo_config().ppo)
    shaped(ppo_config, three, [0.1, 0.2, 1 / 3], state, score_scaling="running")
    state.kl_coef, state.updates = 0.1 * 1.00128, 17
    again = State.from_dict(json.loads(json.dumps(state.to_dict())))
    assert again == state
    assert again.scores.total.dtype == torch.float64


def test_the_baseline_of_reinforce_is_of_earlier_iterations(actors, rollout, ppo_config):
    config = ppo_config({"estimator": "reinforce", "kl_coef": 0.0, "missing_eos_penalty": 0.0})
    actors, state = actors["none"], State.start(config.ppo)
    epoch = order.minibatches(rollout, config, 1)[0]
    prepare(config, actors, rollout, SCORES + 5, epoch, state)
    second, _ = prepare(config, actors, rollout, SCORES, epoch, state)
    expected = SCORES - (SCORES + 5).mean()
    assert torch.allclose(second.advantages[:, 0], expected, atol=1e-5)
    assert state.returns.count == 2 * ROWS
