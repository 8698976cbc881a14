"""PPO on answers that a stop text ended: the EOS put behind it is no token of the policy's, and counts nowhere."""

from __future__ import annotations

from statistics import fmean, pstdev

import pytest
import torch

from rlhf_exp.algorithms.kl import kl_rewards
from rlhf_exp.algorithms.support import Support
from rlhf_exp.rollout.engine import Rollout
from rlhf_exp.rollout.scoring import answers
from rlhf_exp.stages import experience, order, selfcheck
from rlhf_exp.stages.selfcheck import Trial
from rlhf_exp.stages.state import State
from rlhf_exp.stages.update import loss_of, update
from tests.stages.plain import (
    LENGTHS,
    ROWS,
    SCORES,
    gradients,
    nudge,
    plain_experience,
    plain_loss,
    prepare,
    with_supports,
)

STOPPED = (1, 3, 5)  # answers of 1, 6 and 6 tokens, which no EOS ended


def cut(rollout: Rollout) -> Rollout:
    """The answers as far as the policy wrote them; those that a stop text ended count as ended."""
    return rollout._replace(ended=[end or row in STOPPED for row, end in enumerate(rollout.ended)])


def stopped(rollout: Rollout, eos_id: int) -> Rollout:
    """The same as the sampler hands them over: EOS behind each stop text, log-prob 0, alone in its kept set."""
    forced = Support(torch.tensor([eos_id], dtype=torch.int32), torch.tensor([1]))

    def longer(rows, end, join):
        return [join(row, end) if i in STOPPED else row for i, row in enumerate(rows)]

    return cut(rollout)._replace(
        responses=longer(rollout.responses, [eos_id], lambda row, end: row + end),
        logprobs=longer(rollout.logprobs, torch.zeros(1), lambda row, end: torch.cat([row, end])),
        supports=rollout.supports
        and longer(rollout.supports, forced, lambda row, end: Support.concat([row, end])),
        stops=[n - 1 if i in STOPPED else None for i, n in enumerate(LENGTHS)],
    )


def test_the_steps_are_the_tokens_that_were_chosen(base):
    rollout = Rollout([[3], [4]], [[5, 6, 2], [7, 8, 2]], [True, True], [], None)
    assert answers(rollout, [0, 1], base).steps.tolist() == [[True] * 3] * 2
    rollout = rollout._replace(stops=[None, 1])
    assert answers(rollout, [0, 1], base).steps.tolist() == [[True] * 3, [True, True, False]]
    assert answers(rollout, [1, 0], base).steps.tolist() == [[True, True, False], [True] * 3]
    assert answers(rollout, [0], base).steps.tolist() == [[True] * 3]


@pytest.mark.parametrize("whitened", [False, True])
def test_advantages_by_hand(base, ppo_config, whitened):
    """The score lands on the token that completes the stop text and is carried back from there.

    gamma .9, lam .8, KL coefficient .5; 99 stands at the EOS that nobody chose, where nothing may look.
    """
    rollout = Rollout([[3], [4]], [[5, 6, 2], [7, 8, 2]], [True, True], [], None, [None, 1])
    steps = answers(rollout, [0, 1], base).steps
    values, kl = torch.tensor([[0.5, 0.25, 0.0], [1.0, 0.5, 99]]), torch.tensor([[0.2, 0, 0], [0.4, 0, 99]])
    scores = torch.tensor([2.0, 3.0])
    ppo = ppo_config({"gamma": 0.9, "lam": 0.8, "whiten_advantages": whitened}).ppo
    rewards = kl_rewards(scores, kl, steps, 0.5)
    assert rewards.tolist() == [pytest.approx([-0.1, 0, 2]), pytest.approx([-0.2, 3, 0])]
    found = experience.estimate(ppo, State.start(ppo), rewards, scores, values, steps)
    # chosen EOS: deltas -.1 + .9 * .25 - .5 = -.375, .9 * 0 - .25 = -.25, 2 - 0 = 2
    #   2, -.25 + .72 * 2 = 1.19, -.375 + .72 * 1.19 = .4818
    # stop text: deltas -.2 + .9 * .5 - 1 = -.75, 3 - .5 = 2.5
    #   2.5, -.75 + .72 * 2.5 = 1.05
    chosen = [0.4818, 1.19, 2, 1.05, 2.5]
    if whitened:
        chosen = [(a - fmean(chosen)) / pstdev(chosen) for a in chosen]
    assert found.advantages[steps].tolist() == pytest.approx(chosen, abs=1e-5)
    assert found.advantages[1, 2] == found.returns[1, 2] == 0
    assert found.returns[steps].tolist() == pytest.approx([0.9818, 1.44, 2, 2.05, 3], abs=1e-5)


def test_whitened_rewards_by_hand(base, ppo_config):
    """gamma = lam = 1 and no critic: an answer's first advantage is the sum of its whitened rewards."""
    rollout = Rollout([[3], [4]], [[5, 6], [7, 8, 2]], [False, True], [], None, [None, 1])
    steps = answers(rollout, [0, 1], base).steps
    ppo = ppo_config({"gamma": 1.0, "lam": 1.0, "whiten_rewards": True, "whiten_advantages": False}).ppo
    scores = torch.tensor([1.0, 3.0])
    rewards = kl_rewards(scores, torch.zeros(2, 3), steps, 0.0)
    found = experience.estimate(ppo, State.start(ppo), rewards, scores, torch.zeros(2, 3), steps)
    # rewards 0, 1, 0, 3: mean 1, variance 1.5; the mean is put back
    small, one, three = (1 + (r - 1) / 1.5**0.5 for r in (0, 1, 3))
    assert found.advantages.tolist() == [
        pytest.approx([small + one, one, 0], abs=1e-5),
        pytest.approx([small + three, three, 0], abs=1e-5),
    ]


OPTIONS = {
    "default": ({}, "trunk"),
    "own critic": ({"whiten_rewards": True, "gamma": 0.9, "lam": 0.8}, "own"),
    "means of answers": ({"loss_mean": "sequence", "cliprange_value": 0.01}, "trunk"),
    "entropy": ({"entropy_coef": 0.1, "kl_in": "loss", "kl_coef": 0.3, "kl_estimator": "k3"}, "trunk"),
    "groups": ({"estimator": "rloo", "samples_per_prompt": 2, "kl_coef": 0.3}, "none"),
}


@pytest.mark.parametrize(
    ("name", "restricted"),
    # the plain entropy is over all tokens
    [(name, kept) for name in OPTIONS for kept in (False, True) if not (kept and name == "entropy")],
)
def test_all_is_as_if_that_eos_were_not_there(base, actors, rollout, ppo_config, name, restricted):
    """Against the definitions, on the answers without it."""
    settings, critic = OPTIONS[name]
    config, actors = ppo_config(settings, {"top_p": 0.9} if restricted else {}), actors[critic]
    rollout = with_supports(rollout) if restricted else rollout
    given, without = stopped(rollout, base.eos_id), cut(rollout)
    plan = order.minibatches(given, config, step=1)
    got, metrics = prepare(config, actors, given, SCORES, plan[0])
    expected = plain_experience(config, actors, without, SCORES)
    for row, plain in enumerate(expected):
        n = LENGTHS[row]
        for field in ("logprobs", "values", "advantages", "returns"):
            whole = getattr(got, field)[row]
            assert torch.allclose(whole[:n], getattr(plain, field), atol=2e-5), field
            assert (whole[n:] == 0).all(), field
    _, other = prepare(config, actors, without, SCORES, order.minibatches(without, config, step=1)[0])
    assert metrics == pytest.approx(other, abs=1e-4)
    assert len(metrics) >= 8

    nudge(actors)
    rows = list(range(ROWS))
    wanted = plain_loss(config, actors, without, expected, rows)
    wanted.backward()
    gradient = gradients(actors)
    count = sum(LENGTHS) if config.ppo.loss_mean == "token" else ROWS
    assert got.mask.sum() == sum(LENGTHS)
    loss, _, _ = loss_of(config, actors, given, got, rows, torch.tensor(count))
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), abs=2e-5)
    for one, another in zip(gradients(actors), gradient, strict=True):
        assert torch.allclose(one, another, atol=2e-5)


@pytest.mark.parametrize("settings", [{}, {"loss_mean": "sequence"}], ids=["tokens", "answers"])
def test_an_updates_figures_are_those_without_that_eos(base, actors, rollout, ppo_config, settings):
    config = ppo_config({"epochs": 2, "minibatches": 2, "kl_in": "loss", "micro_batch_size": 3, **settings})
    start = [p.detach().clone() for p in actors["trunk"].trainable()]
    found = []
    for given in (stopped(rollout, base.eos_id), cut(rollout)):
        with torch.no_grad():
            for parameter, value in zip(actors["trunk"].trainable(), start, strict=True):
                parameter.copy_(value)
        plan = order.minibatches(given, config, step=1)
        learned, _ = prepare(config, actors["trunk"], given, SCORES, plan[0])
        optimizer = torch.optim.SGD(actors["trunk"].trainable(), lr=0.05)
        metrics = update(config, actors["trunk"], optimizer, State.start(config.ppo), given, learned, plan)
        found.append((metrics, [p.detach().clone() for p in actors["trunk"].trainable()]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    assert found[0][0]["policy/clipfrac"] > 0.05
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_where_no_stop_text_came_all_is_bit_for_bit_the_same(actors, rollout, ppo_config):
    config, found = ppo_config({"epochs": 2, "minibatches": 2}), []
    start = [p.detach().clone() for p in actors["trunk"].trainable()]
    for given in (rollout, rollout._replace(stops=[None] * ROWS)):
        with torch.no_grad():
            for parameter, value in zip(actors["trunk"].trainable(), start, strict=True):
                parameter.copy_(value)
        plan = order.minibatches(given, config, step=1)
        learned, metrics = prepare(config, actors["trunk"], given, SCORES, plan[0])
        optimizer = torch.optim.SGD(actors["trunk"].trainable(), lr=0.05)
        metrics |= update(config, actors["trunk"], optimizer, State.start(config.ppo), given, learned, plan)
        found.append((metrics, learned[:6], [p.detach().clone() for p in actors["trunk"].trainable()]))
    assert found[0][0] == found[1][0]
    for part in (1, 2):
        assert all(map(torch.equal, found[0][part], found[1][part]))


def test_the_self_checks_means_are_without_that_eos(base, actors, ppo_config, monkeypatch):
    """A sampler off by .01 in each token that it drew is off by .01 in the mean."""
    built, prompts = actors["trunk"], [type("Prompt", (), {"id": i})() for i in range(4)]
    encoded = [[5 + i, 9, 30 + i] for i in range(4)]
    free = Trial(ppo_config(generation={"max_new_tokens": 12}), built, prompts, encoded).rollout
    texts = (base.tokenizer.decode([token]) for response in free.responses for token in response[2:8])
    stops = [next(text for text in texts if text and "\ufffd" not in text)]  # a whole character
    config = ppo_config(generation={"max_new_tokens": 12, "stop": stops})
    generate = selfcheck.generate

    def off(*given):
        rollout = generate(*given)
        return rollout._replace(logprobs=[torch.where(row == 0, row, row - 0.01) for row in rollout.logprobs])

    monkeypatch.setattr(selfcheck, "generate", off)
    trial = Trial(config, built, prompts, encoded)
    assert sum(stop is not None for stop in trial.rollout.stops) >= 1
    check = selfcheck.sampler_agrees(trial)
    assert not check.ok
    assert check.detail == "mean 0.01, largest 0.01"
    assert selfcheck.ratio_is_one(trial).ok
